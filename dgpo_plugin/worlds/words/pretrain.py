"""How the shipped pipeline was made: ``dgpo worlds pretrain words`` runs this file.

A tokenizer that spells, then the VAE on rendered pictures, then the denoiser and its two CLIP text encoders jointly on
cached latents by flow matching. The result is a plain diffusers ``StableDiffusion3Pipeline`` folder; the log beside it
(``pretrain.jsonl``) holds the settings, the losses and how many words were read right on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.distributed.processor import Work, settled
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.worlds.shapes.pretrain import save_in_fp16
from dgpo_plugin.worlds.shapes.pretrain_loops import encode_pictures, train_vae
from dgpo_plugin.worlds.words.captions import COLORS, FONTS, GROUNDS, TRAIN, prompt
from dgpo_plugin.worlds.words.pretrain_loops import train_denoiser
from dgpo_plugin.worlds.words.pretrain_networks import (
    LATENT_HEIGHT,
    LATENT_WIDTH,
    WIDTH,
    PretrainConfig,
    build_pipeline,
)
from dgpo_plugin.worlds.words.render import HEIGHT, render
from dgpo_plugin.worlds.words.render import WIDTH as PICTURE_WIDTH


def pretrain(output: Path, seed: int = 0, iterations: int | None = None, compile_model: bool = False) -> None:  # noqa: ARG001 (shapes' needs it)
    """Train the words pipeline from nothing and save it to a folder, which is made.

    Args:
        iterations: of the denoiser; None for the shipped pipeline's.
        compile_model: has no effect: compiling takes longer than it saves here.
    """
    changes = {} if iterations is None else {"iterations": iterations}
    make_pipeline(output, PretrainConfig(seed=seed, **changes))


def make_pipeline(output: Path, config: PretrainConfig, keep: Callable[..., None] = lambda *_: None) -> None:
    """Train a words pipeline of any settings from nothing and save it to a folder, which is made.

    Args:
        keep: called after every evaluation with the pipeline and the iteration.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(derive_seed(config.seed, "pretrain"))
    with (output / "pretrain.jsonl").open("w", encoding="utf-8") as log:

        def record(**entry: Any) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        # The first thing, because what it may have to mask is fixed once anything was computed.
        precision = settled("the denoiser's precision", "auto", torch.device("cpu"), lambda: denoiser_work(config))
        numbers = {**asdict(config), "precision": precision}
        record(stage="config", torch=torch.__version__, threads=torch.get_num_threads(), **numbers)
        prompts, pictures = draw_words(config)
        vae = train_vae(pictures, config, record, AutoencoderKL.from_pretrained(world_pipeline("shapes") / "vae"))
        latents = encode_pictures(vae, pictures)
        torch.manual_seed(derive_seed(config.seed, "denoiser weights"))  # whatever the VAE's training drew
        pipeline = build_pipeline(vae, config)
        in_bf16 = precision == "bf16"
        train_denoiser(pipeline, latents, prompts, config, record, lambda at: keep(pipeline, at), in_bf16=in_bf16)
        save_in_fp16(pipeline, output)


def denoiser_work(config: PretrainConfig) -> Work:
    """The denoiser's layers in a step: the picture's tokens and the text's, each through a block's own."""
    tokens = config.batch * (LATENT_HEIGHT // 2) * (LATENT_WIDTH // 2)
    shapes = ((WIDTH, WIDTH, 4), (WIDTH, 4 * WIDTH, 1), (4 * WIDTH, WIDTH, 1))
    return tuple((tokens, inputs, outputs, times * 2 * config.layers) for inputs, outputs, times in shapes)


def draw_words(config: PretrainConfig) -> tuple[list[Prompt], Tensor]:
    """N prompts of trained words in any font and on any ground, and their pictures, (N, 3, 32, 64) in uint8."""
    rng = np.random.default_rng(derive_seed(config.seed, "words"))
    prompts, pictures = [], np.empty((config.pictures, 3, HEIGHT, PICTURE_WIDTH), dtype=np.uint8)
    for index in range(config.pictures):
        word, font, ground, color = (str(rng.choice(names)) for names in (TRAIN, FONTS, GROUNDS, COLORS))
        prompts.append(prompt(word, font, ground, color))
        pictures[index] = (render(prompts[-1].metadata, rng) * 255).round().astype(np.uint8)
    return prompts, torch.from_numpy(pictures)
