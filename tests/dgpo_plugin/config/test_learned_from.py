"""An algorithm says what it learns from, and a configuration has that and nothing of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.load import load_config, parse_config
from dgpo_plugin.config.places import absolute_places, lost_places, places_in

pytestmark = pytest.mark.fast

DPO = {"name": "diffusion-dpo", "beta": 100}
PAIRS: dict[str, Any] = {"model": {"path": "shapes"}, "pairs": "mine", "algorithm": DPO}
REWARDS: dict[str, Any] = {"model": {"path": "shapes"}, "prompts": {"train": "shapes/train"}, "rewards": "shapes"}


def test_pairs_bring_prompts_and_need_no_rewards() -> None:
    config = parse_config(PAIRS, "here")
    assert config.pairs is not None
    assert config.pairs.train == "mine"
    assert (config.training.group_size, config.prompts.train, config.rewards) == (2, "", {})
    assert parse_config(config.model_dump(mode="json"), "here") == config


def test_every_algorithm_says_what_it_learns_from() -> None:
    needs = {name: ALGORITHMS.load(name).Config.needs for name in ALGORITHMS}
    assert [name for name, each in needs.items() if each == {"pairs"}] == ["diffusion-dpo"]
    assert all(each == {"rollout", "rewards"} for name, each in needs.items() if name != "diffusion-dpo")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({**PAIRS, "rewards": "shapes"}, ["learns from pairs; rewards: leave them out; under evaluation.rewards"]),
        ({**PAIRS, "prompts": {"train": "a.txt"}}, ["prompts.train: leave it out, the prompts are the pairs' own"]),
        ({**PAIRS, "rollout": {"steps": 4}}, ["rollout: leave out steps, nothing is sampled"]),
        ({**PAIRS, "training": {"group_size": 8}}, ["training.group_size: leave it out, a pair has two pictures"]),
        ({**PAIRS, "training": {"control": "best"}}, ["training.control: leave it out"]),
        ({**PAIRS, "pairs": None}, ["pairs.train is missing; name a table or a folder of preferred pairs"]),
        ({**REWARDS, "algorithm": DPO}, ["pairs.train is missing", "rewards: leave them out", "prompts.train: leave"]),
        ({**PAIRS, "algorithm": {"name": "diffusion-dpo"}}, ["algorithm.beta is missing; give 100 as in flow_grpo's"]),
        ({**REWARDS, "pairs": "mine"}, ["pairs: dgpo learns from rewards; leave pairs out, or set algorithm.name to"]),
        ({**REWARDS, "evaluation": {"rewards": "ocr"}}, ["evaluation.rewards: dgpo learns from rewards"]),
        ({**PAIRS, "algorithm": {"name": "nft"}}, ["prompts.train is missing", "rewards is missing"]),
        ({**PAIRS, "pairs": {"trian": "mine"}}, ["unknown key pairs.trian; did you mean 'train'?"]),
    ],
)
def test_what_does_not_go_together_is_one_line(values: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(values, "here")
    assert "\n" not in str(caught.value)
    for each in says:
        assert each in str(caught.value)


def test_a_preset_is_made_one_of_pairs_by_its_settings() -> None:
    changes = ["rewards={}", "prompts.train=null", "rollout={}", "training.group_size=2", "pairs=mine"]
    config = load_config("shapes", [*changes, "algorithm={name: diffusion-dpo, beta: 2000}"])
    assert config.algorithm.name == "diffusion-dpo"
    assert config.reward_label == "none"


def test_pairs_and_judges_are_places(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "judge.py").write_text("def judge(images, prompts): ...\n")
    judged = {**PAIRS, "evaluation": {"rewards": {"own": {"reward": "judge.py:judge"}}}}
    config = absolute_places(parse_config(judged, "here"), tmp_path)
    assert config.pairs is not None
    assert config.pairs.train == str(tmp_path / "mine")
    assert config.evaluation.rewards["own"].reward == f"{tmp_path / 'judge.py'}:judge"
    assert lost_places(config) == {}
    inside = places_in(config, tmp_path)
    assert inside.pairs is not None
    assert inside.pairs.train == "mine"
    (tmp_path / "mine").rmdir()
    assert lost_places(config) == {"pairs.train": str(tmp_path / "mine")}
