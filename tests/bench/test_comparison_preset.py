"""Comparison presets: the shipped ones, and what is said of a mistaken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dgpo_bench.preset import bench_preset_names, load_preset
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.checks import picture_size

pytestmark = pytest.mark.fast


def changed(folder: Path, **changes: Any) -> str:
    """The shipped comparison with other values at the top, as a file."""
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return str(path)


def test_every_shipped_size_is_larger_than_the_one_before() -> None:
    for name in bench_preset_names():
        preset, _ = load_preset(name)
        quick, default, full = (preset.sizes[size] for size in ("quick", "default", "full"))
        assert len({size.flops is None for size in (quick, default, full)}) == 1, "one unit, or they cannot be compared"
        assert quick.budget < default.budget < full.budget
        assert quick.test_prompts < default.test_prompts <= full.test_prompts
        assert quick.validation_prompts < default.validation_prompts <= full.validation_prompts
        assert "prove" in quick.caution
        assert not full.caution


@pytest.mark.parametrize("name", ["shapes", "shapes-2", "words", "words-unguided"])
def test_a_world_is_compared_on_pictures_of_the_size_that_its_preset_trains_on(name: str) -> None:
    preset, task = load_preset(name)
    compared = preset.run_config(task, preset.challenger, seed=0)
    assert picture_size(compared.model) == picture_size(load_config(name).model)


def test_a_preset_without_a_size_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    del values["sizes"]["full"]
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="sizes: .*lacks full"):
        load_preset(str(path))


def test_algorithms_that_start_from_different_bases_are_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(bench_preset_names()["shapes"].read_text())
    values["algorithms"]["dgpo"]["model"] = {"width": 32, "height": 32}
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="must start from one base"):
        load_preset(str(path))


def test_the_command_line_changes_a_size() -> None:
    preset, _ = load_preset("shapes")
    assert preset.sized("full") == preset.sizes["full"]
    changed = preset.sized("full", 7, 1234, "best-of-n, zero")
    assert (changed.seeds, changed.evaluations, changed.controls) == (7, 1234, ("zero", "best-of-n"))
    assert changed.test_prompts == preset.sizes["full"].test_prompts
    assert preset.sized("full", controls="none").controls == ()
    assert preset.sized("quick", controls="all").controls == ("zero", "shuffled", "half", "best", "best-of-n")


def test_shipped_presets_share_what_must_be_equal() -> None:
    for name in bench_preset_names():
        preset, task = load_preset(name)
        configs = [preset.run_config(task, algorithm, 0) for algorithm in preset.algorithms]
        assert configs[0].prompts.train == task.prompts.train
        assert configs[0].prompts.held_out == task.prompts.validation
        assert configs[0].rewards == task.rewards
        assert {config.lora for config in configs} == {configs[0].lora}
        assert {config.prompts for config in configs} == {configs[0].prompts}
        assert {config.model for config in configs} == {configs[0].model}
        assert len({(c.training.prompts_per_iteration, c.training.group_size) for c in configs}) == 1
        rollouts = {name: c.rollout for name, c in zip(preset.algorithms, configs, strict=True)}
        rollouts.pop("dgpo-ours", None)  # whose point it is
        assert len({rollout.model_dump_json() for rollout in rollouts.values()}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"challengr": "x"}, "unknown key challengr; did you mean 'challenger'"),
        ({"task": "shapess"}, "no task 'shapess'; did you mean 'shapes'"),
        ({"search": {"dpgo": {}}}, "search: 'dpgo' is not among the algorithms; did you mean 'dgpo'"),
        (
            {"search": {"dgpo": {"algorithm.beta": {"low": 1}}}},
            "search.dgpo.algorithm.beta: give choices, or low and high",
        ),
        ({"search": {"dgpo": {"algorithm.beta": {"low": 0, "high": 1, "log": True}}}}, "above 0 for a logarithm"),
        ({"shared": {"prompts": {"train": "x.txt"}}}, "shared: prompts: the task says it"),
        ({"algorithms": {"zero": {}}, "challenger": "zero"}, "'zero' cannot name an entry"),
        ({"challenger": "dpgo"}, "challenger: 'dpgo' is not among the algorithms; did you mean 'dgpo'"),
        ({"labels": {"flow-gpro": "x"}}, "labels: 'flow-gpro' is not among the algorithms; did you mean 'flow-grpo'"),
        ({"labels": {"dgpo": "x", "flow-grpo": "x"}}, "labels: must differ from one another"),
        ({"colors": {"dgpo": "red"}}, "colors.dgpo: "),
        ({"shared": {"model": "shapes"}}, "every algorithm: model: "),
    ],
)
def test_a_mistake_is_told_where_it_is(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_preset(changed(tmp_path, **changes))
    assert str(refused.value).startswith(f"{tmp_path / 'p.yaml'}: ")
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_all_mistakes_of_the_file_are_told_at_once(tmp_path: Path) -> None:
    values = yaml.safe_load(Path(changed(tmp_path)).read_text())
    values["sizes"]["quick"]["seedz"] = 1
    values["sizes"]["full"]["schedule"] = [0.5, 0.2]
    with pytest.raises(UserError) as refused:
        load_preset(changed(tmp_path, sizes=values["sizes"], notez={}))
    for mistake in (
        "unknown key sizes.quick.seedz; did you mean 'seeds'?",
        "sizes.full.schedule: must rise and lie between 0 and 1",
        "unknown key notez; did you mean 'notes'?",
    ):
        assert mistake in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_challenger_is_required(tmp_path: Path) -> None:
    values = yaml.safe_load(Path(changed(tmp_path)).read_text())
    del values["challenger"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="challenger"):
        load_preset(str(tmp_path / "p.yaml"))


def test_the_mistakes_of_all_algorithms_are_told_at_once(tmp_path: Path) -> None:
    """One that several have, once."""
    values = yaml.safe_load(Path(changed(tmp_path)).read_text())
    values["algorithms"]["dgpo"]["algorithm"]["bata"] = 1
    for name in ("flow-grpo", "flow-grpo-fast"):
        values["algorithms"][name]["training"]["learning_rte"] = 1
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as refused:
        load_preset(str(tmp_path / "p.yaml"))
    assert str(refused.value).removeprefix(f"{tmp_path / 'p.yaml'}: ") == (
        "algorithms.dgpo: unknown key algorithm.bata; did you mean 'beta'?; "
        "algorithms.flow-grpo, algorithms.flow-grpo-fast: unknown key training.learning_rte; "
        "did you mean 'learning_rate'?"
    )


def test_controls_are_the_challenger_told_something_else() -> None:
    preset, task = load_preset("shapes")
    plain = preset.run_config(task, "dgpo", 3)
    for name in ("zero", "shuffled", "best"):
        control = preset.run_config(task, name, 3)
        assert control.training.control == name
        assert control.model_copy(update={"training": plain.training}) == plain
    half = preset.run_config(task, "half", 3)
    assert half.algorithm.model_dump()["beta"] == 1e-9
    assert half.algorithm.model_copy(update={"beta": 10.0}) == plain.algorithm


def test_a_task_beside_the_file_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    (tmp_path / "own.yaml").write_text(
        "{version: 3, prompts: {train: shapes/train, validation: prompts.txt, test: shapes/held-out}, "
        "rewards: brightness, in_domain: [{metric: brightness}]}"
    )
    preset, task = load_preset(changed(tmp_path, task="own.yaml"))
    assert (task.name, task.version, list(task.rewards)) == ("own", 3, ["brightness"])
    assert preset.run_config(task, "dgpo", 0).prompts.held_out == str(tmp_path / "prompts.txt")
