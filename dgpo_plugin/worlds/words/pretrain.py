"""How the shipped pipeline was made: ``dgpo worlds pretrain words`` runs this file.

A tokenizer that spells, then the VAE on rendered pictures, then the denoiser and its two CLIP text encoders jointly on
cached latents by flow matching. The result is a plain diffusers ``StableDiffusion3Pipeline`` folder; the log beside it
(``pretrain.jsonl``) holds the settings, the losses and how many words were read right on the way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.rewards.ocr.reward import OcrReward
from dgpo_plugin.worlds.shapes.pretrain import pretraining, save_in_fp16
from dgpo_plugin.worlds.shapes.pretrain_loops import Passes, encode_pictures, sample_pictures, train_denoiser, train_vae
from dgpo_plugin.worlds.shapes.pretrain_networks import LATENT_CHANNELS, PretrainConfig
from dgpo_plugin.worlds.words.captions import COLORS, FONTS, GROUNDS, TRAIN, prompt, validation_prompts
from dgpo_plugin.worlds.words.pretrain_networks import LATENT_HEIGHT, LATENT_WIDTH, build_pipeline
from dgpo_plugin.worlds.words.render import HEIGHT, WIDTH, render

SETTINGS = PretrainConfig(
    pictures=24_000,
    vae_iterations=2_000,
    iterations=1_150,
    batch=64,
    learning_rate=1.5e-3,
    ema_decay=0.99,
    log_every=250,
)
"""Every number that the shipped weights depend on, besides the machine's float rounding."""
GUIDANCES = (1.0, 2.0, 3.0, 4.5)
WARM = 100
"""Steps in which the learning rate rises; it then stays, so that a short training is the beginning of a longer one."""


def pretrain(output: Path, seed: int = 0, iterations: int | None = None, compile_model: bool = False) -> None:  # noqa: ARG001 (shapes' needs it)
    """Train the words pipeline from nothing and save it to a folder, which is made.

    Args:
        iterations: of the denoiser; None for the shipped pipeline's.
        compile_model: has no effect: compiling takes longer than it saves here.
    """
    changes = {} if iterations is None else {"iterations": iterations}
    make_pipeline(output, replace(SETTINGS, seed=seed, **changes))


def make_pipeline(output: Path, config: PretrainConfig) -> None:
    """Train a words pipeline of any settings from nothing and save it to a folder, which is made."""
    with pretraining(output, config, (LATENT_HEIGHT // 2) * (LATENT_WIDTH // 2)) as (record, in_bf16):
        prompts, pictures = draw_words(config)
        vae = train_vae(pictures, config, record, AutoencoderKL.from_pretrained(world_pipeline("shapes") / "vae"))
        latents = encode_pictures(vae, pictures)
        torch.manual_seed(derive_seed(config.seed, "denoiser weights"))  # whatever the VAE's training drew
        pipeline, reader = build_pipeline(vae, config), OcrReward()

        def look(iteration: int, loss: float, seconds: float) -> bool:
            read = {f"guidance_{g:g}": words_read(pipeline, reader, guidance=g) for g in GUIDANCES}
            record(stage="denoiser", iteration=iteration, loss=loss, seconds=seconds, **read)
            return False

        passes = Passes(in_bf16=in_bf16, compiled=False)
        train_denoiser(pipeline, latents, prompts, config, passes, lambda step: min(1.0, (step + 1) / WARM), look)
        save_in_fp16(pipeline, output)


@torch.no_grad()
def words_read(
    pipeline: StableDiffusion3Pipeline, reader: OcrReward, guidance: float, pictures: int = 60
) -> dict[str, float]:
    """How the words of validation prompts are read.

    Returns:
        ``exact``, the share that is read as it is asked for, and ``close``, the mean reward ``ocr``; both in [0, 1].
    """
    generator = torch.Generator().manual_seed(1)
    prompts = validation_prompts()[:pictures]
    noise = torch.randn(len(prompts), LATENT_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH, generator=generator)
    closeness = reader(sample_pictures(pipeline, [each.text for each in prompts], noise, guidance), prompts)
    return {"exact": (closeness == 1).float().mean().item(), "close": closeness.mean().item()}


def draw_words(config: PretrainConfig) -> tuple[list[Prompt], Tensor]:
    """N prompts of trained words in any font and on any ground, and their pictures, (N, 3, 32, 64) in uint8."""
    rng = np.random.default_rng(derive_seed(config.seed, "words"))
    prompts, pictures = [], np.empty((config.pictures, 3, HEIGHT, WIDTH), dtype=np.uint8)
    for index in range(config.pictures):
        word, font, ground, color = (str(rng.choice(names)) for names in (TRAIN, FONTS, GROUNDS, COLORS))
        prompts.append(prompt(word, font, ground, color))
        pictures[index] = (render(prompts[-1].metadata, rng) * 255).round().astype(np.uint8)
    return prompts, torch.from_numpy(pictures)
