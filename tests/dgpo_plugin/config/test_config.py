"""Configuration: what loads, and that every mistake is one line that says where and what."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo_plugin.algorithms.dgpo import DGPOConfig
from dgpo_plugin.algorithms.flow_grpo import FlowGRPOConfig, FlowGRPOFastConfig
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.explain import explain
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config, parse_config, preset_names
from tests.conftest import REQUIRED, shapes_run

pytestmark = pytest.mark.fast


def whole(text: str | bytes) -> str | bytes:
    """The text with what every run must say, where it says nothing of it; what is no mapping as it is."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        return text
    if not isinstance(values, dict):
        return text
    for key, required in REQUIRED.items():
        given = values.setdefault(key, required)
        if isinstance(given, dict) and isinstance(required, dict):
            values[key] = {**required, **given}
    return yaml.safe_dump(values, sort_keys=False)


def load(folder: Path, text: str | bytes, *overrides: str) -> RunConfig:
    text, path = whole(text), folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(str(path), overrides)


def mistake(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what loads


@pytest.mark.parametrize("name", sorted(preset_names()))
def test_presets_load(name: str) -> None:
    config = load_config(name)
    assert config.rollout.steps >= getattr(config.algorithm, "noisiest_steps", 0)


DGPOS = ["sd35-geneval", "sd35-ocr", "sd35-pickscore"]
DGPOS += [f"{name}-{kind}" for name in DGPOS for kind in ("unguided", "old-policy")]


@pytest.mark.parametrize("name", DGPOS)
def test_stable_diffusion_3_5_reads_and_groups_as_in_the_released_code(name: str) -> None:
    """128 tokens of T5 in rollout, training and evaluation; G 16 x P 8, and G 24 with PickScore."""
    config = load_config(name)
    assert config.model.max_sequence_length == 128
    size = 24 if "pickscore" in name else 16
    assert (config.training.group_size, config.training.prompts_per_iteration) == (size, 8)


def test_there_is_a_preset() -> None:
    assert "shapes" in preset_names()


def test_defaults_are_the_published_settings() -> None:
    """docs/architecture.md, section 4: SD3.5-M, GenEval."""
    config = shapes_run()
    dgpo = config.algorithm
    assert isinstance(dgpo, DGPOConfig)
    assert (dgpo.beta, dgpo.kl_weight, dgpo.clip) == (100, 0.02, 1e-2)
    assert (dgpo.timesteps, dgpo.noisiest_steps, dgpo.old_policy_after) == (4, 5, 500)
    assert (dgpo.advantage_std, dgpo.rollout_guidance, dgpo.reference_guidance) == ("group", 4.5, 1)
    assert (config.lora.rank, config.lora.alpha) == (64, 128)
    assert (config.training.group_size, config.training.prompts_per_iteration) == (16, 8)
    assert (config.training.learning_rate, config.training.weight_decay) == (3e-4, 1e-4)
    assert (config.training.max_grad_norm, config.training.ema_decay, config.training.ema_every) == (1, 0.9, 8)
    grpo, fast = FlowGRPOConfig(), FlowGRPOFastConfig()
    assert (grpo.noise_level, grpo.clip, grpo.kl_weight, grpo.guidance) == (0.7, 1e-4, 0.04, 4.5)
    assert (fast.noise_level, fast.clip, fast.kl_weight, fast.guidance) == (0.8, 1e-5, 0, 1)
    assert (fast.window, fast.window_range) == (3, 5)  # 2 goes with guidance 4.5
    assert grpo.advantage_std == fast.advantage_std == "iteration"


def test_values_from_the_file_and_defaults_for_the_rest(tmp_path: Path) -> None:
    config = load(tmp_path, "training: {group_size: 24, learning_rate: 1e-3}\nalgorithm: {name: flow-grpo, clip: 0.2}")
    assert (config.training.group_size, config.training.learning_rate) == (24, 1e-3)
    assert config.algorithm == FlowGRPOConfig(clip=0.2)
    assert config.training.prompts_per_iteration == shapes_run().training.prompts_per_iteration


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        shapes_run().training.seed = 1  # type: ignore[misc]


def test_a_configuration_survives_the_round_trip() -> None:
    config = shapes_run(algorithm=FlowGRPOFastConfig(window=3))
    assert parse_config(config.model_dump(mode="json"), "here") == config


# ---- mistakes in the file


@pytest.mark.parametrize(
    ("text", "where", "near"),
    [
        ("trainin: {}", "unknown key trainin", "training"),
        ("training: {grup_size: 3}", "unknown key training.grup_size", "group_size"),
        ("algorithm: {name: dgpo, betta: 3}", "unknown key algorithm.betta", "beta"),
        ("algorithm: {name: flow-grpo, noise_levl: 3}", "unknown key algorithm.noise_levl", "noise_level"),
        ("algorithm: {name: flow-grpo-fast, windo: 3}", "unknown key algorithm.windo", "window"),
        ("lora: {alfa: 3}", "unknown key lora.alfa", "alpha"),
        ("algorithm: {name: dpgo}", "algorithm: no algorithm 'dpgo'", "dgpo"),
    ],
)
def test_an_unknown_key_suggests_the_near_one(tmp_path: Path, text: str, where: str, near: str) -> None:
    message = mistake(tmp_path, text)
    assert str(tmp_path / "run.yaml") in message
    assert f"{where}; did you mean {near!r}?" in message


def test_an_unknown_key_near_to_nothing_lists_the_known_ones_of_its_own_section(tmp_path: Path) -> None:
    assert "known: rank, alpha, init, target_modules" in mistake(tmp_path, "lora: {zzz: 3}")
    # One algorithm's field is no field of another's.
    message = mistake(tmp_path, "algorithm: {name: flow-grpo, noisiest_steps: 3}")
    assert "unknown key algorithm.noisiest_steps" in message
    assert "old_policy_after" not in message


@pytest.mark.parametrize(
    ("text", "where", "shown"),
    [
        ("training: {group_size: 1}", "training.group_size", "(given 1)"),
        ("training: {group_size: many}", "training.group_size", "(given 'many')"),
        ("training: {group_size: 2.5}", "training.group_size", "(given 2.5)"),
        ("training: {learning_rate: .nan}", "training.learning_rate", "(given nan)"),
        ("training: {learning_rate: -1}", "training.learning_rate", "(given -1)"),
        ("training: 3", "training", "(given 3)"),
        ("algorithm: {name: dgpo, clip: 0}", "algorithm.clip", "(given 0)"),
        ("algorithm: {name: dgpo, sampler: heun}", "algorithm.sampler", "(given 'heun')"),
        ("algorithm: dgpo", "algorithm", "(given 'dgpo')"),
        ("lora: {target_modules: to_q}", "lora.target_modules", "must be a list, in [brackets] (given 'to_q')"),
        ("training: {1: 2}", "training.1", "strings"),
        ("model: {precision: fp8}", "model.precision", "(given 'fp8')"),
    ],
)
def test_a_wrong_value_is_named_and_shown(tmp_path: Path, text: str, where: str, shown: str) -> None:
    message = mistake(tmp_path, text)
    assert f": {where}: " in message
    assert shown in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("algorithm: {name: dgpo, timesteps: 6, noisiest_steps: 5}", "timesteps (6) cannot exceed noisiest_steps (5)"),
        ("algorithm: {name: flow-grpo-fast, window: 6}", "window (6) cannot exceed window_range (5)"),
        (
            "training: {prompts_per_iteration: 8, updates_per_iteration: 3}",
            "updates_per_iteration (3) must divide prompts_per_iteration (8)",
        ),
        ("rollout: {steps: 4}", "rollout.steps (4) must be at least 5 for algorithm.noisiest_steps"),
        (
            "{rollout: {steps: 5}, algorithm: {name: flow-grpo-fast}}",
            "rollout.steps (5) must be at least 6 for algorithm.window_range",
        ),
    ],
)
def test_values_that_do_not_fit_together(tmp_path: Path, text: str, says: str) -> None:
    assert says in mistake(tmp_path, text)


