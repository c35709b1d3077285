"""What is known of a run before its first picture: bad prompts, rewards that would fail, prompts that are cut."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError, in_ranges
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ModelConfig, RewardTerm, RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import Model, TextLengths
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.rewards import Reward, RewardSet, WeightedReward, load_rewards
from dgpo_plugin.rewards.served.client import RemoteReward
from dgpo_plugin.rewards.trial import is_tried
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checks import cut_prompts
from tests.conftest import SMALL, one_reward
from tests.dgpo_plugin.families import FAMILIES, Family

pytestmark = pytest.mark.fast

CASE = Path(__file__).parents[2] / "cases" / "prompts" / "one-bad-of-24.txt"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads the model has not looked before."""

    def loads(*given: object, **options: object) -> Model:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("dgpo_plugin.training.build.load_base", loads)


def refused(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        build_trainer(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- prompts that a reward cannot judge

STRAIGHT = """
from dgpo_plugin.rewards import Reward

class Straight(Reward):
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def check(self, prompts):
        return [f"{p.text[:9]!r} has no straight quotes" for p in prompts if '"' not in p.text]
"""


@pytest.fixture
def straight(tmp_path: Path) -> str:
    (tmp_path / "straight.py").write_text(STRAIGHT)
    return f"{tmp_path / 'straight.py'}:Straight"


@pytest.mark.usefixtures("no_model")
def test_one_bad_prompt_of_24_is_told_with_its_line_before_the_model_is_loaded(straight: str) -> None:
    config = load_config("shapes", [*SMALL, f"rewards={straight}", f"prompts.train={CASE}", "prompts.held_out=null"])
    assert refused(config) == (
        f"reward {straight}, prompts.train (1 of 24): {CASE}:18: 'a shop fr' has no straight quotes"
    )


@pytest.mark.usefixtures("no_model")
def test_bad_prompts_of_all_sets_for_all_rewards_are_told_at_once(straight: str, tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held.txt"
    records: list[dict[str, Any]] = [{"prompt": '"a"', "objects": []}, {"prompt": "b"}, {"prompt": "b", "objects": []}]
    train.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    held_out.write_text("".join(f"n{n}{'' if n % 2 else ' quoted'}\n" for n in range(12)) + '"x"\n')
    rewards = f"{{quoted: {{reward: '{straight}'}}, shapes: 1, brightness: 1}}"
    config = load_config(
        "shapes", [*SMALL, f"rewards={rewards}", f"prompts.train={train}", f"prompts.held_out={held_out}"]
    )
    first, second, third, fourth = refused(config).split("; reward ")
    assert first == (
        f"reward quoted, prompts.train (2 of 3): {train}:3: 'b' has no straight quotes; "
        f"{train}:5: 'b' has no straight quotes"
    )
    assert second.startswith(f"quoted, prompts.held_out (12 of 13): {held_out}:1: 'n0 quoted' has")
    assert second.endswith(f"'n4 quoted' has no straight quotes; and 7 more prompts ({held_out}:6-12)")
    assert third == (
        f"shapes, prompts.train (1 of 3): {train}:3: prompt 'b' has no metadata; take its prompts from shapes/..."
    )
    assert fourth.startswith(f"shapes, prompts.held_out (13 of 13): {held_out}:1: prompt 'n0 quoted' has no metadata")


def test_places_are_told_in_short() -> None:
    places = ["a.txt:6", "a.txt:7", "a.txt:8", "a.txt:10", "b.txt:11", "b.txt:12", "by hand", "b.txt:3"]
    assert in_ranges(places) == "a.txt:6-8, 10, b.txt:11-12, by hand, b.txt:3"


def test_every_prompt_knows_where_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\none\n\ntwo\n")
    found = [prompt.place for prompt in read_prompts(tmp_path / "a.txt")]
    assert found == [f"{tmp_path / 'a.txt'}:{n}" for n in (2, 4)]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two", "x": 1}\n')
    assert [prompt.place for prompt in read_prompts(tmp_path / "a.jsonl")] == [
        f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 3)
    ]
    assert Prompt("a", place="here") == Prompt("a")


def test_all_lines_of_a_file_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": 1}\nno JSON\n' + "[]\n" * 5)
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert re.findall(rf"{file}:(\d+): ", str(caught.value)) == ["2", "3", "4", "5", "6"]
    assert str(caught.value).endswith(f"; and 2 more lines ({file}:7-8)")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "must return a list of lines, empty if it can judge all; it returned None"),
        ("'abc'", "must return a list of lines"),
        ("[1]", "must return a list of lines"),
        ("1 / 0", r"failed with ZeroDivisionError: division by zero \(at .*mine.py:6\)"),
        ("exit()", r"failed with SystemExit: None \(at .*mine.py:6\)"),
    ],
)
def test_a_check_that_is_broken_is_one_line(returned: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dgpo_plugin.rewards import Reward\nclass Mine(Reward):\n    def __call__(self, images, prompts):\n"
        f"        return images.mean((1, 2, 3))\n    def check(self, prompts):\n        return {returned}\n"
    )
    with pytest.raises(UserError, match=rf"^reward mine: its check\(prompts\) {said}"):
        load_rewards({"mine": RewardTerm(reward=f"{tmp_path / 'mine.py'}:Mine")}).check([Prompt("a")])


