"""A comparison as the report reads it: records and pictures, checked against each other, and pictures found by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dgpo_plugin.common.errors import UserError

from ..pictures import KEYS, PICTURES_FILE, Pictures, read_pictures
from ..records import BASE, NO_SEED, RESULTS_FILE, CellRecord, Results, read_results
from .intervals import Array, headline_prompts

Role: TypeAlias = Literal["in_domain", "out_of_domain"]
Key: TypeAlias = tuple[str, int, str, int, float]
"""Entry, seed, set, checkpoint and guidance."""
Place: TypeAlias = tuple[str, int, int, float]
"""Entry, seed, checkpoint and guidance: where a set of pictures was sampled."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Records and pictures that belong together.

    Attributes:
        groups: the rows of the pictures' table for every cell, set, checkpoint and guidance.
    """

    results: Results
    pictures: Pictures
    groups: dict[Key, NDArray[np.int64]]

    def label(self, entry: str) -> str:
        """An entry's name for people."""
        return "Base" if entry == BASE else self.results.entries[entry].label

    @property
    def sign(self) -> float:
        """1 where more of the headline is better, -1 where less is."""
        return -1.0 if self.results.metrics[self.results.task.headline].better == "lower" else 1.0

    def scores(self, place: Place, set_name: str, metric: str, more: bool = False) -> Array:
        """What one cell's pictures of a set scored, (P, I), NaN where it was not measured.

        Args:
            more: with the pictures that the base has beyond those of every cell, for the best of N.
        """
        prompts, images = self.results.sets[set_name].prompts, self.results.sets[set_name].images_per_prompt
        entry, seed, checkpoint, guidance = place
        rows = self.groups.get((entry, seed, set_name, checkpoint, guidance), np.empty(0, dtype=np.int64))
        if more and len(rows):
            images = max(images, int(self.pictures.image[rows].max()) + 1)
        scores = np.full((len(prompts), images), np.nan)
        if metric in self.pictures.metrics:
            rows = rows[self.pictures.image[rows] < images]
            scores[self.pictures.prompt[rows], self.pictures.image[rows]] = self.pictures.metrics[metric][rows]
        return scores

    def sets_of(self, role: Role | Literal["validation"]) -> list[str]:
        """The names of the prompt sets with a role, in order."""
        return [name for name, prompts in self.results.sets.items() if prompts.role == role]

    def finished(self, entry: str) -> dict[int, Place]:
        """By seed, where an entry's last pictures are: at the guidance chosen for it; the base's under its one seed."""
        sampling = self.results.sampling
        if entry == BASE:
            chosen = self.results.base_guidance
            return {NO_SEED: (BASE, NO_SEED, 0, sampling.guidance if chosen is None else chosen)}
        places: dict[int, Place] = {}
        for seed, cell in self.results.cells_of(entry).items():
            if cell.checkpoints:
                guidance = sampling.guidance if cell.guidance is None else cell.guidance
                places[seed] = entry, seed, len(cell.checkpoints) - 1, guidance
        return places

    def best(self, entry: str) -> dict[int, Place]:
        """By seed, where the pictures of a cell's best checkpoint are, at its guidance; empty where none was kept."""
        cells = {} if entry == BASE else self.results.cells_of(entry)
        return {
            seed: (entry, seed, cell.best.checkpoint, cell.best.guidance)
            for seed, cell in cells.items()
            if cell.best is not None
        }

    def at_checkpoint(self, cell: CellRecord, checkpoint: int) -> Place:
        """Where the pictures of a curve's point are; the first point is the untrained base's, for every cell."""
        if checkpoint == 0:
            return BASE, NO_SEED, 0, self.results.sampling.guidance
        return cell.entry, cell.seed, checkpoint, self.results.sampling.guidance

    def counted(self, set_name: str) -> NDArray[np.bool_]:
        """Which prompts of a set count for the headline, (P,): all of them if no tag has enough."""
        tags = [prompt.tag for prompt in self.results.sets[set_name].prompts]
        chosen = headline_prompts(tags, self.results.task.prompts_per_tag)
        return chosen if chosen.any() else np.ones(len(tags), dtype=np.bool_)

    def measured(self, metric: str) -> bool:
        """Whether any picture carries the metric."""
        return metric in self.pictures.metrics and bool(np.isfinite(self.pictures.metrics[metric]).any())


def read_comparison(folder: Path) -> Comparison:
    """What ``results.json`` and ``pictures.csv.gz`` of a folder hold, checked against each other.

    Raises:
        UserError: one of them cannot be read, or they do not belong together.
    """
    results = read_results(folder / RESULTS_FILE)
    return comparison_of(results, read_pictures(folder / PICTURES_FILE), folder / PICTURES_FILE)