def test_the_constraints_hold_at_their_limits(tmp_path: Path) -> None:
    load(tmp_path, "rollout: {steps: 5}\nalgorithm: {name: dgpo, timesteps: 5, noisiest_steps: 5}")
    load(tmp_path, "rollout: {steps: 6}\nalgorithm: {name: flow-grpo-fast, window: 5}")
    load(tmp_path, "training: {prompts_per_iteration: 8, updates_per_iteration: 8, group_size: 2}")


def test_an_algorithm_needs_its_name(tmp_path: Path) -> None:
    told = mistake(tmp_path, "algorithm: {beta: 3}")
    assert f"algorithm: name is missing; name {', '.join(ALGORITHMS)}" in told
    assert "dgpo, nft, elbo" in told


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "not YAML at line"),
        ("training:\n  seed: 1\n\tgroup_size: 2\n", "not YAML at line 3"),
        ("", "needs keys and values"),
        ("- a", "needs keys and values"),
        ("just words", "needs keys and values"),
    ],
)
def test_what_is_no_mapping_in_yaml(tmp_path: Path, text: str, says: str) -> None:
    assert says in mistake(tmp_path, text)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no preset 'shape'; did you mean 'shapes'"):
        load_config("shape")
    with pytest.raises(UserError, match=r"known: .*shapes.*; or name a \.yaml file"):
        load_config("zzz")
    with pytest.raises(UserError, match=r"missing\.yaml: No such file.*check the path"):
        load_config(str(tmp_path / "missing.yaml"))


