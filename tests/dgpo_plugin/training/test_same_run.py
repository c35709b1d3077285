"""What makes two runs one: settings and content, never places; all that differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.base_identity import PartIdentity
from dgpo_plugin.rewards import Reward, RewardSet, WeightedReward
from dgpo_plugin.training.accept import Change
from dgpo_plugin.training.contents import contents_of
from dgpo_plugin.training.identity import RunIdentity, check_same_run, differences, rounding_notes
from tests.conftest import shapes_run

pytestmark = pytest.mark.fast

BASE = {
    "transformer": PartIdentity(digest="1", settings={"num_layers": 4}),
    "vae": PartIdentity(digest="2", settings={"scaling_factor": 1.5}),
    "scheduler": PartIdentity(settings={"shift": 3.0, "class": "Euler"}),
}
CHECKPOINT = Path("run/checkpoints/000003")


def identity(config: RunConfig | None = None, **others: Any) -> RunIdentity:
    facts = {"base": BASE, "prompts_sha256": "p", "held_out_sha256": "h", "packages": {}, **others}
    return RunIdentity(config=(config or run()).model_dump(mode="json"), **facts)


def run(**sections: Any) -> RunConfig:
    rewards = {"one": {"reward": "hpsv2.1", "options": {"weights": "/a/w.pt"}}, "ocr": {"weight": 2}}
    return shapes_run(**{"rewards": rewards, **sections})


def one(name: str, **term: Any) -> RunConfig:
    return run(rewards={"one": {"reward": name, **term}})


def check(then: RunIdentity, now: RunIdentity) -> None:
    check_same_run(then, now, CHECKPOINT, 3)


GOES_ON: list[tuple[RunConfig, RunConfig]] = [
    (run(), run(model={"path": "/elsewhere/base"})),
    (run(), run(prompts={"train": "/elsewhere/p.txt", "held_out": "/elsewhere/h.txt"})),
    (run(), run(scoring={"device": "cuda:1"})),
    (run(), run(scoring={"batch_size": 3, "offload": True, "retries": 7, "timeout": 3})),
    (one("hpsv2.1"), one("hpsv2.1", device="cpu", offload=True, batch_size=1, retries=0, timeout=9)),
    (one("hpsv2.1", batch_size=4), run(rewards={"one": {"reward": "hpsv2.1"}}, scoring={"batch_size": 4})),
    (one("hpsv2.1", precision="bf16"), run(rewards={"one": {"reward": "hpsv2.1"}}, scoring={"precision": "bf16"})),
    (run(rewards="ocr"), run(rewards={"ocr": {"reward": "ocr"}})),
    (one("/a/own.py:score"), one("/b/renamed.py:score")),
    (run(), run(logging={"sample_every": 3}, checkpoint={"every": 1, "keep": 9})),
    (run(), run(model={"path": "shapes", "offload": True, "shard": False})),
    (one("remote", options={"timeout": 1}), one("remote", options={"timeout": 9, "batch_size": 2})),
    (one("judge", options={"concurrency": 1}), one("judge", options={"attempts": 9, "key_variable": "KEY"})),
]


@pytest.mark.parametrize(("then", "now"), GOES_ON)
def test_places_and_ways_of_computing_may_be_others(then: RunConfig, now: RunConfig) -> None:
    check(identity(then), identity(now))


REFUSED: list[tuple[RunConfig, RunConfig, str]] = [
    (run(), run(training={"learning_rate": 0.1}), "training.learning_rate is 0.1, but .* was trained with 0.0003"),
    (run(), run(training={"seed": 5}), "training.seed is 5"),
    (run(), run(model={"path": "shapes", "precision": "bf16"}), "model.precision is 'bf16', but .* with 'fp32'"),
    (run(), run(model={"path": "shapes", "vae_precision": "bf16"}), "model.vae_precision"),
    (run(), run(model={"path": "shapes", "width": 128, "height": 64}), "model.width is 128"),
    (run(), run(scoring={"precision": "fp16"}), "rewards.one.precision is 'fp16', but .* with 'fp32'"),
    (run(), run(scoring={"aggregate": "advantages"}), "scoring.aggregate"),
    (run(), one("hpsv2.1", options={"weights": "/b/w.pt"}), "rewards.one.options.weights is '/b/w.pt'"),
    (one("ocr"), one("ocr", weight=3), "rewards.one.weight is 3.0"),
    (one("ocr"), one("geneval"), "rewards.one.reward is 'geneval', but .* with 'ocr'"),
    (one("/a/own.py:score"), one("/a/own.py:other"), "rewards.one.reward is 'other', but .* with 'score'"),
    (one("judge", options={"model": "a"}), one("judge", options={"model": "b"}), "rewards.one.options.model is 'b'"),
    (
        one("mine.py:f", options={"timeout": 1}),
        one("mine.py:f", options={"timeout": 2}),
        "rewards.one.options.timeout is 2",
    ),
    (run(), run(evaluation={"guidance": 2}), "evaluation.guidance"),
]


@pytest.mark.parametrize(("then", "now", "said"), REFUSED)
def test_settings_may_not_be_others(then: RunConfig, now: RunConfig, said: str) -> None:
    with pytest.raises(UserError, match=f"config.yaml: {said}.*; put it back, start a new run"):
        check(identity(then), identity(now))


def changed(part: str, **values: Any) -> dict[str, PartIdentity]:
    return {**BASE, part: BASE[part].model_copy(update=values)}


CONTENT: list[tuple[dict[str, Any], str]] = [
    ({"prompts_sha256": "x"}, "the prompts are not those that run/checkpoints/000003 was trained with"),
    ({"held_out_sha256": "x"}, "the held-out prompts are not those"),
    ({"rewards_sha256": "x"}, "the reward's file is not the one that"),
    ({"contents": {"rewards.one.options.weights": "x"}}, "rewards.one.options.weights does not lead to the content"),
    ({"contents": {"algorithm.name": "x"}}, "algorithm.name does not lead to the content"),
    ({"base": changed("transformer", digest="x")}, "the base's transformer is not the one .* was trained on"),
    ({"base": changed("vae", settings={"scaling_factor": 1.0})}, r"the base's vae .* \(scaling_factor is 1.0 and was"),
    ({"base": changed("scheduler", settings={"shift": 1.0})}, r"the base's scheduler .* \(shift is 1.0 and was 3.0\)"),
    ({"base": {**BASE, "text_encoder": PartIdentity(digest="9")}}, r"the base's text_encoder .* \(is new\)"),
    ({"base": {"vae": BASE["vae"], "scheduler": BASE["scheduler"]}}, r"the base's transformer .* \(is missing\)"),
]


@pytest.mark.parametrize(("facts", "said"), CONTENT)
def test_content_may_not_be_other(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(identity(contents={}), identity(**facts))


def test_a_part_with_other_settings_is_recorded_with_their_values() -> None:
    """The hash of its weights says nothing: it is the same, or there is none."""
    base = changed("scheduler", settings={"shift": 1.0, "class": "DPM"})
    base["vae"] = changed("vae", settings={"scaling_factor": 1.0})["vae"]
    scheduler, vae = differences(identity(), identity(base=base), CHECKPOINT)
    assert (scheduler.before, scheduler.now) == ('{"shift": 3.0, "class": "Euler"}', '{"shift": 1.0, "class": "DPM"}')
    assert (vae.before, vae.now) == ('{"scaling_factor": 1.5}', '{"scaling_factor": 1.0}')
    assert vae.line.endswith("was trained on (scaling_factor is 1.0 and was 1.5)")
    assert str(Change.accepted(vae, 3)).endswith(
        'vae after iteration 3: {"scaling_factor": 1.5} -> {"scaling_factor": 1.0}'
    )


def test_the_cure_can_be_typed_where_the_folder_has_a_space() -> None:
    with pytest.raises(UserError, match="knowingly: dgpo resume 'my run' --accept prompts$"):
        check_same_run(identity(), identity(prompts_sha256="x"), Path("my run/checkpoints/000003"), 3)


def test_all_that_differs_is_named_at_once() -> None:
    now = identity(run(training={"seed": 5}), prompts_sha256="x", base=changed("vae", digest="x"))
    found = {each.part: each for each in differences(identity(), now, CHECKPOINT)}
    assert list(found) == ["training", "model", "prompts"]
    assert (found["training"].before, found["training"].now) == ("0", "5")
    assert (found["model"].what, found["model"].before, found["model"].now) == ("base's vae", "2", "x")
    with pytest.raises(UserError, match=r"seed .*vae .*prompts .*; put it back \(or say where the base is now: dgpo "):
        check(identity(), now)


def test_weights_that_were_moved_are_the_same_by_their_content() -> None:
    key = "rewards.one.options.weights"
    then, now = (
        identity(one("hpsv2.1", options={"weights": path}), contents={key: "same"}) for path in ("/a/w.pt", "/b/w.pt")
    )
    check(then, now)


class Served(Reward):
    def __init__(self, title: str) -> None:
        self.title = title

    def __call__(self, images: Any, prompts: Any) -> torch.Tensor:
        return torch.zeros(len(images))


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:9000", "remote"),
        (["http://a:1", "http://b:1"], ["http://c:2"], "remote"),
        (["http://a:1"], "https://c:2/x", "remote"),
        ("http://a/v1", ["http://b/v1", "http://c/v1"], "judge"),
        ("http://a/v1", "http://b/v1", "own.py:score"),
    ],
)
def test_a_server_is_what_it_serves_not_where(before: Any, after: Any, name: str) -> None:
    def served(url: Any, title: str) -> RunIdentity:
        config = one(name, options={"url": url})
        rewards = RewardSet({"one": WeightedReward(Served(title))})
        return identity(config, contents=contents_of(config, rewards))

    check(served(before, "ocr 1+abc (served)"), served(after, "ocr 1+abc (served)"))
    with pytest.raises(UserError, match="rewards.one.options.url does not lead to the content"):
        check(served(before, "ocr 1+abc (served)"), served(after, "ocr 1+def (served)"))


@pytest.mark.parametrize("folder", [False, True])
def test_files_and_folders_of_options_count_by_what_they_hold(tmp_path: Path, folder: bool) -> None:
    def there(name: str, text: str) -> RunIdentity:
        place = tmp_path / name
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "w.bin").write_text(text)
        config = one("clipscore", options={"weights": str(place if folder else place / "sub" / "w.bin")})
        return identity(config, contents=contents_of(config, RewardSet({})))

    then = there("a", "weights")
    check(then, there("b", "weights"))
    with pytest.raises(UserError, match="rewards.one.options.weights does not lead to the content"):
        check(then, there("c", "Weights"))


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (run(), []),
        (run(scoring={"offload": True}), []),
        (
            run(scoring={"device": "cpu"}),
            [f"reward {label}: device is cpu and was auto; last bits may differ" for label in ("one", "ocr")],
        ),
        (
            run(rewards={"one": {"reward": "hpsv2.1", "batch_size": 3}}),
            ["reward one: batch_size is 3 and was 16; last bits may differ"],
        ),
    ],
)
def test_what_may_change_the_last_bits_is_told(now: RunConfig, lines: list[str]) -> None:
    assert rounding_notes(identity(), identity(now)) == lines


# ---- checkpoints of before a setting was there


def older(config: RunConfig, *keys: str) -> RunIdentity:
    """An identity whose configuration does not know some settings."""
    now = identity(config)
    for key in keys:
        section, name = key.split(".")
        del now.config[section][name]
    return now


NEW = ("training.inner_epochs", "training.ema_repeats", "algorithm.training_guidance", "rollout.shift")


def test_a_checkpoint_of_before_a_setting_goes_on_with_its_default() -> None:
    assert list(differences(older(run(), *NEW), identity(run()), CHECKPOINT)) == []


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (run(training={"inner_epochs": 2}), "training.inner_epochs is 2, but .* was trained with 1"),
        (run(algorithm={"name": "dgpo", "training_guidance": 3}), "algorithm.training_guidance is 3.0, .* with 1.0"),
        (run(rollout={"shift": 2.5}), "rollout.shift is 2.5, but .* was trained with None"),
    ],
)
def test_and_with_no_other_value(now: RunConfig, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        check(older(run(), *NEW), identity(now))
    assert "\n" not in str(caught.value)


def test_what_another_algorithm_or_reward_brings_along_is_no_default() -> None:
    """Each of its settings is told, though many are the defaults."""
    found = {
        each.what for each in differences(identity(run()), identity(run(algorithm={"name": "flow-grpo"})), CHECKPOINT)
    }
    assert {"algorithm.name", "algorithm.noise_level", "algorithm.guidance"} <= found
    added = run(rewards={"one": {"reward": "hpsv2.1", "options": {"weights": "/a/w.pt"}}, "ocr": 2, "clipscore": 1})
    found = {each.what for each in differences(identity(run()), identity(added), CHECKPOINT)}
    assert {"rewards.clipscore.weight", "rewards.clipscore.reward"} <= found


def test_a_configuration_that_is_none_has_no_defaults() -> None:
    now = identity(run())
    broken = now.model_copy(update={"config": {**now.config, "lora": {"rank": "wide"}}})
    assert "training.inner_epochs" in {each.what for each in differences(older(run(), *NEW), broken, CHECKPOINT)}
