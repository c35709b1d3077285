"""Made-up comparisons whose true effects are known. Nothing here was measured; the preset says "synthetic"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dgpo_bench.pictures import PICTURES_FILE, Pictures, write_pictures
from dgpo_bench.records import (
    Budget,
    CellRecord,
    Checkpoint,
    EntryRecord,
    MetricRecord,
    PromptRecord,
    PromptSetRecord,
    Results,
    Sampling,
    TaskRecord,
    Trial,
    write_record,
)
from dgpo_bench.report.comparison import Comparison, comparison_of

METRICS = {
    "accuracy": MetricRecord(
        label="Accuracy", description="A made-up share.", better="higher", relation="trained", version="1"
    ),
    "taste": MetricRecord(
        label="Taste",
        description="A made-up taste.",
        better="higher",
        relation="untrained",
        version="1",
        weights="ab12",
    ),
    "cousin": MetricRecord(
        label="Cousin", description="It learnt from the same data.", better="higher", relation="same data", version="2"
    ),
    "diversity": MetricRecord(
        label="Diversity", description="A made-up distance.", better="none", relation="statistic", version="1"
    ),
    "judge": MetricRecord(
        label="Judge",
        description="A made-up judge.",
        better="higher",
        relation="untrained",
        version="1",
        missing="no server at 127.0.0.1:1",
    ),
}
GUIDANCES = (1.0, 3.0, 4.5)
Curve = Sequence[float]


@dataclass
class World:
    """What is true of a made-up comparison.

    Attributes:
        curves: {(entry, seed): in-domain headline at each checkpoint}, the first one the base's.
        shift: how far out-of-domain prompts lie above in-domain ones.
        noise: standard deviation of a picture around the truth; the same draws for everybody (they are paired).
        own: standard deviation of what each cell adds to a picture of its own.
        base: the base at each guidance.
    """

    curves: Mapping[tuple[str, int], Curve]
    shift: float = 0.1
    noise: float = 0.0
    own: float = 0.0
    base: Mapping[float, float] = field(default_factory=lambda: {1.0: 0.3, 3.0: 0.4, 4.5: 0.35})
    tags: Mapping[str, int] = field(default_factory=lambda: {"one": 6, "two": 6, "rare": 2})
    images: int = 2
    step: float = 10.0


def synthetic(world: World, **changes: Any) -> Comparison:
    """Records and pictures of a world, as a comparison."""
    results = records(world, **changes)
    return comparison_of(results, pictures_of(results, world), Path("made-up") / PICTURES_FILE)


def records(world: World, **changes: Any) -> Results:
    """The records alone; a checkpoint every ``step`` seconds, at 7 denoiser evaluations and 1e9 FLOPs a second."""
    names = list(dict.fromkeys(entry for entry, _ in world.curves))
    prompts = [PromptRecord(text=f"{tag} {i}", tag=tag) for tag, count in world.tags.items() for i in range(count)]
    roles = {"validation": "validation", "held-out": "in_domain", "unseen": "out_of_domain"}
    cells = [
        CellRecord(
            entry=entry,
            seed=seed,
            status="done",
            checkpoints=[checkpoint(i, i * world.step) for i in range(len(curve))],
            guidance=3.0,
            peak_memory=2**30,
            evaluation_seconds=5.0,
        )
        for (entry, seed), curve in world.curves.items()
    ]
    fields: dict[str, Any] = {
        "created": "2025-01-01T00:00:00Z",
        "command": "dgpo-bench compare synthetic",
        "preset": "synthetic",
        "git_hash": None,
        "packages": {"made-up": "1.0"},
        "machine": {"processor": "imaginary"},
        "task": TaskRecord(
            name="made-up", version=1, headline="accuracy", prompts_per_tag=6, thresholds=[0.45, 0.55, 0.7]
        ),
        "sampling": Sampling(
            sampler="euler", steps=10, guidance=3.0, guidances=list(GUIDANCES), precision="float32", width=8, height=8
        ),
        "budget": Budget(size="made-up", evaluations=280),
        "seeds": list(dict.fromkeys(seed for _, seed in world.curves)),
        "challenger": names[0] if names else "dgpo",
        "entries": {
            name: EntryRecord(label=name.upper(), color=color, settings={"algorithm": {"name": name, "beta": i}})
            for i, (name, color) in enumerate(
                zip(names or ["dgpo"], ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=False)
            )
        },
        "metrics": METRICS,
        "sets": {
            name: PromptSetRecord(role=role, prompts=prompts, images_per_prompt=world.images)
            for name, role in roles.items()
        },
        "base_guidance": 3.0,
        "cells": cells,
        "trials": [
            Trial(entry=name, number=i, settings={"beta": i}, value=0.1 * i, denoiser_evaluations=100)
            for name in names
            for i in range(3)
        ],
        "ranges": {name: {"algorithm.beta": [0, 2]} for name in names},
        "complete": True,
    }
    return Results(**{**fields, **changes})


def checkpoint(index: int, seconds: float) -> Checkpoint:
    """What the n-th checkpoint had cost."""
    return Checkpoint(
        iteration=index,
        steps=2 * index,
        denoiser_evaluations=round(7 * seconds),
        flops=1e9 * seconds,
        images_scored=4 * index,
        seconds={"rollout": seconds * 0.75, "training": seconds * 0.25},
        drift=0.01 * index,
    )


def pictures_of(results: Results, world: World) -> Pictures:
    """The pictures' table: a picture's score is its cell's truth plus what its prompt and noise add for everybody."""
    parts = []
    truths: list[tuple[str, int, int, float, float]] = [
        ("base", -1, 0, guidance, truth) for guidance, truth in world.base.items()
    ]
    for (entry, seed), curve in world.curves.items():
        truths += [(entry, seed, i, 3.0, truth) for i, truth in enumerate(curve) if i]
        if len(curve) > 1:
            truths += [(entry, seed, len(curve) - 1, guidance, curve[-1] - 0.05) for guidance in (1.0, 4.5)]
    known = {(cell.entry, cell.seed) for cell in results.cells if cell.status == "done"} | {("base", -1)}
    for name, prompts in results.sets.items():
        shape = len(prompts.prompts), prompts.images_per_prompt
        common = np.random.default_rng(len(name)).normal(0, 1, shape) * world.noise
        for entry, seed, index, guidance, truth in truths:
            if (entry, seed) in known:
                own = np.random.default_rng([seed + 1, index, len(entry)]).normal(0, 1, shape) * world.own
                score = truth + (world.shift if prompts.role == "out_of_domain" else 0.0) + common + own
                parts.append((entry, seed, index, guidance, name, score))
    return _table(parts)