# ---- nothing is taken for granted


def refused(folder: Path, text: str, *overrides: str) -> str:
    """What is said of a file that is taken as it is."""
    path = folder / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(path), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_ones_own_model_is_not_silently_trained_on_shapes(tmp_path: Path) -> None:
    said = refused(tmp_path, "model: {path: /models/my-sd35}")
    assert said == (
        "2 mistakes: (1) prompts.train is missing; name a .txt or .jsonl file or one of `dgpo list prompts`; "
        "(2) rewards is missing; name at least one of `dgpo list rewards`"
    )
    rest = "{prompts: {train: a.txt}, rewards: ocr}"
    assert refused(tmp_path, rest).startswith("model.path is missing; name a diffusers folder, a hub id or one of")
    assert refused(tmp_path, rest, "model.precision=bf16").startswith("model.path is missing")
    assert refused(tmp_path, rest, "model.path=a", "prompts={}").startswith("prompts.train is missing")


def test_all_mistakes_of_a_file_are_told_at_once_each_with_its_near_key(tmp_path: Path) -> None:
    text = (
        "lora: {alfa: 3, rank: 0}\nrewards: {ocr: {weights: 1}, hpsv2.1: {options: {x: 1}, retrys: 3}}\n"
        "scoring: {batch: 3}\ntrainin: {}"
    )
    said = mistake(tmp_path, text)
    assert " 6 mistakes: (1) " in said
    for each in (
        "unknown key lora.alfa; did you mean 'alpha'?",
        "lora.rank: Input should be greater than or equal to 1 (given 0)",
        "unknown key rewards.ocr.weights; did you mean 'weight'?",
        "unknown key rewards.hpsv2.1.retrys; did you mean 'retries'?",
        "unknown key scoring.batch; did you mean 'batch_size'?",
        "unknown key trainin; did you mean 'training'?",
    ):
        assert each in said


class Part(BaseModel):
    """Of a model that is no run's."""

    model_config = ConfigDict(extra="forbid")

    size: int = 1


class Whole(BaseModel):
    """Sections in mappings, lists and tuples, or none."""

    model_config = ConfigDict(extra="forbid")

    parts: dict[str, Part] = {}
    listed: list[Part] = []
    tupled: tuple[Part, ...] = ()
    perhaps: Part | None = None


def test_near_keys_are_known_in_any_model() -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(
            {"parts": {"a": {"sise": 1}}, "listed": [{"sise": 1}], "tupled": [{"sise": 1}], "perhaps": {"sise": 1}}
        )
    said = explain(caught.value, Whole)
    for where in ("parts.a.sise", "listed.0.sise", "tupled.0.sise", "perhaps.sise"):
        assert f"unknown key {where}; did you mean 'size'?" in said


