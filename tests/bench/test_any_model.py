"""A task of one's own on other families' tiny pipelines, with stand-in rewards, from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dgpo_bench.base import measure_base
from dgpo_bench.cell import run_cell
from dgpo_bench.gather import gather
from dgpo_bench.pictures import PICTURES_FILE, read_pictures
from dgpo_bench.plan import Plan
from dgpo_bench.preset import load_preset
from tests.bench.test_cell import Ear
from tests.dgpo_plugin.families import FAMILIES
from tests.dgpo_plugin.models.test_families import settings

TASK = """
version: 1
prompts: {train: train.txt, validation: validation.txt, test: test.jsonl}
rewards: {task-score: {reward: "stand_in.py:red"}}
metrics:
  strict: {reward: "stand_in.py:red", at_least: 0.5}
  preference: {reward: "stand_in.py:blue"}
  served: {reward: remote, options: {urls: ["http://127.0.0.1:9"]}, optional: true}
in_domain: [{metric: task-score, by: kind}, {metric: strict}]
out_of_domain: [{prompts: other.txt, metrics: [preference, served]}]
sampling: {steps: 2, guidance: 1, guidances: [1, 2], images_per_prompt: 2}
"""
STAND_IN = """
def red(images, prompts):
    return images[:, 0].mean((1, 2))

def blue(images, prompts):
    return images[:, 2].mean((1, 2)) + 0.01 * (prompts[0].text == "a tower")
"""


@pytest.mark.fast
@pytest.mark.parametrize("name", ["flux", "sdxl", "sana"])
def test_a_task_runs_from_end_to_end(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    family.build(tmp_path / "pipeline")
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    for file, text in {"train.txt": "a cat\na dog\n", "validation.txt": "a hen\n", "other.txt": "a tower\n"}.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "test.jsonl").write_text('{"prompt": "a cow", "kind": "farm"}\n{"prompt": "a fox", "kind": "wood"}\n')
    size = {"evaluations": 150, "seeds": 1, "schedule": [0.4]}
    preset_values = {
        "description": "tiny",
        "task": "task.yaml",
        "shared": {
            "model": settings(family, tmp_path / "pipeline").model_dump(mode="json", exclude_defaults=True),
            "lora": {"rank": 2},
            "rollout": {"steps": 3},
            "training": {"prompts_per_iteration": 2, "group_size": 2, "learning_rate": 1e-2},
        },
        "algorithms": {
            "dgpo": {"algorithm": {"name": "dgpo", "timesteps": 1, "noisiest_steps": 2, "rollout_guidance": 1}}
        },
        "challenger": "dgpo",
        "sizes": dict.fromkeys(("quick", "default", "full"), size),
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(preset_values))
    preset, task = load_preset(str(tmp_path / "own.yaml"))
    plan = Plan.of("own", preset, task, "quick", preset.sized("quick"), ["dgpo"], jobs=1)
    measure_base(plan, tmp_path / "out")
    run_cell(plan, tmp_path / "out", "dgpo", 0, Ear())
    results, pictures = gather(plan, tmp_path / "out"), read_pictures(tmp_path / "out" / PICTURES_FILE)
    assert results.complete
    (cell,) = results.cells
    assert cell.guidance in (1, 2)
    assert cell.checkpoints[-1].flops
    relations = {metric: record.relation for metric, record in results.metrics.items()}
    assert [relations[each] for each in ("task-score", "strict", "preference")] == ["trained", "trained", "untrained"]
    assert "127.0.0.1:9" in results.metrics["served"].missing
    assert "served" not in pictures.metrics
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text().replace(
        results.metrics["served"].missing, ""
    )
    last = pictures.of("dgpo", 0, "test", checkpoint=len(cell.checkpoints) - 1, guidance=cell.guidance)
    assert len(last) == 4
    np.testing.assert_array_equal(last.metrics["strict"], last.metrics["task-score"] >= 0.5)
    assert np.isnan(last.metrics["preference"]).all()
    outside = pictures.of("base", -1, "other.txt", guidance=1)
    assert not np.isnan(outside.metrics["preference"]).any()
