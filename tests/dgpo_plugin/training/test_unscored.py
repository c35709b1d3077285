"""Runs in which some pictures cannot be scored: they go on without those, say so, and stop where it is too many."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dgpo_plugin.adapters.card import AdapterCard
from dgpo_plugin.adapters.load import read_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.rewards import RewardSet, WeightedReward, as_reward
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import checkpoints
from dgpo_plugin.training.unscored import HeldOutMean, held_out_mean, refuse_too_many, reward_record
from tests.conftest import SMALL, one_reward
from tests.dgpo_plugin.algorithm_cases import ALGORITHMS, config_for

pytestmark = pytest.mark.fast

NAN = math.nan
PROMPTS = [Prompt("a")] * 8


class NotEvery:
    """Gives every picture its mean, but for some of the pictures in the order that it is asked about them."""

    def __init__(self, *without: int, of: float = NAN) -> None:
        self.without, self.of, self.seen = without, of, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        means = images.mean((1, 2, 3))
        for n in range(len(images)):
            if self.seen + n in self.without:
                means[n] = self.of
        self.seen += len(images)
        return means


def scorer_of(reward: Callable[..., object], folder: Path | None = None) -> Scorer:
    return Scorer(one_reward(reward, on_failure="skip", retries=0), folder)


def scored(scorer: Scorer, count: int = 8) -> Tensor:
    return scorer.submit(torch.rand(count, 3, 4, 4), PROMPTS[:count]).result()[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_iteration_goes_on_without_a_picture(algorithm: str) -> None:
    """It learns from the others: the record is theirs, and the adapter moves."""
    config = config_for(algorithm, "training.iterations=1", "scoring.max_skipped=0.2")
    trainer = build_trainer(config, rewards=one_reward(NotEvery(2), on_failure="skip"))
    (record,) = trainer.iterations()
    assert record["skipped"] == 1 / 8
    assert math.isfinite(record["reward"])
    assert record["reward_group_std"] > 0
    assert record["grad_norm"] > 0
    assert all(bool(weight.isfinite().all()) for weight in trainer.policy.parameters.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_where_nothing_is_skipped_no_number_changes(algorithm: str) -> None:
    config = config_for(algorithm)
    records = [
        [
            {key: value for key, value in record.items() if "seconds" not in key}
            for record in build_trainer(config, rewards=one_reward(NotEvery(), on_failure=how)).iterations()
        ]
        for how in ("stop", "skip")
    ]
    assert records[0] == records[1]
    assert records[0][0]["skipped"] == 0


def test_the_record_is_of_the_scored_pictures() -> None:
    scores = torch.tensor([[[1.0, 10.0], [3.0, NAN], [5.0, 30.0]], [[2.0, 5.0], [NAN, 5.0], [NAN, NAN]]])
    members = {name: WeightedReward(as_reward(NotEvery())) for name in ("a", "b")}
    record = reward_record(scores, RewardSet(members))
    total = [11.0, 35.0, 7.0]
    assert record["reward"] == pytest.approx(sum(total) / 3)
    assert record["reward/a"] == pytest.approx(11 / 4)
    assert record["reward/b"] == pytest.approx(50 / 4)
    assert record["reward_group_std"] == pytest.approx((12 + 0) / 2)
    assert record["reward_group_std/a"] == pytest.approx(((8 / 3) ** 0.5 + 0) / 2)
    assert record["constant_groups"] == 0.5, "of the second group one picture has both"
    assert record["constant_groups/b"] == 0.5
    assert (record["skipped"], record["skipped/a"], record["skipped/b"]) == pytest.approx((3 / 6, 2 / 6, 2 / 6))


@pytest.mark.parametrize(
    ("without", "limit", "stops"), [(0, 0, False), (1, 0, True), (1, 0.1, True), (1, 0.125, False)]
)
def test_more_than_the_share_stops(without: int, limit: float, stops: bool, tmp_path: Path) -> None:
    scorer = scorer_of(NotEvery(*range(without)), tmp_path / "failed")
    scores = scored(scorer)
    if not stops:
        refuse_too_many(scores, scorer, 3, limit, Processes())
        return
    expected = (
        rf"iteration 3: 1 of 8 pictures could not be scored \(reward mine 1\), more than scoring.max_skipped {limit:g} "
        rf"allows; .*reward mine: nan is not finite.*are in {tmp_path / 'failed'}; mend the reward, or raise"
    )
    with pytest.raises(UserError, match=expected) as raised:
        refuse_too_many(scores, scorer, 3, limit, Processes())
    assert "\n" not in str(raised.value)
    assert (tmp_path / "failed" / "0000.png").exists()


def test_the_line_counts_by_reward() -> None:
    skip = ScoringConfig(on_failure="skip")
    members = {
        "a": WeightedReward(as_reward(NotEvery(0, 1)), scoring=skip),
        "b": WeightedReward(as_reward(NotEvery(1, 2, 5)), scoring=skip),
        "c": WeightedReward(as_reward(NotEvery()), scoring=skip),
    }
    scorer = Scorer(RewardSet(members))
    with pytest.raises(UserError, match=r"iteration 1: 4 of 8 pictures .*\(reward a 2, b 3\)"):
        refuse_too_many(scored(scorer), scorer, 1, 0.4, Processes())


class Told(Processes):
    """One of two processes, which notes what it would tell the other."""

    def fail_together(self, problem: str | None) -> None:
        raise UserError(problem or "the other says why")


def test_a_process_without_such_a_picture_stops_with_the_others() -> None:
    """The scores are everyone's: each process sees that there are too many, and one of those with a reason gives it."""
    with_reason, without = scorer_of(NotEvery(0)), scorer_of(NotEvery())
    scores = scored(with_reason)
    scored(without)
    with pytest.raises(UserError, match="iteration 1: 1 of 8 pictures"):
        refuse_too_many(scores, with_reason, 1, 0, Told(0, 2))
    with pytest.raises(UserError, match="^the other says why$"):
        refuse_too_many(scores, without, 1, 0, Told(1, 2))