# ---- rewards


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("rewards: ocr", "ocr"),
        ("rewards: [ocr, hpsv2.1]", "1 ocr + 1 hpsv2.1"),
        ("rewards: {ocr: 2, hpsv2.1: 0.5}", "2 ocr + 0.5 hpsv2.1"),
        ("rewards: {ocr: , hpsv2.1: {weight: -1}}", "1 ocr + -1 hpsv2.1"),
        ("rewards: {hps: {reward: hpsv2.1, options: {weights: /x}}}", "hps"),
        ("rewards: {ocr: 2}", "2 ocr"),
    ],
)
def test_short_forms_of_rewards(tmp_path: Path, text: str, label: str) -> None:
    config = load(tmp_path, text)
    assert config.reward_label == label
    assert parse_config(config.model_dump(mode="json"), "here") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rewards: {}", "rewards: is empty; name at least one"),
        ('rewards: {"a\\nb": {reward: shapes}}', r"rewards: has the label 'a\nb'; a label is one line of text"),
        ('rewards: {" ": {reward: shapes}}', "rewards: has the label ' '"),
        ("rewards: {ocr: {options: {a: {b: [.inf]}}}}", "rewards: ocr.options.a.b.0 is inf; give a finite number"),
        ("rewards: {ocr: {options: {a: {1: 2}}}}", "rewards: ocr.options.a has the key 1; put it in quotes"),
        ("rewards: [ocr, ocr]", "rewards: "),
        ("rewards: 3", "rewards: "),
        ("rewards: {ocr: yes please}", "rewards.ocr: "),
        ("rewards: {ocr: 0}", "rewards.ocr.weight must not be 0; leave the reward out instead"),
        ("rewards: {ocr: {weight: .inf}}", "rewards.ocr.weight: "),
        ("rewards: {1: {}}", "rewards.1"),
        ("rewards: {ocr: {device: gpu}}", "rewards.ocr.device: "),
    ],
)
def test_rewards_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    assert says in mistake(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{name: ocr}", "rewards: {ocr: {weight: 1}}"),
        ("ocr", "rewards: {ocr: {weight: 1}}"),
        ("{name: null, sum: {ocr: 1, hpsv2.1: 10}}", "rewards: {ocr: {weight: 1}, hpsv2.1: {weight: 10}}"),
        (
            "{name: pickscore, options: {pickscore: {divisor: 26}}, precision: bf16, aggregate: advantages}",
            "rewards: {pickscore: {weight: 1, options: {divisor: 26}}}, "
            "scoring: {precision: bf16, aggregate: advantages}",
        ),
        ("{sum: 3}", "rewards: {ocr: {weight: 1}}"),
    ],
)
def test_the_old_form_is_told_in_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    text = f"model: {{path: a}}\nprompts: {{train: b}}\nreward: {old}"
    assert refused(tmp_path, text) == f"reward: is called rewards now; write {new}"
    assert yaml.safe_load("{" + new + "}").keys() <= {"rewards", "scoring"}


def test_the_old_form_on_the_command_line() -> None:
    with pytest.raises(UserError, match=r"^shapes: reward: is called rewards now; write rewards: {ocr: {weight: 1}}$"):
        load_config("shapes", ["reward.name=ocr"])


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["rewards.shapes.weight=3"], "3 shapes"),
        (["rewards.hpsv2.1.weight=2"], "1 shapes + 2 hpsv2.1"),
        (["rewards.hpsv2.1=2", "rewards.hpsv2.1.options.weights=/x.pt"], "1 shapes + 2 hpsv2.1"),
        (["rewards.own/mine.py:sharp.weight=2"], "1 shapes + 2 own/mine.py:sharp"),
        (["rewards={ocr: {weight: 1}}"], "ocr"),
        (["rewards=[ocr, hpsv2.1]", "rewards.hpsv2.1.weight=4"], "1 ocr + 4 hpsv2.1"),
        # The longest label that is there: an option may be called as a field is.
        (["rewards.shapes.options.weight=3", "rewards.shapes.options.weight=4"], "shapes"),
    ],
)
def test_overrides_know_labels_with_dots(overrides: list[str], label: str) -> None:
    assert load_config("shapes", overrides).reward_label == label


def test_overrides_of_a_files_short_form(tmp_path: Path) -> None:
    assert load(tmp_path, "rewards: hpsv2.1", "rewards.hpsv2.1.weight=3").reward_label == "3 hpsv2.1"
    assert "unknown key rewards.hpsv2.1.wieght; did you mean 'weight'?" in mistake(
        tmp_path, "rewards: hpsv2.1", "rewards.hpsv2.1.wieght=3"
    )
    said = mistake(tmp_path, "rewards: {ocr: {weight: 2}}", "rewards.ocr.weight.x=1")
    assert said == "rewards.ocr.weight.x: weight is a value, not a section"