def comparison_of(results: Results, pictures: Pictures, path: Path) -> Comparison:
    """Records and pictures as one, after what neither file alone can tell was checked.

    Args:
        path: of the pictures, for messages.

    Raises:
        UserError: a row is of no cell, set, prompt or checkpoint of the comparison, stands there twice, or carries an
            unknown metric; the headline has no better direction; a cost falls between checkpoints.
    """
    _check_records(results)
    unknown = [name for name in pictures.metrics if name not in results.metrics]
    if unknown:
        raise UserError(f"pictures {path}: metric {unknown[0]!r} is none of the results'; {list(results.metrics)} are")
    _check_rows(results, pictures, path)
    groups: dict[Key, NDArray[np.int64]] = {}
    if len(pictures):
        codes = np.stack([np.unique(getattr(pictures, key), return_inverse=True)[1] for key in KEYS[:5]])
        order = np.lexsort(codes)
        starts = np.flatnonzero(np.r_[True, (np.diff(codes[:, order], axis=1) != 0).any(axis=0)])
        for rows in np.split(order, starts[1:]):
            groups[_key(pictures, int(rows[0]))] = rows
    for key, rows in groups.items():
        cells = pictures.prompt[rows] * (int(pictures.image.max()) + 1) + pictures.image[rows]
        if len(np.unique(cells)) != len(rows):
            raise UserError(f"pictures {path}: a picture of {key} stands there twice; run the comparison again")
    return Comparison(results, pictures, groups)


def _key(pictures: Pictures, row: int) -> Key:
    return (
        str(pictures.entry[row]),
        int(pictures.seed[row]),
        str(pictures.set[row]),
        int(pictures.checkpoint[row]),
        float(pictures.guidance[row]),
    )


def _check_records(results: Results) -> None:
    headline = results.metrics[results.task.headline]
    if headline.better == "none":
        raise UserError(
            f"results: the headline {results.task.headline!r} has no better direction; choose higher or lower"
        )
    if BASE in results.entries:
        raise UserError(f"results: an entry is called {BASE!r}, which is the untrained base's name; call it otherwise")
    if sorted(set(results.task.thresholds)) != results.task.thresholds:
        raise UserError(f"results: the thresholds {results.task.thresholds} do not rise")
    for cell in results.cells:
        for axis in ("steps", "denoiser_evaluations", "images_scored", "total_seconds"):
            costs = [getattr(point, axis) for point in cell.checkpoints]
            if costs != sorted(costs):
                raise UserError(f"results: cell {cell.entry}, seed {cell.seed}: {axis} falls between checkpoints")


def _check_rows(results: Results, pictures: Pictures, path: Path) -> None:
    """Raise if a row is of nothing that the results know."""
    known = {(cell.entry, cell.seed): len(cell.checkpoints) for cell in results.cells} | {(BASE, NO_SEED): 1}
    failed = {(cell.entry, cell.seed) for cell in results.cells if cell.status == "failed"}
    cells = np.array([f"{entry}\0{seed}" for entry, seed in zip(pictures.entry, pictures.seed, strict=True)])
    for name in np.unique(cells):
        entry, seed = name.split("\0")
        rows = cells == name
        if (entry, int(seed)) not in known:
            raise UserError(f"pictures {path}: entry {entry}, seed {seed} is no cell of the results")
        last = known[entry, int(seed)]
        if (entry, int(seed)) in failed:  # what it measured before it failed is kept, and not drawn
            continue
        if pictures.checkpoint[rows].min() < 0 or pictures.checkpoint[rows].max() >= last:
            raise UserError(f"pictures {path}: entry {entry}, seed {seed} has checkpoints 0 to {last - 1} alone")
    for name in np.unique(pictures.set):
        if name not in results.sets:
            raise UserError(f"pictures {path}: set {str(name)!r} is none of the results'; {list(results.sets)} are")
        rows, prompts = pictures.set == name, results.sets[name]
        cells = rows & (pictures.entry != BASE)  # the base may have more pictures, for the best of N
        beyond = pictures.image[cells].max(initial=0) >= prompts.images_per_prompt
        outside = pictures.prompt[rows].min() < 0 or pictures.prompt[rows].max() >= len(prompts.prompts)
        if beyond or outside or pictures.image[rows].min() < 0:
            raise UserError(f"pictures {path}: a prompt or image of set {str(name)!r} that the results do not have")


def missing_cells(results: Results) -> list[tuple[str, int]]:
    """The (entry, seed) of every cell that was planned and is not in the file."""
    present = {(cell.entry, cell.seed) for cell in results.cells}
    return [(entry, seed) for entry in results.entries for seed in results.seeds if (entry, seed) not in present]


def small_tags(comparison: Comparison, role: Role) -> Sequence[str]:
    """Tags of a role's sets that are shown but are not in the headline, in order."""
    found: dict[str, None] = {}
    for name in comparison.sets_of(role):
        prompts, counted = comparison.results.sets[name].prompts, comparison.counted(name)
        found |= {prompt.tag: None for prompt, counts in zip(prompts, counted, strict=True) if not counts}
    return list(found)