def test_held_out_means_name_their_number() -> None:
    scorer = scorer_of(NotEvery(1, 3))
    scores = scored(scorer)
    found = held_out_mean(scores, scorer, Processes())
    assert found.value == pytest.approx(scores[[0, 2, 4, 5, 6, 7], 0].mean().item())
    assert (found.scored, found.pictures, found.note) == (6, 8, "6 of 8 pictures")
    assert str(HeldOutMean(0.25, 126, 128)) == "0.250 (126 of 128 pictures)"
    assert str(HeldOutMean(0.25, 128, 128)) == "0.250"
    assert scorer.say_unscored() == "", "they are not the next iteration's"


def test_a_held_out_mean_over_nothing_is_refused() -> None:
    scorer = scorer_of(NotEvery(*range(8)))
    with pytest.raises(UserError, match=r"none of 8 held-out pictures could be scored; .*reward mine: nan"):
        held_out_mean(scored(scorer), scorer, Processes())


def train(folder: Path, rewards: RewardSet, console: Console, *changes: str) -> Path:
    config = load_config("shapes", [*SMALL, "training.decay=none", "logging.sample_every=0", *changes])
    return run.train(config, folder, console, rewards=rewards)


def test_a_run_with_such_pictures_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the screen, in metrics.jsonl, and on the adapter's card, over how many pictures its two means are."""
    # 8 held-out pictures of the base, then 2 iterations of 8, then 8 held-out ones of the adapter.
    rewards = one_reward(NotEvery(1, 3, 12, 25), on_failure="skip")
    adapter = train(tmp_path / "run", rewards, Console(width=200), "scoring.max_skipped=0.2")
    said = capsys.readouterr().out
    assert "(6 of 8 pictures) -> " in said
    assert "(7 of 8 pictures) in " in said
    assert f"1 of 8 pictures could not be scored (reward shapes) and were left out; they are in {tmp_path}" in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [1 / 8, 0]
    card = AdapterCard.of(read_adapter(adapter))
    assert card.reward_before.endswith(", 6 of 8 pictures)")
    assert card.reward_after.endswith(", 7 of 8 pictures)")
    float(read_adapter(adapter).header["dgpo.reward_before"])


def test_a_run_stopped_by_too_many_goes_on_with_a_higher_share(tmp_path: Path) -> None:
    """Nothing is lost: the checkpoint before is gone on from, and the key is one that may change."""
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"iteration 2: 1 of 8 pictures .*failed-reward; .*dgpo resume"):
        train(folder, one_reward(NotEvery(17), on_failure="skip"), Console(quiet=True), "checkpoint.every=1")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("max_skipped: 0.1", "max_skipped: 0.2"))
    # Counted from the first picture of iteration 2 on.
    again = one_reward(NotEvery(1), on_failure="skip")
    assert run.resume(folder, Console(quiet=True), rewards=again).exists()


def test_what_was_done_before_a_reward_failed_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With checkpoints far apart too: the iterations before the one that could not be scored are not lost."""
    folder, far = tmp_path / "run", ["checkpoint.every=100", "training.iterations=3"]
    with pytest.raises(UserError, match=r"1 of 8 values are not finite"):
        train(folder, one_reward(NotEvery(8 + 16)), Console(width=200), *far)
    assert [path.name for path in checkpoints(folder)] == ["000002"]
    assert f"saved after iteration 2; go on with: dgpo resume {folder}" in capsys.readouterr().out
    resumed = run.resume(folder, Console(quiet=True), rewards=one_reward(NotEvery()))
    whole = train(tmp_path / "whole", one_reward(NotEvery()), Console(quiet=True), *far)
    ours, expected = read_adapter(resumed).tensors, read_adapter(whole).tensors
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_share_is_less_than_all() -> None:
    for value in ("1", "-0.1", "nan"):
        with pytest.raises(UserError, match="scoring.max_skipped"):
            load_config("shapes", [*SMALL, f"scoring.max_skipped={value}"])
    with pytest.raises(UserError, match="scoring.on_failure"):
        load_config("shapes", [*SMALL, "scoring.on_failure=ignore"])
