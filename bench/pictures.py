"""The pictures' table: a row for every picture that a comparison looked at, with every metric, compressed.

A CSV that any program reads (``pandas.read_csv("pictures.csv.gz")``). The same rows give the same bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.files import atomic_path, read_bytes

PICTURES_FILE = "pictures.csv.gz"
KEYS = ("entry", "seed", "checkpoint", "guidance", "set", "prompt", "image")
"""What says which picture a row is of; the other columns are metrics."""
HASH = "sha256"
"""The column, after those, of the files of pictures that were kept; it is there where any was."""


@dataclass(frozen=True)
class Pictures:
    """R pictures as columns.

    Attributes:
        entry: (R,) of str; ``base`` for the untrained base.
        seed: (R,) of int; -1 for the base.
        checkpoint: (R,) of int; an index into the cell's checkpoints, 0 for the base.
        guidance: (R,) of float.
        set: (R,) of str; a prompt set of the comparison.
        prompt: (R,) of int; which of the set's.
        image: (R,) of int; which of the prompt's, and so from which noise.
        metrics: (R,) of float each, by name; NaN where it was not measured.
        sha256: (R,) of str, of the file that the picture was kept in; empty where it was not; None where none was.
    """

    entry: NDArray[np.str_]
    seed: NDArray[np.int64]
    checkpoint: NDArray[np.int64]
    guidance: NDArray[np.float64]
    set: NDArray[np.str_]
    prompt: NDArray[np.int64]
    image: NDArray[np.int64]
    metrics: Mapping[str, NDArray[np.float64]]
    sha256: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.entry)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Pictures:
        """The rows at which ``chosen``, (R,), is true, in order; or those that it numbers, in its order."""
        keys = {key: column[chosen] for key, column in self._keys().items()}
        metrics = {name: column[chosen] for name, column in self.metrics.items()}
        return Pictures(**keys, metrics=metrics, sha256=None if self.sha256 is None else self.sha256[chosen])

    def of(
        self, entry: str, seed: int, set_name: str, *, checkpoint: int | None = None, guidance: float | None = None
    ) -> Pictures:
        """One cell's pictures of one prompt set, in the order of prompt and image; None for any."""
        chosen = (self.entry == entry) & (self.seed == seed) & (self.set == set_name)
        if checkpoint is not None:
            chosen &= self.checkpoint == checkpoint
        if guidance is not None:
            chosen &= self.guidance == guidance
        found = self.where(chosen)
        order = np.lexsort((found.image, found.prompt, found.guidance, found.checkpoint))
        return found.where(order)

    def kept(self) -> NDArray[np.intp]:
        """The numbers of the rows whose picture was kept, rising."""
        return np.flatnonzero(self.sha256 != "") if self.sha256 is not None else np.empty(0, dtype=np.intp)

    def _keys(self) -> dict[str, NDArray]:  # type: ignore[type-arg]
        return {
            "entry": self.entry,
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "guidance": self.guidance,
            "set": self.set,
            "prompt": self.prompt,
            "image": self.image,
        }


def join(tables: Iterable[Pictures]) -> Pictures:
    """Several tables one below the other; a metric that one lacks is NaN there."""
    parts = list(tables)
    names = list(dict.fromkeys(name for part in parts for name in part.metrics))
    keys = {key: np.concatenate([part._keys()[key] for part in parts]) for key in KEYS}  # noqa: SLF001
    metrics = {
        name: np.concatenate([part.metrics.get(name, np.full(len(part), math.nan)) for part in parts]) for name in names
    }
    kept = any(part.sha256 is not None for part in parts)
    none = [np.full(len(part), "") if part.sha256 is None else part.sha256 for part in parts]
    return Pictures(**keys, metrics=metrics, sha256=np.concatenate(none) if kept else None)


def write_pictures(pictures: Pictures, path: Path) -> None:
    """Write the table, whole or not at all; numbers read back are equal to the last bit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kept = [] if pictures.sha256 is None else [pictures.sha256]
    writer.writerow([*KEYS, *([HASH] if kept else []), *pictures.metrics])
    columns = [column.tolist() for column in (*pictures._keys().values(), *kept, *pictures.metrics.values())]  # noqa: SLF001
    for row in zip(*columns, strict=True):
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in row])
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def read_pictures(path: Path) -> Pictures:
    """A table that :func:`write_pictures` wrote.

    Raises:
        UserError: it is missing, damaged, or holds what is no number.
    """
    try:
        text = gzip.decompress(read_bytes(path)).decode()
    except OSError as error:
        raise UserError(f"pictures {path}: {error.strerror or 'not a gzip file'}; run the comparison again") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"pictures {path}: damaged ({error}); run the comparison again") from error
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0][: len(KEYS)]) != KEYS or any(len(row) != len(rows[0]) for row in rows):
        raise UserError(f"pictures {path}: is no table of pictures; run the comparison again")
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True) if rows[1:] else [()] * len(rows[0]), strict=True))
    try:
        return Pictures(
            entry=np.array(columns["entry"], dtype=np.str_),
            seed=_numbers(columns["seed"], np.int64),
            checkpoint=_numbers(columns["checkpoint"], np.int64),
            guidance=_numbers(columns["guidance"], np.float64),
            set=np.array(columns["set"], dtype=np.str_),
            prompt=_numbers(columns["prompt"], np.int64),
            image=_numbers(columns["image"], np.int64),
            metrics={name: _numbers(columns[name], np.float64) for name in rows[0][len(KEYS) :] if name != HASH},
            sha256=np.array(columns[HASH], dtype=np.str_) if HASH in columns else None,
        )
    except ValueError as error:
        raise UserError(f"pictures {path}: {error}; run the comparison again") from error


def _numbers(column: Sequence[str], kind: type) -> NDArray:  # type: ignore[type-arg]
    numbers = np.array([math.nan if value == "" else float(value) for value in column], dtype=np.float64)
    if kind is np.int64 and not np.array_equal(numbers, np.round(numbers)):
        raise ValueError("a count that is no whole number")
    if np.isinf(numbers).any():
        raise ValueError("a number that is not finite")
    return numbers.astype(kind)