def test_a_check_that_is_about_the_whole_set_is_told_as_it_is() -> None:
    class Many(Reward):
        def check(self, prompts: Sequence[Prompt]) -> list[str]:
            return ["more than three\nprompts"] if len(prompts) > 3 else []

    with pytest.raises(UserError, match="^reward mine: more than three prompts$"):
        RewardSet({"mine": WeightedReward(Many())}).check([Prompt(str(n), place=f"a.txt:{n}") for n in range(9)])


class Odd(dict[str, Any]):
    """Metadata that even a look into it fails on."""

    def __contains__(self, key: object) -> bool:
        raise KeyError(key)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("shapes", "prompt 'b' has no metadata"),
        ("geneval", "prompt 'b'"),
        ("geneval-strict", "prompt 'b'"),
        ("ocr", "prompt 'b'"),
    ],
)
def test_a_plan_tells_bad_prompts_without_any_weights(reward: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b\n")
    asked = ["plan", "shapes", "--set", f"rewards={reward}", "--set", f"prompts.train={tmp_path / 'b.txt'}"]
    result = CliRunner().invoke(main, [*asked, "--set", "prompts.held_out=null"])
    assert result.exit_code == 2
    assert f"error: reward {reward}, prompts.train (1 of 1): {tmp_path / 'b.txt'}:1: {said}" in result.stderr


def test_metadata_that_nobody_thought_of_is_told_with_its_place() -> None:
    rewards = load_rewards({"shapes": RewardTerm()})
    with pytest.raises(UserError, match="^reward shapes: a.jsonl:7: prompt 'b' has metadata that cannot be read"):
        rewards.check([Prompt("b", {"objects": []}), Prompt("b", Odd(), place="a.jsonl:7")])


# ---- rewards of one's own are tried


def own(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(f"import time, torch\ndef reward(images, prompts):\n    {body}\n")
    return f"{folder / 'mine.py'}:reward"


def with_reward(name: str, *more: str) -> RunConfig:
    return load_config("shapes", [*SMALL, f"rewards={{mine: {{reward: '{name}', timeout: 60}}}}", *more])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return images.mean((1, 2, 3)), {}", r"returned 2 things, as in \(scores, info\)"),
        ("return None", r"returned nothing \(None\)"),
        ("return images.mean((1, 2, 3)).mean()", r"returned shape \(\) for 2 images"),
        ("return images.mean((2, 3))", r"returned shape \(2, 3\) for 2 images"),
        ("return images.mean((1, 2, 3))[:1]", r"returned shape \(1,\) for 2 images"),
        ("return {'reward': images.mean((1, 2, 3))}", "returned an object of class dict"),
        ("return [str(p.text) for p in prompts]", "returned a list with .* in it"),
        (
            "return prompts[0]['prompt']",
            r"failed with TypeError: 'Prompt' object is not subscriptable \(at .*mine.py:3\)",
        ),
        (
            "return torch.tensor([len(p) for p in prompts])",
            r"failed with TypeError: object of type 'Prompt' has no len",
        ),
        ("return images.view(2, -1, 7).mean((1, 2))", "failed with RuntimeError: shape '.*' is invalid"),
        ("raise SystemExit", r"failed with SystemExit \(at"),
        ("torch.set_default_dtype(torch.float64); return images.mean((1, 2, 3))", "changes torch's default dtype"),
        ("return prompts[0].metadata['absent']", "failed with KeyError: 'absent'"),
    ],
)
def test_what_a_reward_of_ones_own_gets_wrong_is_told_before_the_model_is_loaded(
    body: str, said: str, tmp_path: Path
) -> None:
    message = refused(with_reward(own(tmp_path, body)))
    assert re.match(rf"reward mine, tried on 2 noisy pictures of 64 x 64: {said}", message), message


