"""The files of a comparison, and what is said of others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgpo_bench.pictures import Pictures, join, read_pictures, write_pictures
from dgpo_bench.records import Results, read_results
from dgpo_plugin.common.errors import UserError

pytestmark = pytest.mark.fast


def record() -> dict[str, Any]:
    """The least that a comparison's results say."""
    metric = {"label": "Score", "description": "Made up.", "better": "higher", "relation": "trained", "version": "1"}
    checkpoint = {"iteration": 0, "steps": 0, "denoiser_evaluations": 0, "images_scored": 0, "seconds": {}}
    sampling = {"sampler": "euler", "steps": 2, "guidance": 1, "guidances": [1], "precision": "fp32"}
    return {
        "created": "2025-01-01T00:00:00Z",
        "command": "made up",
        "preset": "synthetic",
        "git_hash": None,
        "packages": {},
        "machine": {},
        "task": {"name": "made-up", "version": 1, "headline": "score"},
        "sampling": {**sampling, "width": 8, "height": 8},
        "budget": {"size": "made-up", "evaluations": 1},
        "seeds": [0],
        "challenger": "dgpo",
        "entries": {"dgpo": {"label": "DGPO", "color": "#D55E00", "settings": {}}},
        "metrics": {"score": metric},
        "sets": {"test": {"role": "in_domain", "prompts": [{"text": "a"}], "images_per_prompt": 1}},
        "cells": [{"entry": "dgpo", "seed": 0, "status": "done", "checkpoints": [checkpoint]}],
        "complete": True,
        "schema_version": 5,
    }


def damage(record: dict[str, Any], how: str) -> None:
    (cell,) = record["cells"]
    if how == "NaN drift":
        cell["checkpoints"][0]["drift"] = float("nan")
    elif how == "infinite seconds":
        cell["checkpoints"][0]["seconds"] = {"rollout": float("inf")}
    elif how == "twice":
        record["cells"].append(cell)
    elif how == "unknown entry":
        cell["entry"] = "elsewhere"
    elif how == "unknown seed":
        cell["seed"] = 9
    elif how == "a best of nowhere":
        cell["best"] = {"checkpoint": 1, "guidance": 1, "adapter": "best.safetensors"}
    elif how == "the base as the best":
        cell["best"] = {"checkpoint": 0, "guidance": 1, "adapter": "best.safetensors"}
    elif how == "wrong type":
        record["cells"] = "none"
    elif how == "another schema":
        record["schema_version"] = 4
    elif how == "no headline":
        record["task"]["headline"] = "other"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("NaN drift", r"cells\.0\.checkpoints\.0\.drift: .*finite number"),
        ("infinite seconds", r"seconds\.rollout: .*finite number"),
        ("twice", "cell dgpo, seed 0: stands there twice"),
        ("unknown entry", "cell elsewhere, seed 0: the comparison has no such entry or seed"),
        ("unknown seed", "cell dgpo, seed 9: the comparison has no such"),
        ("a best of nowhere", "cell dgpo, seed 0: its best checkpoint is none of its own"),
        ("the base as the best", r"cells\.0\.best\.checkpoint: .*greater than or equal to 1"),
        ("wrong type", "cells: must be a list"),
        ("another schema", "schema version 4, this program reads 5"),
        ("no headline", "'other' is not among the metrics"),
    ],
)
def test_results_that_mean_nothing_are_refused_in_one_line(how: str, message: str, tmp_path: Path) -> None:
    values = record()
    assert Results.model_validate(values).cells_of("dgpo")
    damage(values, how)
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as refused:
        read_results(tmp_path / "results.json")
    assert len(str(refused.value).splitlines()) == 1


def test_results_nested_without_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        read_results(tmp_path / "results.json")


def table(values: list[float], **metrics: list[float]) -> Pictures:
    count = len(values)
    whole, text = np.arange(count), np.array(["a,b"] * count)
    return Pictures(
        text, whole, whole, np.array(values), text, whole, whole, {name: np.array(m) for name, m in metrics.items()}
    )


def test_pictures_come_back_to_the_last_bit(tmp_path: Path) -> None:
    one, other = table([1.0, 1.5], m=[0.1 + 0.2, math.nan]), table([4.5], n=[1e-300])
    both = join([one, other])
    write_pictures(both, tmp_path / "p.csv.gz")
    first = (tmp_path / "p.csv.gz").read_bytes()
    read = read_pictures(tmp_path / "p.csv.gz")
    for name in ("m", "n"):
        np.testing.assert_array_equal(read.metrics[name], both.metrics[name])
    assert read.metrics["m"][0] == 0.1 + 0.2
    assert np.isnan(read.metrics["n"][:2]).all()
    assert list(read.entry) == ["a,b"] * 3
    write_pictures(read, tmp_path / "p.csv.gz")
    assert (tmp_path / "p.csv.gz").read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\x1f\x8b\x08\x00broken"])
def test_a_damaged_table_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.csv\.gz") as refused:
        read_pictures(tmp_path / "p.csv.gz")
    assert len(str(refused.value).splitlines()) == 1
