"""Runs that learn from preferred pairs: what is drawn, gone on with, measured and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from dgpo_plugin.adapters.load import read_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import load_checkpoint, save_checkpoint
from dgpo_plugin.training.plan import make_plan
from dgpo_plugin.training.run_folder import RunFolder
from tests.dgpo_plugin.algorithm_cases import config_for, pairs_folder

pytestmark = pytest.mark.fast

QUIET = ("logging.sample_every=0", "evaluation.images=2")


def test_every_pair_is_drawn_once_an_epoch() -> None:
    trainer = build_trainer(config_for("diffusion-dpo", *QUIET))
    assert trainer.pairs is not None
    drawn = [row for iteration in range(2) for row in trainer.groups.rows(iteration)]
    assert sorted(drawn) == [0, 1, 2, 3]
    assert [pair.prompt for pair in trainer.pairs.train] == trainer.groups.prompts


def test_a_run_is_gone_on_with_to_the_same_bits(tmp_path: Path) -> None:
    config = config_for("diffusion-dpo", *QUIET, "training.iterations=4", "training.ema_every=2")
    whole = build_trainer(config)
    records = whole.iterations()
    next(records), next(records)
    identity = run.identity_of(whole)
    path = save_checkpoint(tmp_path, identity, run.progress_of(whole), whole.state(), keep=1)
    rest = [record["loss"] for record in records]
    again, back = build_trainer(config), load_checkpoint(path)
    again.restore(back.tensors, back.progress.iteration, back.progress.steps)
    assert [record["loss"] for record in again.iterations()] == rest
    saved, found = (_flat(trainer.state()) for trainer in (whole, again))
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert "old" not in whole.state()


def _flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{copy}/{name}": tensor for copy, named in state.items() for name, tensor in named.items()}


def test_a_whole_run_with_held_out_pairs_and_a_judge(tmp_path: Path) -> None:
    """Its record, its adapter's card, and that other pairs are refused when it is gone on with."""
    pairs = tmp_path / "pairs"
    shutil.copytree(pairs_folder(), pairs)
    config = config_for(
        "diffusion-dpo",
        f"pairs.train={pairs}",
        f"pairs.held_out={pairs_folder(3)}",
        "evaluation.rewards=shapes",
        "logging.sample_every=2",
        "logging.sample_images=1",
        "evaluation.images=2",
    )
    console = Console(record=True, width=200)
    adapter = run.train(config, tmp_path / "run", console)
    told = console.export_text()
    records = RunFolder(tmp_path / "run").read_metrics()
    assert [("held_out_accuracy" in record, "reward" in record) for record in records] == [
        (False, False),
        (True, False),
    ]
    assert all(record["rollout_evaluations"] == 0 for record in records)
    assert 0 <= records[1]["held_out_accuracy"] <= 1
    assert "held-out reward of the base: " in told
    assert "accuracy on held-out pairs: 0.500 -> " in told
    assert "iteration    1  accuracy 50.0%" in told
    header = read_adapter(adapter).header
    assert header["modelspec.description"].startswith("diffusion-dpo on preferred pairs, 2 optimizer steps")
    assert "dgpo.reward_before" in header

    Image.new("RGB", (64, 64), (9, 9, 9)).save(pairs / "0-rejected.png")
    with pytest.raises(UserError, match=r"the preferred pairs are not those .* --accept pairs"):
        run.resume(tmp_path / "run", Console(quiet=True), iterations=3)


def test_a_run_that_nothing_measures_says_nothing_of_it(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    adapter = run.train(config_for("diffusion-dpo", *QUIET, "training.iterations=1"), tmp_path / "run", console)
    assert "reward" not in console.export_text()
    header = read_adapter(adapter).header
    assert header["dgpo.reward"] == "none"
    assert "dgpo.reward_before" not in header


def test_mistakes_of_both_sets_are_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgpo_plugin.training.build.load_base", lambda *_, **__: pytest.fail("loaded"))
    config = config_for("diffusion-dpo", f"pairs.train={tmp_path / 'gone'}", f"pairs.held_out={tmp_path}")
    with pytest.raises(
        UserError, match=r"pairs\.train: .*gone: no such file or folder.*; pairs\.held_out: .*holds neither"
    ):
        build_trainer(config)


def test_held_out_pairs_that_are_trained_on_are_not_called_held_out(caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(config_for("diffusion-dpo", *QUIET, f"pairs.held_out={pairs_folder()}"))
    assert "pairs.held_out: 4 of 4 pairs are in pairs.train too" in caplog.text
    assert trainer.held_out_pairs is not None
    assert trainer.held_out_pairs.called == "4 pairs, 4 trained on"
    base = trainer.held_out_pairs.measure(trainer.average_now())
    assert base == {"held_out_accuracy": 0.5, "held_out_margin": 0.0}


def test_a_plan_counts_the_pictures_way_in() -> None:
    plan = make_plan(config_for("diffusion-dpo"))
    assert plan.phases["encoding pictures"] > 0
    assert plan.images == 4
    assert plan.denoiser_evaluations == 4 * 8
    assert "encoding pictures" not in make_plan(config_for("online-dpo")).phases
