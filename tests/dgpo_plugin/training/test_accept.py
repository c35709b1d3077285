"""``dgpo resume RUN --accept ...``: what differs is listed with the flag that accepts it, and kept where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from dgpo_plugin.adapters.card import AdapterCard
from dgpo_plugin.adapters.load import read_adapter
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.base_identity import PartIdentity
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.training import run
from dgpo_plugin.training.accept import ACCEPTABLE, parts_named, refuse_misfit
from dgpo_plugin.training.checkpoint import checkpoints, load_checkpoint
from dgpo_plugin.training.identity import RunIdentity, check_same_run
from tests.conftest import SMALL

pytestmark = pytest.mark.fast

OWN = "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"
CHECKPOINT = Path("run/checkpoints/000010")


def identity(*changes: str, denoiser: str = "b" * 64, **hashes: str) -> RunIdentity:
    config = load_config("shapes", [*SMALL, "training.decay=none", *changes]).model_dump(mode="json")
    contents = {"prompts_sha256": "c" * 64, "rewards_sha256": "", **hashes}
    return RunIdentity(config=config, base={"transformer": PartIdentity(digest=denoiser)}, packages={}, **contents)


# ---- what differs, what accepts it, what never needed to be accepted

DIFFERENT: dict[str, tuple[str, RunIdentity, list[str]]] = {
    "mended prompts": ("prompts", identity(prompts_sha256="d" * 64), ["c" * 12, "d" * 12]),
    "other held-out prompts": ("prompts", identity(held_out_sha256="d" * 64), ["the held-out prompts", "d" * 12]),
    "a reward's file": ("reward", identity(rewards_sha256="e" * 64), ["none then", "e" * 12]),
    "another reward": ("reward", identity("rewards={brightness: 1}"), ["rewards.shapes.weight", "rewards.brightness"]),
    "its weight": ("reward", identity("rewards={shapes: 2}"), ["rewards.shapes.weight is 2.0", "trained with 1.0"]),
    "its options": ("reward", identity("rewards={shapes: {options: {a: 1}}}"), ["rewards.shapes.options.a is 1"]),
    "how they are summed": ("reward", identity("scoring.aggregate=advantages"), ["scoring.aggregate"]),
    "a base": ("model", identity(denoiser="f" * 64), ["base's transformer", "b" * 12, "f" * 12]),
    "a learning rate": ("training", identity("training.learning_rate=1e-4"), ["training.learning_rate"]),
    "a group size": ("training", identity("training.group_size=6"), ["training.group_size is 6"]),
    "a KL weight": ("algorithm", identity("algorithm.kl_weight=0.5"), ["algorithm.kl_weight"]),
    "rollout steps": ("rollout", identity("rollout.steps=6"), ["rollout.steps is 6"]),
    "evaluation pictures": ("evaluation", identity("evaluation.images=4"), ["evaluation.images is 4"]),
    "alpha": ("lora", identity("lora.alpha=64"), ["lora.alpha"]),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_refusal_names_old_new_and_the_very_flag(case: str) -> None:
    part, now, named = DIFFERENT[case]
    with pytest.raises(UserError) as raised:
        check_same_run(identity(), now, CHECKPOINT, 10)
    said = str(raised.value)
    assert said.endswith(
        f", start a new run with `dgpo train`, or go on with it knowingly: dgpo resume run --accept {part}"
    )
    assert all(name in said for name in named)
    assert "\n" not in said
    (accepted, *_) = check_same_run(identity(), now, CHECKPOINT, 10, parts_named([part]))
    assert accepted.part == part
    for other in set(ACCEPTABLE) - {part}:
        with pytest.raises(UserError, match=f"--accept .*{part}"):
            check_same_run(identity(), now, CHECKPOINT, 10, [other])


def test_all_that_differs_is_told_at_once() -> None:
    now = identity("rollout.steps=6", prompts_sha256="d" * 64, rewards_sha256="e" * 64)
    with pytest.raises(
        UserError, match=r"rollout.steps.*the prompts.*the reward's file.*--accept prompts,reward,rollout$"
    ):
        check_same_run(identity(), now, CHECKPOINT, 10)
    with pytest.raises(UserError) as raised:
        check_same_run(identity(), now, CHECKPOINT, 10, ["rollout"])
    assert "rollout.steps" not in str(raised.value), "that one was accepted"
    assert str(raised.value).endswith("--accept prompts,reward,rollout")
    assert len(check_same_run(identity(), now, CHECKPOINT, 10, ["rollout", "prompts", "reward"])) == 3


FREE = [
    ["scoring.on_failure=skip"],
    ["scoring.max_skipped=0.5"],
    ["scoring.retries=7", "scoring.timeout=60"],
    ["rewards={shapes: {weight: 1, retries: 5}}"],
    ["rewards={shapes: {weight: 1, timeout: 30}}"],
    ["rewards={shapes: {weight: 1, on_failure: skip}}"],
    ["logging.sample_every=0", "checkpoint.every=3"],
]


@pytest.mark.parametrize("changes", FREE)
def test_how_patient_a_run_is_may_change_without_a_word(changes: list[str]) -> None:
    assert check_same_run(identity(), identity(*changes), CHECKPOINT, 10) == []
    assert check_same_run(identity(*changes), identity(), CHECKPOINT, 10) == []


def test_an_option_of_that_name_is_the_rewards_own() -> None:
    now = identity("rewards={shapes: {options: {timeout: 3}}}")
    with pytest.raises(UserError, match=r"rewards.shapes.options.timeout is 3"):
        check_same_run(identity(), now, CHECKPOINT, 10)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["prompts"], {"prompts"}),
        (["prompts,reward"], {"prompts", "reward"}),
        (["prompts", "reward"], {"prompts", "reward"}),
        (["prompts, reward,", "model"], {"prompts", "reward", "model"}),
        ([], set()),
        ([""], set()),
    ],
)
def test_parts_are_named_with_commas_or_one_by_one(given: list[str], parts: set[str]) -> None:
    assert parts_named(given) == parts


def test_a_part_that_is_none_is_refused_with_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--accept prompt: there is no such part of a run; did you mean 'prompts'\?"):
        parts_named(["reward,prompt"])
    asked = CliRunner().invoke(main, ["resume", str(tmp_path), "--accept", "everything"])
    assert asked.exit_code == 2
    assert "known: model, lora, prompts, pairs, reward, rollout, algorithm, training, evaluation" in asked.output


def test_tensors_without_a_place_are_refused_whatever_is_accepted() -> None:
    saved = {"policy": {"a": torch.zeros(2, 3)}}
    refuse_misfit(saved, {"policy": {"a": torch.ones(2, 3)}}, CHECKPOINT)
    with pytest.raises(UserError, match=r"policy/a has shape \(2, 3\) there and \(4, 3\) now, so the adapter does not"):
        refuse_misfit(saved, {"policy": {"a": torch.zeros(4, 3)}}, CHECKPOINT)
    with pytest.raises(UserError, match=r"old/a has shape none there and \(2, 3\) now"):
        refuse_misfit(saved, {**saved, "old": saved["policy"]}, CHECKPOINT)


# ---- a run


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., Path]:
    """A run of one iteration, to be made longer, on a prompt file and a reward of one's own."""
    lines = [json.dumps({"prompt": p.text, **p.metadata}) for p in load_prompts("shapes/train")[:9]]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.py").write_text(OWN)

    def start(*changes: str) -> Path:
        own = [f"prompts.train={tmp_path / 'mine.jsonl'}", f"rewards={tmp_path / 'mine.py'}:brightness"]
        fixed = ["training.iterations=1", "training.decay=none", "checkpoint.every=1", "logging.sample_every=0"]
        config = load_config("shapes", [*SMALL, *own, *fixed, *changes])
        return run.train(config, tmp_path / "run", Console(quiet=True)).parent

    return start


