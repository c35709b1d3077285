"""Metrics of pictures that are made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_bench.measures import diversity, load_measures, try_measures
from dgpo_bench.task import Task
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.rewards.image_statistics import diversity as of_groups
from dgpo_plugin.rewards.image_statistics import sharpness

pytestmark = pytest.mark.fast

A, B = Prompt("a"), Prompt("b")


def task(folder: Path, body: str = "return images.mean((1, 2, 3))", **metric: object) -> Task:
    (folder / "mine.py").write_text(f"def mine(images, prompts):\n    {body}\n")
    return Task.model_validate(
        {
            "name": "tiny",
            "version": 1,
            "prompts": {"train": "a.txt", "validation": "b.txt", "test": "c.txt"},
            "rewards": "brightness",
            "metrics": {"own": {"reward": f"{folder}/mine.py:mine", **metric}},
            "in_domain": [{"metric": "brightness"}, {"metric": "own"}],
        }
    )


def test_diversity_is_a_pictures_mean_distance_to_the_others_of_its_prompt() -> None:
    pictures = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 0.3, 0.9, 0.5, 0.1, 0.6)])
    found = diversity(pictures, [A, A, A, B, A, A])
    np.testing.assert_allclose(found[:3], [(0.3 + 0.9) / 2, (0.3 + 0.6) / 2, (0.9 + 0.6) / 2], atol=1e-6)
    assert np.isnan(found[3])
    np.testing.assert_allclose(found[4:], [0.5, 0.5], atol=1e-6)


def test_its_mean_over_a_group_is_the_groups_diversity() -> None:
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert diversity(pictures, [A] * 4).mean() == pytest.approx(of_groups(pictures[None].numpy()), rel=1e-5)


def test_every_metric_is_one_number_a_picture(tmp_path: Path) -> None:
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    measures = load_measures(task(tmp_path, at_least=0.5), ScoringConfig(), {})
    values = {name: measure.compute(pictures, [A, A, B, B]) for name, measure in measures.items()}
    assert {value.shape for value in values.values()} == {(4,)}
    np.testing.assert_array_equal(values["own"], pictures.mean((1, 2, 3)).numpy() >= 0.5)
    np.testing.assert_allclose(values["sharpness"], sharpness(pictures.numpy()), rtol=1e-6)
    better = {name: measure.record.better for name, measure in measures.items()}
    assert better.pop("own") == better.pop("brightness") == "higher"  # the one is trained on
    assert set(better.values()) == {"none"}


def test_a_files_metric_has_its_content_for_a_version(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, same = (load_measures(task(tmp_path), ScoringConfig(), {})["own"].record.version for _ in range(2))
    other = load_measures(task(tmp_path / "b", "return images.mean((1, 2, 3)) / 2"), ScoringConfig(), {})
    strict = load_measures(task(tmp_path, at_least=0.5), ScoringConfig(), {})
    versions = [one, other["own"].record.version, strict["own"].record.version]
    assert same == one
    assert len(set(versions)) == 3


def test_a_metric_that_cannot_judge_even_noise_is_found_out(tmp_path: Path) -> None:
    broken = load_measures(task(tmp_path, "raise RuntimeError('no model')"), ScoringConfig(), {})
    prompts = {name: [A] for name in broken}
    assert list(try_measures(broken, prompts, (8, 8))) == ["own"]
    nothing = load_measures(task(tmp_path, "return images.mean((1, 2, 3)) * float('nan')"), ScoringConfig(), {})
    assert "not finite" in try_measures(nothing, prompts, (8, 8))["own"]


def test_an_optional_metric_that_is_not_there_says_why_and_no_other_may(tmp_path: Path) -> None:
    away = {"reward": str(tmp_path / "away.py:mine")}
    measures = load_measures(task(tmp_path, **away, optional=True), ScoringConfig(), {}, missing={"own": "no server"})
    assert measures["own"].record.missing == "no server"
    with pytest.raises(UserError, match="task tiny, metric own: .*"):
        load_measures(task(tmp_path, **away), ScoringConfig(), {})
