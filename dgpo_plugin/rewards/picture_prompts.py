"""Which prompt each picture on disk is scored with: one for all, in their order, by name from a table, or GenEval's."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import read_bytes
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards.picture_folders import Found, natural_key, shortened

PROMPT_COLUMNS = ("prompt", "caption", "text")
FILE_COLUMNS = (
    *("file", "file_name", "filename", "file_path", "filepath"),
    *("image", "image_file", "image_name", "image_path", "img", "img_path", "picture", "path"),
)
"""As tables of pictures call them, the first that is there; ``file_name`` is Hugging Face's imagefolder."""
TABLES = (".csv", ".tsv", ".json", ".jsonl")


@dataclass(frozen=True)
class Row:
    """A prompt of a table.

    Attributes:
        file: the picture that it is of, as the table names it; empty if it names none.
        where: the row's place, for messages.
    """

    prompt: Prompt
    file: str
    where: str


def prompts_of(found: Found, prompt: str | None, source: str | None) -> tuple[list[Prompt], list[str]]:
    """The prompt of each picture, and a line for what of the source is not used.

    Args:
        prompt: one for all of them.
        source: a table or list of prompts, or a set's name.

    Raises:
        UserError: not exactly one of the two, or any beside GenEval's own; or they cannot be told whose they are.
    """
    pictures = found.pictures
    if found.prompts:
        if prompt is not None or source is not None:
            raise UserError("--prompt, --prompts: GenEval's folders bring their prompts; leave them out")
        if missing := [str(picture) for picture in pictures if picture not in found.prompts]:
            raise UserError(f"{missing[0]}: has no prompt, as GenEval's folders have; score it by itself")
        return [found.prompts[picture] for picture in pictures], []
    if prompt is not None and source is None:
        return [Prompt(prompt)] * len(pictures), []
    if source is None or prompt is not None:
        raise UserError("--prompt, --prompts: give one of the two")
    rows = read_rows(Path(source)) if source.endswith(TABLES) else []
    if rows and rows[0].file:
        return _by_name(pictures, rows, source)
    prompts = [row.prompt for row in rows] or load_prompts(source)
    _check_order(found, prompts, source)
    return prompts, []


def _check_order(found: Found, prompts: Sequence[Prompt], source: str) -> None:
    """Refuse prompts that are paired by order where the order may be another than was meant.

    Raises:
        UserError: not as many as pictures, or these stand as a shell puts them, ``10.png`` before ``2.png``.
    """
    pictures = found.pictures
    cure = "give as many, or a table with a column file"
    if len(prompts) != len(pictures):
        first = f"first pair: {prompts[0].text!r} for {pictures[0]}"
        raise UserError(f"--prompts {source}: {len(prompts)} prompts for {len(pictures)} pictures ({first}); {cure}")
    files = found.by_hand
    by_shell = (sorted(files), sorted(files, key=lambda path: re.sub(r"[\W_]", "", str(path)).lower()))
    early = [(one, two) for one, two in itertools.pairwise(files) if natural_key(one) > natural_key(two)]
    # Nobody can tell a pattern that the shell wrote out from names that were meant in this order.
    if early and files in by_shell and any(prompt != prompts[0] for prompt in prompts):
        one, two = early[0]
        raise UserError(
            f"--prompts {source}: pictures stand in the order of letters, {one} before {two}, as a shell sorts them; "
            f"give their folder, which is read in the order of numbers, or a table with a column file"
        )