def _table(parts: Sequence[tuple[str, int, int, float, str, Any]]) -> Pictures:
    columns: dict[str, list[Any]] = {key: [] for key in ("entry", "seed", "checkpoint", "guidance", "set")}
    prompt, image, scores = [], [], []
    for *keys, score in parts:
        for key, item in zip(columns, keys, strict=True):
            columns[key] += [item] * score.size
        rows = np.indices(score.shape).reshape(2, -1)
        prompt += rows[0].tolist()
        image += rows[1].tolist()
        scores += score.ravel().tolist()
    score = np.array(scores, dtype=np.float64)
    return Pictures(
        entry=np.array(columns["entry"], dtype=np.str_),
        seed=np.array(columns["seed"], dtype=np.int64),
        checkpoint=np.array(columns["checkpoint"], dtype=np.int64),
        guidance=np.array(columns["guidance"], dtype=np.float64),
        set=np.array(columns["set"], dtype=np.str_),
        prompt=np.array(prompt, dtype=np.int64),
        image=np.array(image, dtype=np.int64),
        metrics={"accuracy": score, "taste": 5 - score, "cousin": score / 2, "diversity": 1 - score / 2},
    )


def write_synthetic(folder: Path, world: World, **changes: Any) -> Results:
    """A results folder, with a gallery picture for each checkpoint of seed 0."""
    results = records(world, **changes)
    galleries = {"base": ["base.png"]}
    for (entry, seed), curve in world.curves.items():
        if seed == 0 and len(curve) > 1:
            galleries[entry] = [f"{entry}-{i}.png" for i in range(len(curve))]
    for names in galleries.values():
        for i, name in enumerate(names):
            Image.fromarray(np.full((4, 8, 3), 40 * i, dtype=np.uint8)).save(folder / name)
    if "galleries" not in changes:
        results = results.model_copy(update={"galleries": galleries, "gallery_prompts": ["a <red> circle", "two & 3"]})
    write_record(results, folder / "results.json")
    write_pictures(pictures_of(results, world), folder / PICTURES_FILE)
    return results
