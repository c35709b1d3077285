"""Published lists that are fetched: from one place, once, and only the file that was meant."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.prompts import fetched
from dgpo_plugin.prompts.fetched import FETCHED
from dgpo_plugin.prompts.registry import load_prompts

pytestmark = pytest.mark.fast

CONTENT = b'a sign "Open"\na mug "Tea"\n'


class Web:
    """A network that has one file, and counts how often it is asked."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.asked: list[str] = []

    def __call__(self, url: str, timeout: float) -> io.BytesIO:
        self.asked.append(url)
        assert timeout > 0
        if self.content is None:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(self.content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetched, "cache_folder", lambda: tmp_path)
    return tmp_path


def web(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> Web:
    found = Web(content)
    monkeypatch.setattr(urllib.request, "urlopen", found)
    return found


def known_by_its_hash(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    entry = replace(FETCHED["flow-grpo/ocr-train"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(FETCHED, "flow-grpo/ocr-train", entry)


def test_a_list_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_by_its_hash(monkeypatch, CONTENT)
    network = web(monkeypatch, CONTENT)
    for _ in range(2):
        assert [prompt.text for prompt in load_prompts("flow-grpo/ocr-train")] == ['a sign "Open"', 'a mug "Tea"']
    assert network.asked == [FETCHED["flow-grpo/ocr-train"].url]
    assert [file.name for file in (cache / "prompts").iterdir()] == ["flow-grpo-ocr-train.txt"]


COLUMNS = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
DPG = f"""{COLUMNS},question_natural_language
0,"A red fox, ""asleep"",
on a rug. ",,1,0,entity,whole,entity - whole (fox),Is there a fox?
0,"A red fox, ""asleep"",
on a rug. ",,2,1,attribute,color,attribute - color (red),Is the fox red?
vg25,Two mugs.,,1,0,entity,whole,entity - whole (mugs),Are there mugs?
"""
"""As DPG-Bench's scorer reads its table: a row a question."""


def test_a_table_has_each_prompt_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web(monkeypatch, DPG.encode())
    found = load_prompts("dpg-bench")
    assert [prompt.text for prompt in found] == ['A red fox, "asleep",\non a rug.', "Two mugs."]
    assert [dict(prompt.metadata) for prompt in found] == [{"item_id": "0"}, {"item_id": "vg25"}]
    assert [file.name for file in (cache / "prompts").iterdir()] == ["dpg-bench.csv"]


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"", b"item_id,text\n", b"item_id,text\n1\n", b"item_id,text\n1,\n", b"\xff"]
)
def test_another_table_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    web(monkeypatch, content)
    with pytest.raises(UserError, match=r"^prompt set dpg-bench: .*dpg-bench.csv .*; delete it to fetch it again$"):
        load_prompts("dpg-bench")


def test_another_file_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web(monkeypatch, CONTENT)
    with pytest.raises(UserError, match="^prompt set flow-grpo/ocr-train: https://.* is not the published file"):
        load_prompts("flow-grpo/ocr-train")
    assert not (cache / "prompts").exists()


def test_a_kept_file_that_was_changed_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_by_its_hash(monkeypatch, CONTENT)
    web(monkeypatch, CONTENT)
    load_prompts("flow-grpo/ocr-train")
    (cache / "prompts" / "flow-grpo-ocr-train.txt").write_bytes(CONTENT + b"another\n")
    with pytest.raises(UserError, match="is not the published file; delete it to fetch it again$"):
        load_prompts("flow-grpo/ocr-train")


def test_without_a_network_it_says_what_to_type(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web(monkeypatch, None)
    with pytest.raises(UserError, match=r"cannot be fetched \(no route to host\); with a network: curl -L ") as caught:
        load_prompts("drawbench")
    assert f"-o {cache / 'prompts' / 'drawbench.txt'} {FETCHED['drawbench'].url}" in str(caught.value)


def test_a_file_without_end_is_not_read_to_its_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetched, "MOST_BYTES", 10)
    web(monkeypatch, CONTENT)
    with pytest.raises(UserError, match="is larger than 10 bytes"):
        load_prompts("drawbench")


def test_every_list_has_a_fixed_place_and_terms() -> None:
    for name, source in FETCHED.items():
        assert source.url.startswith("https://raw.githubusercontent.com/"), name
        assert len(source.url.split("/")[5]) == 40, name  # a commit, not a branch
        assert source.license, name
        assert source.url.endswith(".csv" if source.columns else (".txt", ".jsonl")), name
    listed = CliRunner().invoke(main, ["list", "prompts", "geneval2"]).output
    assert listed.splitlines() == ["geneval2", "    GenEval 2", "    fetched; license: CC BY-NC 4.0"]
