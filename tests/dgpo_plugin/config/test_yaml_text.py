"""YAML of configurations: each key once, values as they are written, and no text that takes the program down."""

from __future__ import annotations

import pytest
import yaml

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.config.yaml_text import read_yaml_text

pytestmark = pytest.mark.fast


def short(value: object) -> str:
    """A test's name for a value that may be very long."""
    return ascii(value)[:40]


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30:00", "1:30:00"),
        ("010", "010"),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-01-01", "2026-01-01"),
        ("=", "="),
        ("true", True),
        ("0x10", 16),
        ("-1_000", -1000),
        ("1.5e+3", 1500.0),
        ("~", None),
        ("!!str 1", "1"),
        ("'1'", "1"),
    ],
)
def test_a_value_is_what_is_written(text: str, value: object) -> None:
    assert read_yaml_text(f"a: {text}", "run.yaml") == {"a": value}


@pytest.mark.parametrize(
    "value", ["1:30:00", "010", "yes", "2026-01-01", "=", "1e-4", "0o7", "on", "1", "null", ".5", "<<"]
)
def test_a_text_that_is_written_is_read_as_that_text(value: str) -> None:
    assert read_yaml_text(yaml.safe_dump({"a": value}), "run.yaml") == {"a": value}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "has the key 'a' a second time (first at line 1) at line 3"),
        ("b:\n  {a: 1, a: 1}", "has the key 'a' a second time (first at line 2) at line 2"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested too deep"),
        ("a: " + "{b: " * 60 + "}" * 60, "more than 50 levels"),
        (f"a: {'9' * 4400}", "a number of more than 100 digits at line 1"),
        (f"\na: 0x{'f' * 5000}", "a number of more than 100 digits at line 2"),
        ("a: !!int x", "not what its tag says"),
        ("a: !!bool x", "not what its tag says"),
        ("a: !!int 1:30:00", "not what its tag says"),
        ("a: !!timestamp x", "has the tag !!timestamp"),
        ("a: !!python/name:os.system", "has the tag !!python/name:os.system"),
        ("a: &a {b: *a}", "more than 50 levels"),
        (BOMB, "100,000 values"),
        ('a: "\\ud800"', "half of a character"),
        ('a: "\\0"', "a NUL character"),
        ("a: b\n\x07", "not YAML at line 2: a control character"),
        ("a: x" + "y" * 100_000, "has 100,004 characters"),
    ],
    ids=short,
)
def test_what_cannot_be_meant_is_refused_in_a_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        read_yaml_text(text, "run.yaml")
    assert str(refused.value).startswith("run.yaml ")
    assert said in str(refused.value)


def test_merged_keys_are_no_second_ones() -> None:
    text = "one: &one {a: 1, b: 2}\ntwo: {<<: *one, a: 3}"
    assert read_yaml_text(text, "run.yaml")["two"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.iterations=true", "training.iterations: must be a number, and not true or false"),
        ("training.learning_rate=true", "training.learning_rate: must be a number"),
        ("model.width=false", "model.width: must be a number"),
        ("rewards.shapes.weight=true", "rewards.shapes.weight: must be a number"),
        ("algorithm.timesteps=true", "algorithm.timesteps: must be a number"),
        ("training.process_timeout=1:30:00", "unable to parse string as a number (given '1:30:00')"),
        ("training.iterations=1:30:00", "unable to parse string as an integer (given '1:30:00')"),
        ("scoring.timeout=1.0e+300", "scoring.timeout: Input should be less than or equal to 10000000"),
        ("rewards.shapes.timeout=1.0e+300", "rewards.shapes.timeout: Input should be less than or equal to 10000000"),
        (f"training.seed={2**63}", "training.seed: must be at most 9,223,372,036,854,775,807"),
        ("training.group_size=1000000000", "is more than 1,000,000 images an iteration; lower one of them"),
        ("training.weight_decay=10000", "weight_decay (10000) times learning_rate (0.003) is 1 or more"),
    ],
    ids=short,
)
def test_a_value_that_is_another_kind_or_beyond_all_use_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("shapes", ["training.learning_rate=3.0e-3", override])
    assert said in str(refused.value)


def test_a_truth_value_may_be_written_as_people_do() -> None:
    config = load_config("shapes", ["model.offload=yes", "training.gradient_checkpointing=true"])
    assert config.model.offload
    assert config.training.gradient_checkpointing


def test_many_mistakes_are_counted_and_the_first_are_told() -> None:
    with pytest.raises(UserError, match=r"30 mistakes: \(1\) unknown key training.x0.* and 10 more$"):
        load_config("shapes", [f"training.x{n}=1" for n in range(30)])


@pytest.mark.parametrize(
    "override", [f"training.{'x' * 100_000}=1", f"training.decay={'x' * 90_000}", "a\nb=1"], ids=short
)
def test_a_key_or_value_of_any_length_is_a_short_line(override: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("shapes", [override])
    assert len(str(refused.value)) < 2000
    assert str(refused.value).isprintable()
