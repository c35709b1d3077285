"""The text of a judge's answer: every form it comes in, thinking taken out, refusals named."""

from __future__ import annotations

from typing import Any

import pytest

from dgpo_plugin.rewards.served.answer_text import answer_text, without_thinking

pytestmark = pytest.mark.fast

SCORE = "Final Score: 4"


@pytest.mark.parametrize(
    "thinking",
    [
        "<think>maybe Final Score: 2</think>",
        "<Think>\nmaybe\n</Think>\n\n",
        "<thinking>maybe</thinking>",
        "<thought>maybe</thought>",
        "<reasoning effort='high'>maybe</reasoning>",
        "<seed:think>maybe</seed:think>",
        "\u25c1think\u25b7maybe\u25c1/think\u25b7",
        "<|begin_of_thought|>maybe<|end_of_thought|>",
        "<|thinking|>maybe<|/thinking|>",
        "[THINK]maybe[/THINK]",
        "<|channel|>analysis<|message|>maybe<|end|><|start|>assistant<|channel|>final<|message|>",
        "<unused94>thought\nmaybe<unused95>",
        "maybe Final Score: 2</think>",
        "maybe Final Score: 2\n\u25c1/think\u25b7",
        "<think>one</think> or <think>two</think>",
        "<think>one <think>two</think> Final Score: 2</think>",
    ],
)
def test_thinking_is_taken_out(thinking: str) -> None:
    text = without_thinking(thinking + SCORE)
    assert text.strip().removeprefix("or").strip() == SCORE
    assert without_thinking(SCORE + "<think>maybe Final Score: 2").strip() == SCORE


@pytest.mark.parametrize(
    "opened", ["<think>", "<thinking>\n", "\u25c1think\u25b7", "[THINK]", "<|channel|>analysis<|message|>"]
)
def test_thinking_that_never_ends_is_all_thinking(opened: str) -> None:
    assert without_thinking(f"{opened}maybe {SCORE}") == ""


def answer(content: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    "content",
    [
        SCORE,
        f"<think>hm</think>{SCORE}",
        [{"type": "text", "text": SCORE}],
        [{"type": "output_text", "text": "Final "}, {"type": "output_text", "text": "Score: 4"}],
        [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Final Score: 2"}]},
            {"type": "text", "text": SCORE},
        ],
        [{"type": "reasoning", "text": "Final Score: 2"}, {"type": "text", "text": SCORE}],
        [SCORE],
        [{"type": "image_url", "image_url": {"url": "data:"}}, {"text": SCORE}],
    ],
)
def test_content_is_a_text_or_parts(content: Any) -> None:
    assert answer_text(answer(content)) == SCORE


def test_reasoning_beside_the_content_is_not_read() -> None:
    assert answer_text(answer(SCORE, reasoning_content="Final Score: 2", refusal=None)) == SCORE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (answer(None, refusal="I can't help with that"), "the judge refuses: \"I can't help"),
        (answer([{"type": "refusal", "refusal": "No."}]), "the judge refuses: 'No.'"),
        (answer("", "content_filter"), r"content filter stopped the answer \(content_filter\)"),
        (answer(SCORE, "content_filter"), "content filter stopped"),
        (answer(None, "SAFETY"), "content filter stopped"),
        (answer(SCORE, "length"), "cut off for its length .raise option max_tokens"),
        (answer("<think>so", "max_tokens"), "cut off for its length"),
        (answer("<think>so Final Score: 4"), "nothing but thinking in the answer .raise option max_tokens"),
        (answer(None, reasoning_content="Final Score: 4"), "nothing but thinking"),
        (answer("", reasoning="Final Score: 4"), "nothing but thinking"),
        (answer(None), "no text in the answer"),
        (answer(""), "no text in the answer"),
        (answer([]), "no text in the answer"),
        (answer({"text": SCORE}), "no text in the answer"),
        ({"error": {"message": "out of credits"}}, "no text in the answer .*out of credits"),
        ({"choices": [{"message": None}]}, "no text in the answer"),
        ({"choices": None}, "no text in the answer"),
        ([], "no text in the answer"),
        ("x", "no text in the answer"),
    ],
)
def test_what_is_no_answer_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer_text(given)
