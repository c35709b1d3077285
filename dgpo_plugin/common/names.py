"""Everything that is chosen by a name, but for rewards (:mod:`dgpo_plugin.rewards.registry`): one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dgpo_plugin.common.registry import Entry, Registry

ALGORITHMS = Registry(
    "algorithm",
    "algorithms",
    {
        "dgpo": Entry("dgpo_plugin.algorithms.dgpo:DGPO", "preferences of prompt groups, deterministic rollouts"),
        "nft": Entry(
            "dgpo_plugin.algorithms.nft:NFT", "DiffusionNFT: towards good pictures, away from bad ones' mirror"
        ),
        "elbo": Entry("dgpo_plugin.algorithms.elbo:Elbo", "policy gradients on the likelihood's bound, as in V-GRPO"),
        "awm": Entry("dgpo_plugin.algorithms.awm:AWM", "advantage weighted matching, stochastic rollouts"),
        "ram": Entry("dgpo_plugin.algorithms.ram:RAM", "a regression on the base's velocity, bent by the reward"),
        "crd": Entry("dgpo_plugin.algorithms.crd:CRD", "the policy's implied reward, regressed on the real one"),
        "diffusion-dpo": Entry(
            "dgpo_plugin.algorithms.diffusion_dpo:DiffusionDPO", "preferred pairs of pictures, nothing sampled"
        ),
        "online-dpo": Entry(
            "dgpo_plugin.algorithms.diffusion_dpo:OnlineDPO", "the best against the worst of each prompt group"
        ),
        "flow-grpo": Entry("dgpo_plugin.algorithms.flow_grpo:FlowGRPO", "policy gradients through stochastic steps"),
        "flow-grpo-fast": Entry(
            "dgpo_plugin.algorithms.flow_grpo:FlowGRPOFast", "the same through a window of a few steps"
        ),
        "flow-grpo-guard": Entry(
            "dgpo_plugin.algorithms.flow_grpo_guard:FlowGRPOGuard", "Flow-GRPO, its ratio alike at every step"
        ),
        "flow-grpo-gardo": Entry(
            "dgpo_plugin.algorithms.flow_grpo_gardo:FlowGRPOGardo", "Flow-GRPO against reward hacking: GARDO's gated KL"
        ),
        "flow-dppo": Entry(
            "dgpo_plugin.algorithms.flow_dppo:FlowDPPO", "stochastic steps within a divergence, no ratio clipped"
        ),
    },
    Entry,
    hint="name your own, file.py:Algorithm",
)
"""Each target is a class, see :class:`dgpo_plugin.algorithms.base.Algorithm`."""

FAMILIES = Registry(
    "model family",
    "model_families",
    {
        "StableDiffusion3Pipeline": Entry("dgpo_plugin.models.families.sd3:SD3Model"),
        "FluxPipeline": Entry("dgpo_plugin.models.families.flux:FluxModel"),
        "Flux2Pipeline": Entry("dgpo_plugin.models.families.flux2:Flux2DevModel"),
        "Flux2KleinPipeline": Entry("dgpo_plugin.models.families.flux2:Flux2KleinModel"),
        "QwenImagePipeline": Entry("dgpo_plugin.models.families.qwen_image:QwenImageModel"),
        "ZImagePipeline": Entry("dgpo_plugin.models.families.z_image:ZImageModel"),
        "SanaPipeline": Entry("dgpo_plugin.models.families.sana:SanaModel"),
        "StableDiffusionXLPipeline": Entry("dgpo_plugin.models.families.sdxl:SDXLModel"),
        "StableDiffusionPipeline": Entry("dgpo_plugin.models.families.sd15:SD15Model"),
    },
    Entry,
    hint="docs/adding-a-model.md says how to add one",
)
"""By diffusers' pipeline class; each target is a subclass of :class:`dgpo_plugin.models.pipeline.PipelineModel`."""

PROMPT_SETS = Registry(
    "prompt set",
    "prompt_sets",
    {
        "geneval/train": Entry("dgpo_plugin.prompts.geneval:train_prompts", "GenEval's six tasks, from templates"),
        "geneval/validation": Entry("dgpo_plugin.prompts.geneval:validation_prompts", "likewise, other scenes"),
        "geneval/test": Entry("dgpo_plugin.prompts.geneval:official_prompts", "GenEval's own 553"),
        "ocr/train": Entry("dgpo_plugin.prompts.ocr:train_prompts", "signs and labels with words to render"),
        "ocr/validation": Entry("dgpo_plugin.prompts.ocr:validation_prompts", "likewise, other words"),
        "ocr/test": Entry("dgpo_plugin.prompts.ocr:held_out_prompts", "likewise, other words"),
        "t2i-compbench/color": Entry(
            "dgpo_plugin.prompts.t2i_compbench:color_prompts", "T2I-CompBench's own 300: things in a color each"
        ),
        "t2i-compbench/shape": Entry(
            "dgpo_plugin.prompts.t2i_compbench:shape_prompts", "T2I-CompBench's own 300: things of a shape each"
        ),
        "t2i-compbench/texture": Entry(
            "dgpo_plugin.prompts.t2i_compbench:texture_prompts", "T2I-CompBench's own 300: things of a material each"
        ),
        "t2i-compbench/spatial": Entry(
            "dgpo_plugin.prompts.t2i_compbench:spatial_prompts",
            "T2I-CompBench's own 300: where one thing is to another",
        ),
        "t2i-compbench/non_spatial": Entry(
            "dgpo_plugin.prompts.t2i_compbench:non_spatial_prompts",
            "T2I-CompBench's own 300: what somebody or something does",
        ),
        "t2i-compbench/complex": Entry(
            "dgpo_plugin.prompts.t2i_compbench:complex_prompts",
            "T2I-CompBench's own 300: several properties and relations",
        ),
    },
    Entry,
    hint="name a .txt or .jsonl file, hf:owner/dataset, or your own file.py:function",
)
"""Each target is a function of nothing that returns prompts. A world's sets are ``<world>/<set>``, besides."""

WORLDS = Registry(
    "world",
    "worlds",
    {
        "shapes": Entry("dgpo_plugin.worlds.shapes:WORLD", "colored shapes, a verifier, a model of 1.7 M"),
        "shapes-2": Entry("dgpo_plugin.worlds.shapes_2:WORLD", "more figures, colors and sizes, for comparisons"),
        "words": Entry("dgpo_plugin.worlds.words:WORLD", "words of three letters for the reward ocr, 64 x 32 pixels"),
    },
    Entry,
)
"""Each target is a :class:`World`."""


@dataclass(frozen=True)
class World:
    """A small world that comes whole: its name is a model's path, a reward's name and the first half of prompt sets'.

    What it names is given as ``package.module:Name`` or as it is.

    Attributes:
        pipeline: folder of a diffusers pipeline, ``package:folder`` or its path.
        prompt_sets: functions of nothing that return prompts, by the second half of their name.
        reward: what ``rewards`` may name, or nothing.
        about_reward: what that measures, in a line.
        pretrain: ``package.module:function`` of (output folder, seed, iterations or None, compile or not), which makes
            the pipeline anew; empty where it cannot be.
        size: width and height of its pictures in pixels, where they are not what the pipeline's own files say (a
            pipeline of SD3's class knows squares only).
    """

    pipeline: str
    prompt_sets: Mapping[str, str | Callable[[], Any]] = field(default_factory=dict)
    reward: str | Callable[..., Any] = ""
    about_reward: str = ""
    pretrain: str | Callable[..., Any] = ""
    size: tuple[int, int] | None = None
