"""Published prompt lists that are not shipped: fetched by name from where their authors keep them, once."""

from __future__ import annotations

import csv
import hashlib
import io
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, cache_folder, read_text
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.files import read_prompts

SECONDS, MOST_BYTES = 30, 100_000_000
"""How long a server may be silent, and how long a list may be."""
GITHUB = "https://raw.githubusercontent.com"
FLOW_GRPO = f"{GITHUB}/yifan123/flow_grpo/879042cf5707f8b90daa98d147d7deac2317c5da/dataset"
GENEVAL2 = f"{GITHUB}/facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3"
ELLA = f"{GITHUB}/TencentQQGYLab/ELLA/025f650e9b36b9603d606042635d98da09e870de"
T2I = f"{GITHUB}/Karine-Huang/T2I-CompBench/fc2c9b9f8ec357dcf1bb1b382c0df017afe9cd8c/examples/dataset"


@dataclass(frozen=True)
class Fetched:
    """Where a list is and under which terms it may be used.

    Attributes:
        url: of a ``.txt`` or ``.jsonl`` file, or of a table, at a fixed commit.
        license: its repository's, or that none is known.
        about: what it is, in a line.
        sha256: of the file, where it is known; else the commit in the URL alone says which file it is.
        columns: of a table, those that say which prompt a row is of, and the prompt; it is there with its first row.
    """

    url: str
    license: str
    about: str
    sha256: str = ""
    columns: tuple[str, str] | None = None


FETCHED = {
    "flow-grpo/ocr-train": Fetched(
        f"{FLOW_GRPO}/ocr/train.txt",
        "MIT",
        "Flow-GRPO's scenes with words to render",
        "2eb32ce1c5fd1ffec94070be84252419ec848329d9adde9c2708867882fbce5f",
    ),
    "flow-grpo/ocr-test": Fetched(f"{FLOW_GRPO}/ocr/test.txt", "MIT", "likewise, its test set"),
    "flow-grpo/geneval-train": Fetched(
        f"{FLOW_GRPO}/geneval/train_metadata.jsonl",
        "MIT",
        "Flow-GRPO's training prompts of GenEval's task types",
        "34ff787e05efab6fb0c54742f5357d7a850360835818e401a4e55de77f8c9923",
    ),
    "flow-grpo/unseen-objects": Fetched(
        f"{FLOW_GRPO}/geneval_unseen_objects/test_metadata.jsonl", "MIT", "GenEval's tasks, objects never trained on"
    ),
    "flow-grpo/pickscore-train": Fetched(
        f"{FLOW_GRPO}/pickscore/train.txt",
        "none known",
        "people's prompts, of Pick-a-Pic",
        "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f",
    ),
    "flow-grpo/pickscore-test": Fetched(f"{FLOW_GRPO}/pickscore/test.txt", "none known", "likewise, its test set"),
    "drawbench": Fetched(f"{FLOW_GRPO}/drawbench/test.txt", "none known", "DrawBench, as Flow-GRPO evaluates on it"),
    "geneval2": Fetched(
        f"{GENEVAL2}/geneval2_data.jsonl",
        "CC BY-NC 4.0",
        "GenEval 2",
        "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
    ),
    # A row a question of its scorer (compute_dpg_bench.py there), of which a prompt has several.
    "dpg-bench": Fetched(
        f"{ELLA}/dpg_bench/dpg_bench.csv",
        "Apache-2.0",
        "DPG-Bench, dense prompts of some eighty words",
        columns=("item_id", "text"),
    ),
    "t2i-compbench/3d_spatial": Fetched(f"{T2I}/3d_spatial_val.txt", "MIT", "T2I-CompBench, things before and behind"),
    "t2i-compbench/numeracy": Fetched(f"{T2I}/numeracy_val.txt", "MIT", "T2I-CompBench, numbers of things"),
}


def fetch_prompts(name: str) -> list[Prompt]:
    """The prompts of a published list; its file is kept in the user's cache.

    Raises:
        UserError: it cannot be fetched, or is not the file that it was.
    """
    source = FETCHED[name]
    file = _file(name)
    if not file.exists():
        _download(name, source, file)
    if source.sha256 and hashlib.sha256(file.read_bytes()).hexdigest() != source.sha256:
        raise UserError(f"prompt set {name}: {file} is not the published file; delete it to fetch it again")
    return read_prompts(file) if source.columns is None else _table_prompts(name, file, *source.columns)


def _table_prompts(name: str, file: Path, key: str, text: str) -> list[Prompt]:
    """The prompts of a table's rows, each once, with what it is called there in its metadata."""
    try:
        rows = csv.DictReader(io.StringIO(read_text(file, encoding="utf-8-sig"), newline=""))
        found: dict[str, Prompt] = {}
        for row in rows:
            found.setdefault(row[key], Prompt(row[text].strip(), {key: row[key]}, place=f"{file}:{rows.line_num}"))
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(
            f"prompt set {name}: {file} is not the published table, with {key} and {text}; delete it to fetch it again"
        ) from error
    if not found or not all(prompt.text for prompt in found.values()):
        raise UserError(f"prompt set {name}: {file} has no prompts, or an empty one; delete it to fetch it again")
    return list(found.values())


def _file(name: str) -> Path:
    return cache_folder() / "prompts" / (name.replace("/", "-") + Path(FETCHED[name].url).suffix)


def _download(name: str, source: Fetched, file: Path) -> None:
    try:
        with urllib.request.urlopen(source.url, timeout=SECONDS) as response:  # noqa: S310 (https, from the table)
            content = response.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"prompt set {name}: {source.url} cannot be fetched ({reason}); with a network: curl -L --create-dirs "
            f"-o {file} {source.url}"
        ) from error
    if len(content) > MOST_BYTES:
        raise UserError(
            f"prompt set {name}: {source.url} is larger than {MOST_BYTES} bytes; that is no list of prompts"
        )
    if source.sha256 and hashlib.sha256(content).hexdigest() != source.sha256:
        raise UserError(f"prompt set {name}: {source.url} is not the published file; it was changed on the way")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_bytes(content)