def test_a_value_that_is_not_finite_for_noise_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_trainer(with_reward(own(tmp_path, "return [1.5, float('nan')]")))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line == ("reward mine: gives 1.5, nan for noisy pictures of 64 x 64; a value that is not finite ends a run")


def test_it_is_tried_on_pictures_of_the_trainings_size_with_real_prompts(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    seen = "(list(images.shape), float(images.min()), float(images.max()), [p.text for p in prompts])"
    body = f"open({str(said)!r}, 'a').write(repr({seen}) + '\\n'); return images.mean((1, 2, 3))"
    (tmp_path / "one.txt").write_text("only one\n")
    name = own(tmp_path, body)
    build_trainer(with_reward(name))
    build_trainer(with_reward(name, "model.width=64", "model.height=32", f"prompts.train={tmp_path / 'one.txt'}"))
    (first, low, high, texts), (second, *_, one) = (eval(line) for line in said.read_text().splitlines())
    assert (first, second, one) == ([2, 3, 64, 64], [2, 3, 32, 64], ["only one"] * 2)
    assert 0 <= low < 0.05 < 0.95 < high <= 1
    assert len(set(texts)) == 2


def test_the_trial_changes_nothing_of_the_run(tmp_path: Path) -> None:
    """The same numbers, whatever the reward draws and changes in its trial."""
    plain = own(tmp_path, "return images.mean((1, 2, 3))")
    (tmp_path / "other").mkdir()
    drawing = own(tmp_path / "other", "torch.manual_seed(1); torch.rand(9); return images.mean((1, 2, 3))")
    adapters = [
        run.train(with_reward(name), tmp_path / f"run{n}", Console(quiet=True))
        for n, name in enumerate((plain, drawing))
    ]
    first, second = ((adapter.parent / "metrics.jsonl").read_text().splitlines() for adapter in adapters)
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in json.loads(a).items() if "seconds" not in k} == {
            k: v for k, v in json.loads(b).items() if "seconds" not in k
        }


@pytest.mark.usefixtures("no_model")
def test_a_trial_that_never_ends_is_given_up(tmp_path: Path) -> None:
    name = own(tmp_path, "time.sleep(60)")
    config = load_config("shapes", [*SMALL, f"rewards={{mine: {{reward: '{name}', timeout: 0.05}}}}"])
    assert "64 x 64: no answer in twice 0.05 s; raise scoring.timeout" in refused(config)


def test_ours_are_not_tried_and_whatever_is_anothers_is() -> None:
    class Own(Reward):
        pass

    ours = load_rewards({"brightness": RewardTerm(), "shapes": RewardTerm(), "ocr": RewardTerm()})
    assert not any(is_tried(member.reward) for member in ours.members.values())
    assert is_tried(Own())
    assert is_tried(object.__new__(RemoteReward))
    assert is_tried(one_reward(lambda images, prompts: [0.0]).members["mine"].reward)


