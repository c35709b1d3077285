"""Reading prompts, drawing them in turn, and the seeds that every random draw hangs on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed, seeded_noise
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.prompts.order import draw_prompt_groups

pytestmark = pytest.mark.fast

quick = settings(max_examples=40, deadline=None, derandomize=True)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- reading


def test_text_files_hold_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "a red circle\r\n\n  a café \n\t\n")
    assert read_prompts(path) == [Prompt("a red circle"), Prompt("a café")]
    assert read_prompts(str(path))[0].metadata == {}


def test_jsonl_files_keep_everything_but_the_text_as_metadata(tmp_path: Path) -> None:
    records = [{"prompt": "two dogs", "tag": "counting", "include": [{"class": "dog", "count": 2}]}, {"prompt": "é"}]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(record) for record in records) + "\n\n")
    first, second = read_prompts(path)
    assert first == Prompt("two dogs", {"tag": "counting", "include": [{"class": "dog", "count": 2}]})
    assert second == Prompt("é", {})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text", "must end in .txt or .jsonl"),
        ("a.txt", "", "holds no prompt"),
        ("a.jsonl", " \n\n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", "a red fox\n".encode("utf-16-le"), "NUL characters, as UTF-16"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', ":3: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', ":2: needs a JSON object"),
        ("a.jsonl", '{"text": "a"}', ":1: needs a JSON object"),
        ("a.jsonl", '{"prompt": 3}', ":1: needs a JSON object"),
        ("a.jsonl", '{"prompt": " "}', ":1: needs a JSON object"),
        ("a.jsonl", "null", ":1: needs a JSON object"),
    ],
)
def test_mistakes_name_the_file_and_the_line(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("missing.txt", "folder.txt"):
        with pytest.raises(UserError, match="check the path") as caught:
            read_prompts(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_only_line_feeds_end_a_line(tmp_path: Path, separator: str) -> None:
    text = f"a{separator}b"
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": text}, ensure_ascii=False))
    assert [prompt.text for prompt in read_prompts(path)] == [text]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "a"), ("a.jsonl", '{"prompt": "a"}')])
def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path, name: str, content: str) -> None:
    assert read_prompts(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode())) == [Prompt("a")]


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "x": ' + "1" * 5000 + "}", "[" * 100_000], ids=["long integer", "deep nesting"]
)
def test_json_beyond_pythons_limits_is_a_user_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError):
        read_prompts(write(tmp_path, "a.jsonl", line))


# ---- drawing


def drawn(count: int, per_iteration: int, iterations: int, seed: int) -> list[int]:
    return [i for k in range(iterations) for i in draw_prompt_groups(count, per_iteration, k, seed)]


@quick
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31))
def test_every_pass_draws_every_prompt_once(count: int, per_iteration: int, seed: int) -> None:
    sequence = drawn(count, per_iteration, iterations=count, seed=seed)  # P passes exactly
    assert len(sequence) == count * per_iteration
    for start in range(0, len(sequence), count):
        assert sorted(sequence[start : start + count]) == list(range(count))
    assert set(Counter(sequence).values()) == {per_iteration}


def test_any_iteration_can_be_asked_for_directly() -> None:
    in_order = [draw_prompt_groups(7, 3, k, seed=5) for k in range(20)]
    assert [draw_prompt_groups(7, 3, k, seed=5) for k in reversed(range(20))] == in_order[::-1]


def test_the_order_changes_with_the_seed_and_from_pass_to_pass() -> None:
    one, other = drawn(50, 50, 3, seed=0), drawn(50, 50, 3, seed=1)
    passes = [tuple(sequence[start : start + 50]) for sequence in (one, other) for start in (0, 50, 100)]
    assert len(set(passes)) == 6
    assert tuple(range(50)) not in passes


def test_a_pass_does_not_depend_on_how_it_is_cut_into_iterations() -> None:
    assert drawn(12, 3, 8, seed=2) == drawn(12, 8, 3, seed=2)


# ---- seeds


@pytest.mark.parametrize(
    ("key", "seed"), [((0,), 2631537505891389924), ((0, 1, "initial noise", 2, 3), 6562221309951425536)]
)
def test_seeds_never_change(key: tuple[int | str, ...], seed: int) -> None:
    """Computed once outside this package: blake2b of repr(key), 8 bytes, little-endian, halved. A change breaks
    every published run and every checkpoint."""
    assert derive_seed(*key) == seed


def test_different_keys_have_different_seeds_that_torch_accepts() -> None:
    keys: list[tuple[int | str, ...]] = [(a, b, c) for a in range(20) for b in ("noise", "step") for c in range(20)]
    keys += [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("a", "b"), ("ab",), ("a, b",), ()]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_noise_depends_on_its_key_and_on_nothing_else() -> None:
    first = seeded_noise((2, 3), 0, "purpose", 1)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(seeded_noise([2, 3], 0, "purpose", 1), first)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is left alone
    assert (first.dtype, first.shape, first.device.type) == (torch.float32, (2, 3), "cpu")


def test_noises_of_neighbouring_keys_are_independent_standard_normals() -> None:
    count, keys = 10_000, 6
    noises = torch.stack([seeded_noise((count,), 0, 0, "initial noise", p, g) for p in range(2) for g in range(3)])
    # Correlations of independent draws have a standard error of 1 / sqrt(count); five of them.
    off_diagonal = torch.corrcoef(noises) - torch.eye(keys)
    assert off_diagonal.abs().max() < 5 / count**0.5
    assert noises.mean().abs() < 5 / (keys * count) ** 0.5
    assert abs(noises.std() - 1) < 5 / (2 * keys * count) ** 0.5