def state(folder: Path) -> dict[str, Any]:
    return json.loads((checkpoints(folder)[-1] / "state.json").read_text())


def test_mended_prompts_and_a_mended_reward_go_on_and_are_kept(
    started: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = started(), None
    before = read_adapter(folder / "adapter.safetensors").header["dgpo.reward_before"]
    lines = (tmp_path / "mine.jsonl").read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:8]))
    (tmp_path / "mine.py").write_text(OWN.replace("images.mean", "10 + images.mean"))
    was = load_checkpoint(checkpoints(folder)[-1]).identity
    with pytest.raises(UserError, match=rf"dgpo resume {folder} --accept prompts,reward$"):
        run.resume(folder, Console(quiet=True), iterations=2)
    adapter = run.resume(folder, Console(width=300), iterations=2, accept=["prompts,reward"])
    said = capsys.readouterr().out
    now = load_checkpoint(checkpoints(folder)[-1]).identity
    hashes = [
        ("prompts", was.prompts_sha256, now.prompts_sha256),
        ("reward's file", was.rewards_sha256, now.rewards_sha256),
    ]
    assert all(old != new for _, old, new in hashes)
    kept = state(folder)["progress"]["accepted"]
    assert kept == [{"iteration": 1, "what": w, "before": old, "now": new} for w, old, new in hashes]
    card = AdapterCard.of(read_adapter(adapter))
    for what, old, new in hashes:
        told = f"{what} after iteration 1: {old[:12]} -> {new[:12]}"
        assert told in card.accepted
        assert f"accepted: {told}" in said
    # The base is measured anew, or the card would compare what was measured with two rewards.
    assert float(before) < 1
    assert float(card.reward_before.split()[0]) > 10
    # From the next checkpoint on it is this run; what was accepted stays.
    again = run.resume(folder, Console(quiet=True), iterations=3)
    assert state(folder)["progress"]["accepted"] == kept
    assert AdapterCard.of(read_adapter(again)).accepted == card.accepted