# ---- overrides


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "training: {seed: 1}", "training.seed=2", "training.learning_rate=1e-3", "lora.rank=8")
    assert (config.training.seed, config.training.learning_rate, config.lora.rank) == (2, 1e-3, 8)
    config = load(tmp_path, "training: {seed: 1}", "algorithm={name: dgpo, beta: 7}", "prompts.held_out=null")
    assert config.algorithm == DGPOConfig(beta=7)
    assert config.prompts.held_out is None


def test_the_last_of_equal_overrides_counts(tmp_path: Path) -> None:
    assert load(tmp_path, "training: {seed: 1}", "training.seed=2", "training.seed=3").training.seed == 3


def test_naming_another_algorithm_drops_the_fields_of_the_one_before() -> None:
    config = load_config("shapes", ["algorithm.name=flow-grpo", "algorithm.clip=0.1"])
    assert config.algorithm == FlowGRPOConfig(clip=0.1)
    same = load_config("shapes", ["algorithm.name=dgpo"])
    assert same == load_config("shapes")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nothing", "--set nothing: write it as section.field=value"),
        ("=3", "write it as section.field=value"),
        ("training.seed=[1", "the value is not YAML"),
        ("training.sed=3", "unknown key training.sed; did you mean 'seed'?"),
        ("training.seed.x=3", "seed is a value, not a section"),
        ("training.group_size=1", "training.group_size: "),
        ("algorithm.name=dpgo", "did you mean 'dgpo'?"),
    ],
)
def test_mistaken_overrides(tmp_path: Path, override: str, says: str) -> None:
    assert says in mistake(tmp_path, "training: {seed: 1}", override)


# ---- faults that were found once


@pytest.mark.parametrize("name", ["dgpo", "flow-grpo", "flow-grpo-fast"])
def test_an_algorithms_name_as_a_section(tmp_path: Path, name: str) -> None:
    assert f"unknown key {name}" in mistake(tmp_path, f"{name}: {{clip: 1}}")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    mistake(tmp_path, "model: {path: é}".encode("latin-1"))


def test_a_line_break_in_a_key(tmp_path: Path) -> None:
    mistake(tmp_path, '"trai\\nning": {}')


def test_the_order_of_overrides_of_different_fields_is_without_effect() -> None:
    overrides = ["algorithm.clip=0.1", "algorithm.name=flow-grpo"]
    assert load_config("shapes", overrides) == load_config("shapes", overrides[::-1])


TASKS = {
    # noisiest steps, old policy after, standard deviation, group size; beta, KL weight and clip with guidance
    "geneval": (5, 500, "group", 16, (100, 0.02, 1e-2)),
    "ocr": (7, 200, "iteration", 16, (100, 0.02, 1e-2)),
    "pickscore": (7, 200, "iteration", 24, (10, 0.001, 5e-2)),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("mode", "rollout", "reference", "shape", "against"),
    [
        ("", 4.5, 1, None, "base"),
        ("-unguided", 1, 4.5, (100, 0.02, 1e-3), "base"),
        ("-old-policy", 1, 1, (2000, 0.001, 1e-5), "old_policy"),
    ],
)
def test_the_published_settings(
    task: str, mode: str, rollout: float, reference: float, shape: tuple[float, float, float] | None, against: str
) -> None:
    """Of the paper's table: the task's column, and the two without guidance (an extrapolation for PickScore)."""
    config = load_config(f"sd35-{task}{mode}")
    steps, after, std, group, guided = TASKS[task]
    algorithm = config.algorithm
    assert isinstance(algorithm, DGPOConfig)
    assert (algorithm.rollout_guidance, algorithm.reference_guidance) == (rollout, reference)
    assert (algorithm.beta, algorithm.kl_weight, algorithm.clip) == (shape or guided)
    assert algorithm.reference == against
    assert (algorithm.timesteps, algorithm.noisiest_steps, algorithm.old_policy_after) == (4, steps, after)
    assert algorithm.advantage_std == std
    assert (config.training.prompts_per_iteration, config.training.group_size) == (8, group)
    assert (config.lora.rank, config.lora.alpha, config.training.learning_rate) == (64, 128, 3e-4)
    assert config.lora.init == "gaussian"
    averaged = (config.training.ema_decay, config.training.ema_every, config.training.ema_repeats)
    assert averaged == (0.9, 8, 4 if task == "pickscore" else 2)
    assert config.schedule == "dpm"
    assert (config.rollout.steps, config.rollout.shift) == (10, 3)
    assert config.reward_label == task
    assert config.evaluation.guidance == rollout
