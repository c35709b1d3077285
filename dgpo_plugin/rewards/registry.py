"""The rewards by name: ours, those of other packages, and a user's own files."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from dgpo_plugin.common.errors import UserError, did_you_mean
from dgpo_plugin.common.user_file import import_from_file, is_from_file
from dgpo_plugin.config.fields import RewardConfig
from dgpo_plugin.rewards.base import Reward, WeightedSum

GROUP = "dgpo_plugin.rewards"
"""Entry points of other packages: a name, and a function of (images, prompts) or a class whose instances are."""


@dataclass(frozen=True)
class RewardInfo:
    """A reward that is not loaded yet.

    Attributes:
        made_by: ``module:class``, or an entry point.
        measures, range, weights, licence: for people; the licence is the weights', and whose word it is: the page that
            they are fetched from, the repository's, or "not verified", where neither was seen.
        parameters: of its networks.
        needs: modules that must be installed, by the extra ``extra``.
        fixed: arguments of the class that the name stands for.
    """

    made_by: str | EntryPoint
    measures: str
    range: str = "[0, 1]"
    weights: str = "none"
    licence: str = ""
    parameters: int = 0
    needs: tuple[str, ...] = ()
    extra: str = "rewards"
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module) is None]

    @property
    def install(self) -> str:
        """How to get what is missing, or nothing."""
        return f"needs {', '.join(self.missing)}; pip install 'dgpo-plugin[{self.extra}]'" if self.missing else ""

    def facts(self) -> list[str]:
        """Range, weights, licence, size, and whether it is installed."""
        licence = f" ({self.licence})" if self.licence else ""
        size = [f"{self.parameters / 1e6:.0f} M parameters"] if self.parameters else []
        return [self.range, f"weights: {self.weights}{licence}", *size, self.install or "installed"]

    def thing(self) -> Any:
        """The class or function, imported."""
        if isinstance(self.made_by, EntryPoint):
            return self.made_by.load()
        module, kind = self.made_by.split(":")
        return getattr(importlib.import_module(module), kind)


CLIP_L, CLIP_H, MASK2FORMER_S = 427_616_513, 986_109_441, 68_741_083
"""Parameters of the networks that several rewards are made of."""
CLIP_LICENCE = "CLIP: MIT, not verified"
REWARDS: dict[str, RewardInfo] = {
    "shapes": RewardInfo(
        "dgpo_plugin.worlds.shapes.reward:ShapesReward",
        "the embedded world: half for the share of what was asked, half for all of it",
    ),
    "ocr": RewardInfo(
        "dgpo_plugin.rewards.ocr:OcrReward",
        "the words in double quotes (or metadata text) as read back",
        weights="PP-OCRv6, in the package rapidocr",
        licence="Apache-2.0, its README's",
        needs=("rapidocr", "onnxruntime", "rapidfuzz"),
    ),
    "hpsv2": RewardInfo(
        "dgpo_plugin.rewards.networks.hpsv2:HPSv2Reward",
        "people's preference, HPS v2.0; compare within a prompt",
        range="a cosine, typically 0.2 to 0.35",
        weights="xswu/HPSv2",
        licence="Apache-2.0, its repository's",
        needs=("ftfy",),
        parameters=CLIP_H,
        fixed={"version": "v2.0"},
    ),
    "hpsv2.1": RewardInfo(
        "dgpo_plugin.rewards.networks.hpsv2:HPSv2Reward",
        "people's preference, HPS v2.1; compare within a prompt",
        range="a cosine, typically 0.2 to 0.35",
        weights="xswu/HPSv2",
        licence="Apache-2.0, its repository's",
        needs=("ftfy",),
        parameters=CLIP_H,
        fixed={"version": "v2.1"},
    ),
    "imagereward": RewardInfo(
        "dgpo_plugin.rewards.networks.imagereward:ImageReward",
        "people's preference, ImageReward",
        range="roughly normal: mean 0, deviation 1",
        weights="THUDM/ImageReward",
        licence="Apache-2.0, its repository's",
        parameters=446_206_689,
    ),
    "geneval": RewardInfo(
        "dgpo_plugin.rewards.geneval.reward:GenEvalReward",
        "GenEval's objects, counts, colours and relations, with Flow-GRPO's partial credit",
        range="[-14, 1]",
        weights="facebook/mask2former-swin-small-coco-instance, openai/clip-vit-large-patch14",
        licence=f"Mask2Former: its card says other; {CLIP_LICENCE}",
        parameters=CLIP_L + MASK2FORMER_S,
        fixed={"strict": False},
    ),
    "geneval-strict": RewardInfo(
        "dgpo_plugin.rewards.geneval.reward:GenEvalReward",
        "GenEval's own verdict: all that was asked for is there, or not",
        range="0 or 1",
        weights="facebook/mask2former-swin-small-coco-instance, openai/clip-vit-large-patch14",
        licence=f"Mask2Former: its card says other; {CLIP_LICENCE}",
        parameters=CLIP_L + MASK2FORMER_S,
        fixed={"strict": True},
    ),
    "pickscore": RewardInfo(
        "dgpo_plugin.rewards.networks.clip:PickScore",
        "which picture people would pick for the text",
        "about 20 to 24 (option divisor: 26 for the scale of training)",
        "yuvalkirstain/PickScore_v1",
        "MIT, not verified",
        CLIP_H,
    ),
    "clipscore": RewardInfo(
        "dgpo_plugin.rewards.networks.clip:ClipScore",
        "how well the picture fits the text",
        "[-1, 1]",
        "openai/clip-vit-large-patch14",
        CLIP_LICENCE,
        CLIP_L,
    ),
    "aesthetic": RewardInfo(
        "dgpo_plugin.rewards.networks.aesthetic:Aesthetic",
        "looks, whatever is shown (LAION)",
        "about 1 to 10",
        "trl-lib/ddpo-aesthetic-predictor, openai/clip-vit-large-patch14",
        f"its card names none, Apache-2.0 in other copies; {CLIP_LICENCE}",
        CLIP_L,
    ),
    "sharpness": RewardInfo(
        "dgpo_plugin.rewards.image_statistics:Statistic",
        "edges; a fall is blur",
        "at least 0",
        fixed={"statistic": "sharpness"},
    ),
    "colour-entropy": RewardInfo(
        "dgpo_plugin.rewards.image_statistics:Statistic",
        "richness of colours",
        "[0, 9] bits",
        fixed={"statistic": "colour-entropy"},
    ),
    "brightness": RewardInfo(
        "dgpo_plugin.rewards.image_statistics:Statistic", "mean of all channels", fixed={"statistic": "brightness"}
    ),
    "jpeg-size": RewardInfo(
        "dgpo_plugin.rewards.image_statistics:Statistic",
        "detail, or noise: size as JPEG",
        "kilobytes",
        fixed={"statistic": "jpeg-size"},
    ),
    "unifiedreward": RewardInfo(
        "dgpo_plugin.rewards.served.judge:UnifiedReward",
        "alignment and quality as UnifiedReward judges them, behind an endpoint of yours (option url)",
        range="[1, 5]",
        weights="CodeGoat24/UnifiedReward-7b-v1.5, on the endpoint",
        licence="UnifiedReward-7b's card says MIT; this version's not verified",
    ),
    "judge": RewardInfo(
        "dgpo_plugin.rewards.served.judge:JudgeReward",
        "the number that any vision model answers to a question of yours (options url, model, question)",
        range="[lowest, highest], its options",
        weights="the endpoint's",
        licence="the weights' own",
    ),
    "remote": RewardInfo(
        "dgpo_plugin.rewards.served.client:RemoteReward",
        "what servers of `dgpo serve-reward` give (option urls)",
        range="the served reward's",
        weights="the servers'",
        licence="the weights' own",
    ),
}


def reward_names() -> dict[str, RewardInfo]:
    """Ours, and those that installed packages bring."""
    points = entry_points(group=GROUP)
    found = {point.name: RewardInfo(point, f"from {point.value}", "its own", "its own") for point in points}
    return {**found, **REWARDS}


def load_reward(config: RewardConfig) -> Reward:
    """Load what the configuration names, once; a :class:`WeightedSum` if it names several.

    Raises:
        UserError: no such reward, one that needs a package that is not installed, an option that it does not have, or
            a user's own that is broken.
    """
    names = list(config.sum) or [config.name or ""]
    for name in config.options:
        if name not in names:
            raise UserError(f"reward.options: {name} is not a reward of this run{did_you_mean(name, names)}")
    if config.sum:
        return WeightedSum({name: (_load(name, config), weight) for name, weight in config.sum.items()})
    return _load(names[0], config)


def _load(name: str, config: RewardConfig) -> Reward:
    options = config.options.get(name, {})
    if is_from_file(name):
        return _made(name, import_from_file(name, "reward"), config, options)
    known = reward_names()
    if name not in known:
        raise UserError(f"reward.name: no reward {name!r}{did_you_mean(name, known)}; or name a file.py:function")
    info = known[name]
    if info.missing:
        raise UserError(f"reward {name}: {info.install}")
    return _made(name, info.thing(), config, options, info.fixed)


def _made(
    name: str,
    thing: Any,
    config: RewardConfig,
    options: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
) -> Reward:
    """Make an instance of a class, with the configuration if it takes one, and check that it can be called."""
    fixed = fixed or {}
    parameters = inspect.signature(thing).parameters if isinstance(thing, type) else {}
    known = [key for key in parameters if key != "config" and key not in fixed]
    for key in options:
        if key not in known:
            others = did_you_mean(key, known) if known else ", nor any other"
            raise UserError(f"reward.options: {name} has no option {key!r}{others}")
    made: Reward = thing
    if isinstance(thing, type):
        given = {"config": config} if "config" in parameters else {}
        try:
            made = thing(**given, **fixed, **options)
        except UserError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"reward {name}: {type(error).__name__} while loading it: {error}") from error
    if not callable(made):
        raise UserError(f"reward {name}: cannot be called; it must be a function of (images, prompts)")
    try:
        inspect.signature(made).bind(None, None)
    except TypeError as error:
        raise UserError(f"reward {name}: must take (images, prompts); {error}") from error
    except ValueError:  # a built-in without a signature
        pass
    return made