def test_without_a_difference_nothing_is_kept_and_no_bit_changes(started: Callable[..., Path], tmp_path: Path) -> None:
    folder = started()
    plain = run.resume(folder, Console(quiet=True), iterations=2).read_bytes()
    for path in checkpoints(folder)[1:]:
        (path / "state.json").unlink()
        (path / "state.safetensors").unlink()
        path.rmdir()
    adapter = run.resume(folder, Console(quiet=True), iterations=2, accept=["prompts", "reward"])
    assert state(folder)["progress"]["accepted"] == []
    card = AdapterCard.of(read_adapter(adapter))
    assert card.accepted == "-"
    first, second = plain, adapter.read_bytes()
    assert len(first) == len(second)


def test_a_setting_is_kept_with_its_values_and_without_folders(started: Callable[..., Path], tmp_path: Path) -> None:
    folder = started()
    moved = tmp_path / "jane doe" / "other.jsonl"
    moved.parent.mkdir()
    moved.write_text("\n".join((tmp_path / "mine.jsonl").read_text().splitlines()[1:]))
    config = load_config(str(folder / "config.yaml"))
    changed: RunConfig = config.model_copy(
        update={
            "prompts": config.prompts.model_copy(update={"train": str(moved)}),
            "training": config.training.model_copy(update={"learning_rate": 1e-4}),
        }
    )
    (folder / "config.yaml").write_text(json.dumps(changed.model_dump(mode="json")))
    adapter = run.resume(folder, Console(quiet=True), iterations=2, accept=["prompts", "training"])
    card = AdapterCard.of(read_adapter(adapter))
    assert "training.learning_rate after iteration 1: 0.003 -> 0.0001" in card.accepted
    assert "prompts after iteration 1: " in card.accepted  # another file of the same content would be no change
    assert str(tmp_path) not in card.accepted
    assert "doe/" not in card.accepted


def test_another_rank_does_not_fit(started: Callable[..., Path]) -> None:
    folder = started("lora.rank=4")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("rank: 4", "rank: 8"))
    with pytest.raises(UserError, match="so the adapter does not fit, accepted or not; start a new run"):
        run.resume(folder, Console(quiet=True), iterations=2, accept=["lora"])