# ---- prompts that are cut


class Reads(Model):
    """A model that is told how long every text is to its encoders."""

    def __init__(self, *lengths: TextLengths) -> None:
        self.lengths = list(lengths)

    def text_lengths(self, texts: Sequence[str]) -> list[TextLengths]:
        return self.lengths


Reads.__abstractmethods__ = frozenset()
PROMPTS = [Prompt("short"), Prompt("middle", place="a.txt:2"), Prompt("long", place="a.txt:3")]
SETTING = "model.max_sequence_length"


@pytest.mark.parametrize(
    ("lengths", "lines"),
    [
        ([], []),
        ([TextLengths("text_encoder", 77, [3, 70, 77])], []),
        (
            [TextLengths("text_encoder", 77, [3, 70, 78])],
            [
                "1 of 3 prompts are longer than what this model reads (first: a.txt:3, 78 tokens; it reads 77 in "
                "text_encoder), and the reward judges them by all that they say; shorten them"
            ],
        ),
        (  # T5 reads all: only the CLIP encoders cut
            [
                TextLengths("text_encoder", 77, [3, 100, 200]),
                TextLengths("text_encoder_2", 77, [3, 100, 200]),
                TextLengths("text_encoder_3", 256, [3, 110, 220], SETTING),
            ],
            [
                "2 of 3 prompts are longer than the 77 tokens of text_encoder and text_encoder_2 (first: "
                "a.txt:2, 100 tokens); text_encoder_3 reads them whole"
            ],
        ),
        (
            [
                TextLengths("text_encoder", 77, [3, 100, 300]),
                TextLengths("text_encoder_3", 256, [3, 110, 310], SETTING),
            ],
            [
                "1 of 3 prompts are longer than what this model reads (first: a.txt:3, 310 tokens; it reads 77 in "
                "text_encoder, 256 in text_encoder_3), and the reward judges them by all that they say; shorten them "
                "or raise model.max_sequence_length",
                "1 of 3 prompts are longer than the 77 tokens of text_encoder (first: a.txt:2, 100 tokens); "
                "text_encoder_3 reads them whole",
            ],
        ),
        # A short setting beside an encoder that reads all is the user's choice.
        ([TextLengths("text_encoder", 77, [3, 40, 50]), TextLengths("text_encoder_3", 16, [3, 40, 50], SETTING)], []),
    ],
)
def test_prompts_that_are_cut_are_told_by_encoder(lengths: list[TextLengths], lines: list[str]) -> None:
    assert cut_prompts(Reads(*lengths), PROMPTS) == lines  # type: ignore[abstract]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_how_long_texts_are_to_it(name: str, tmp_path: Path) -> None:
    family: Family = FAMILIES[name]
    family.build(tmp_path)
    config = ModelConfig(
        path=str(tmp_path), width=family.width, height=family.height, max_sequence_length=family.tokens
    )
    model = load_model(config)
    short, long = "a", "a red circle " * 40
    lengths = model.text_lengths([short, long])
    assert lengths
    # FLUX's T5 stand-in has one token for every text.
    assert all(each.tokens == [1, 1] or each.tokens[0] < each.tokens[1] > each.limit for each in lengths)
    if name == "flux":  # whose CLIP gives a vector for the whole text
        assert [each.encoder for each in lengths] == ["text_encoder_2"]


def test_a_run_says_which_prompts_are_cut_before_its_first_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, straight: str
) -> None:
    (tmp_path / "a.txt").write_text('"a"\n' + '"a red circle and a blue square and a green triangle"\n')
    config = load_config("shapes", [*SMALL, f"rewards={straight}", f"prompts.train={tmp_path / 'a.txt'}"])
    build_trainer(config.model_copy(update={"prompts": config.prompts.model_copy(update={"held_out": None})}))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(
        "prompts.train: 1 of 2 prompts are longer than the 12 tokens of text_encoder and text_encoder_2"
    )
    assert f"(first: {tmp_path / 'a.txt'}:2, " in line