def _by_name(pictures: Sequence[Path], rows: Sequence[Row], source: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of the rows that name the pictures: the longest common end of both paths counts.

    Raises:
        UserError: a picture that no row names, or several with different prompts.
    """
    by_name: dict[str, list[tuple[list[str], int]]] = {}
    for number, row in enumerate(rows):
        parts = _parts(row.file)
        by_name.setdefault(parts[-1], []).append((parts, number))
    prompts, missing, used = [], [], set()
    for picture in pictures:
        own = _parts(str(picture.absolute()))
        without_suffix = [*own[:-1], own[-1].removesuffix(picture.suffix)]
        near = [
            (_common_end(path, parts), number)
            for path in (own, without_suffix)
            for parts, number in by_name.get(path[-1], [])
        ]
        longest = max((common for common, _ in near), default=0)
        best = [number for common, number in near if common == longest]
        used.update(best)
        if not best:
            missing.append(str(picture))
        elif any(rows[number].prompt != rows[best[0]].prompt for number in best):
            raise UserError(
                f"{rows[best[0]].where} and {rows[best[1]].where} both name {picture}; write more of its path there"
            )
        else:
            prompts.append(rows[best[0]].prompt)
    if missing:
        raise UserError(
            f"--prompts {source}: {len(missing)} of {len(pictures)} pictures have no row ({shortened(missing)}), the "
            f"first row is {rows[0].file}; add them, or leave these pictures out"
        )
    rest = [row.file for number, row in enumerate(rows) if number not in used]
    unused = f"{source}: {len(rest)} of {len(rows)} rows are of no picture here ({shortened(rest)})"
    return prompts, [unused] if rest else []


def _parts(file: str) -> list[str]:
    """A path's parts, wherever it was written: Windows' separators, and letters that macOS takes apart."""
    parts = unicodedata.normalize("NFC", file).replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".")] or [file]


def _common_end(one: Sequence[str], two: Sequence[str]) -> int:
    """How many parts from the end are the same."""
    pairs = zip(reversed(one), reversed(two), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def read_rows(path: Path) -> list[Row]:
    """The rows of a table of prompts: ``.csv``, ``.tsv``, ``.json`` (a list of objects) or ``.jsonl``.

    The columns that are neither prompt nor file become metadata.

    Raises:
        UserError: it cannot be read, has no such column, or some rows name a picture and others do not.
    """
    text = _text_of(path)
    records = list(_json_records(text, path) if path.suffix in (".json", ".jsonl") else _csv_records(text, path))
    if not records:
        raise UserError(f"{path}: holds no prompt; write at least one row")
    names = {name.strip().lower(): name for record, _ in records for name in record}
    prompt_column = next((names[each] for each in PROMPT_COLUMNS if each in names), None)
    if prompt_column is None:
        where = "no object has" if path.suffix in (".json", ".jsonl") else "its first line names no"
        raise UserError(f"{path}: {where} {', '.join(PROMPT_COLUMNS)}; give the prompts one of these names")
    file_column = next((names[each] for each in FILE_COLUMNS if each in names and _are_files(records, names[each])), "")
    rows = []
    for record, where in records:
        prompt, file = record.get(prompt_column), record.get(file_column, "")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: has no text under {prompt_column}; write the prompt there")
        if file_column and str(file).strip() in ("", "None"):
            raise UserError(f"{where}: names no picture under {file_column}, others do; write it there")
        rest = {name: value for name, value in record.items() if name not in (prompt_column, file_column)}
        rows.append(Row(Prompt(prompt, rest, place=where), str(file).strip(), where))
    return rows


def _are_files(records: Sequence[tuple[Mapping[str, Any], str]], column: str) -> bool:
    """Whether a column may hold names of pictures: texts, or numbers that are their names."""
    values = [record.get(column) for record, _ in records]
    named = [value for value in values if value not in (None, "")]
    return bool(named) and all(isinstance(value, str | int) and not isinstance(value, bool) for value in named)


def _text_of(path: Path) -> str:
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror}; check the path") from error
    try:
        # Excel's "Unicode text" is UTF-16, and says so in its first bytes.
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path}: not UTF-8 text; save it as UTF-8") from error


def _json_records(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects and their places: of one list, or one a line."""
    lines = [(text, f"{path}")] if path.suffix == ".json" else _lines(text, path)
    for line, where in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); mend it") from error
        for number, record in enumerate(value if isinstance(value, list) and path.suffix == ".json" else [value]):
            place = f"{where}, object {number + 1}" if path.suffix == ".json" else where
            if not isinstance(record, dict):
                raise UserError(f"{place}: needs an object with a text under prompt")
            yield record, place


def _lines(text: str, path: Path) -> list[tuple[str, str]]:
    return [(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _csv_records(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows by the first line's names, and their places."""
    rows = _csv_rows(text, path)
    header = [name.strip() for name in rows[0][0]] if rows else []
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns of one name in its first line; rename one")
    for row, where in rows[1:]:
        if len(row) != len(header):
            fields = f"{len(row)} fields where the first line has {len(header)}"
            raise UserError(f"{where}: has {fields}; put texts with separators in quotes")
        yield dict(zip(header, row, strict=True)), where


def _csv_rows(text: str, path: Path) -> list[tuple[list[str], str]]:
    """Rows with their places, by whichever separator makes a column of prompts out of the first line.

    Fields between tabs are often written without any quoting; where that of Excel does not fit, they are.
    """
    first = text.lstrip("\r\n").split("\n", 1)[0]
    separators = ("\t", ",", ";") if path.suffix == ".tsv" else (",", ";", "\t")
    counts = {
        each: len({name.strip(' "\r').lower() for name in first.split(each)} & {*PROMPT_COLUMNS, *FILE_COLUMNS})
        for each in separators
    }
    separator = max(separators, key=lambda each: counts[each])
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
        try:
            return [(row, f"{path}:{reader.line_num}") for row in reader if any(field.strip() for field in row)]
        except csv.Error as error:
            if separator != "\t" or quoting == csv.QUOTE_NONE:
                raise UserError(f"{path}:{reader.line_num}: {error}; mend its quotes") from error
    raise AssertionError("one of the two returned")
