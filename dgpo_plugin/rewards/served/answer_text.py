"""The text of a judge's answer: found in whatever form an endpoint gives it, without the thinking, refusals named."""

from __future__ import annotations

import re
from typing import Any

WORDS = "think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad"
"""What models call the part of an answer that is not meant for the reader."""
OPENING = rf"""(?:
    <(?:\w+:)?(?:{WORDS})(?:\s[^<>]*)?>                     # <think>, <thinking>, <seed:think>: DeepSeek, Qwen, Seed
  | <\|(?:begin_of_)?(?:{WORDS})\|>                         # <|begin_of_thought|>
  | ◁(?:{WORDS})▷                                           # Kimi-VL
  | \[(?:think|thinking|thought)\]                          # Magistral
  | <\|channel\|>(?:analysis|commentary)<\|message\|>       # gpt-oss
  | <unused94>(?:thought)?                                  # MedGemma
)"""
CLOSING = rf"""(?:
    </(?:\w+:)?(?:{WORDS})\s*> | <\|(?:end_of_|/)(?:{WORDS})\|> | ◁/(?:{WORDS})▷ | \[/(?:think|thinking|thought)\]
  | <\|end\|> | <unused95>
)"""
FLAGS = re.VERBOSE | re.IGNORECASE | re.DOTALL
OPENS, CLOSES = re.compile(OPENING, FLAGS), re.compile(CLOSING, FLAGS)
INNERMOST = re.compile(rf"{OPENING}(?:(?!{OPENING}|{CLOSING}).)*{CLOSING}", FLAGS)
FINAL_CHANNEL = "<|channel|>final<|message|>"
CUT_OFF = ("length", "max_tokens")
FILTERED = ("content_filter", "safety", "prohibited_content", "recitation", "blocklist", "spii")
"""Reasons to finish, OpenAI's first, then those that gateways pass on from others."""


def answer_text(answer: Any) -> str:
    """What an OpenAI-compatible answer says, without its thinking.

    Raises:
        ValueError: it was cut off, filtered or refused, or holds no text, or nothing but thinking.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal = message["content"], message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no text in the answer {str(answer)[:200]!r}") from error
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    refused = [refusal, *(part.get("refusal") for part in parts if isinstance(part, dict))]
    finish = str(choice.get("finish_reason") or "").lower()
    if said := next((text for text in refused if text), None):
        raise ValueError(f"the judge refuses: {str(said)[:200]!r}")
    if finish in FILTERED:
        raise ValueError(f"the endpoint's content filter stopped the answer ({finish})")
    text = "".join(_text(part) for part in parts)
    if finish in CUT_OFF:
        raise ValueError(f"an answer cut off for its length (raise option max_tokens): {text[-200:]!r}")
    kept = without_thinking(text).strip()
    thought = text or message.get("reasoning_content") or message.get("reasoning")
    if not kept and thought:
        raise ValueError(f"nothing but thinking in the answer (raise option max_tokens): {str(thought)[-200:]!r}")
    if not kept:
        raise ValueError(f"no text in the answer {str(answer)[:200]!r}")
    return kept


def _text(part: Any) -> str:
    """The text of a part of the content; nothing for thinking and for what is no text."""
    if isinstance(part, str):
        return part
    shown = isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
    text = part.get("text") if shown else None
    return text if isinstance(text, str) else ""


def without_thinking(text: str) -> str:
    """The text without the thinking in it, whether that was opened and closed, closed only, or opened only.

    Chat templates write the opening tag themselves, so an answer may begin in the middle of it; and one that was cut
    off never closes it. The tags are those that vLLM's and SGLang's reasoning parsers know.
    """
    text = text.rpartition(FINAL_CHANNEL)[2]
    while (shorter := INNERMOST.sub("\n", text)) != text:
        text = shorter
    return OPENS.split(CLOSES.split(text)[-1])[0]
