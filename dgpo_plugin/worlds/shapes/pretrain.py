"""How the shipped pipeline was made: ``dgpo worlds pretrain shapes`` runs this file.

Tokenizers, then the VAE on rendered pictures, then the denoiser and its two CLIP text encoders jointly on cached
latents by flow matching. The result is a plain diffusers ``StableDiffusion3Pipeline`` folder; the log beside it
(``pretrain.jsonl``) holds the settings, the losses and the accuracy on the way.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.distributed.processor import Work, settled
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.worlds.shapes.pretrain_loops import (
    Passes,
    Record,
    encode_pictures,
    sharpen_decoder,
    task_accuracy,
    train_denoiser,
    train_vae,
    warm_cosine,
)
from dgpo_plugin.worlds.shapes.pretrain_networks import LATENT_SIZE, WIDTH, PretrainConfig, build_pipeline
from dgpo_plugin.worlds.shapes.pretrain_recipe import RECIPE, Recipe
from dgpo_plugin.worlds.shapes.render import SIZE, render


def pretrain(output: Path, seed: int = 0, iterations: int | None = None, compile_model: bool = False) -> None:
    """Train the shapes pipeline from nothing and save it to a folder, which is made.

    Args:
        iterations: of the denoiser; None for the shipped pipeline's.
        compile_model: let torch.compile make the denoiser faster.
    """
    changes = {} if iterations is None else {"iterations": iterations}
    make_pipeline(output, PretrainConfig(seed=seed, **changes), compile_model=compile_model)


def make_pipeline(
    output: Path, config: PretrainConfig, recipe: Recipe = RECIPE, *, compile_model: bool = False
) -> None:
    """Train a shapes pipeline of any settings and save it to a folder, which is made."""
    with pretraining(output, config, (LATENT_SIZE // 2) ** 2) as (record, in_bf16):
        prompts, pictures = draw_scenes(config, recipe)
        start = StableDiffusion3Pipeline.from_pretrained(world_pipeline(recipe.start)) if recipe.start else None
        vae = train_vae(pictures, config, record, start.vae if start else None)
        latents = encode_pictures(vae, pictures)
        if config.decoder_iterations:
            sharpen_decoder(vae, pictures, latents, config, record, in_bf16=in_bf16)
        pipeline = build_pipeline(vae, config, recipe.prompts)
        if start:
            go_on_with(pipeline, start)
        pipeline.save_pretrained(output)

        def look(iteration: int, loss: float, seconds: float) -> bool:
            accuracy = {f"accuracy_guidance_{g:g}": task_accuracy(pipeline, recipe, g) for g in recipe.guidances}
            record(stage="denoiser", iteration=iteration, loss=loss, seconds=seconds, **accuracy)
            return config.enough is not None and max(each["mean"] for each in accuracy.values()) >= config.enough

        passes = Passes(in_bf16=in_bf16, compiled=compile_model)
        train_denoiser(pipeline, latents, prompts, config, passes, warm_cosine(config.iterations), look)
        save_in_fp16(pipeline, output)


@contextlib.contextmanager
def pretraining(output: Path, config: PretrainConfig, picture_tokens: int) -> Iterator[tuple[Record, bool]]:
    """A folder for a pipeline, made, with the log of how it is trained, which begins with the settings.

    Args:
        picture_tokens: of the denoiser, for each picture.

    Yields:
        What writes into the log, and whether to compute the denoiser's passes in bf16.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(derive_seed(config.seed, "pretrain"))
    with (output / "pretrain.jsonl").open("w", encoding="utf-8") as log:

        def record(**entry: Any) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        # The first thing, because what it may have to mask is fixed once anything was computed.
        work = functools.partial(denoiser_work, config, picture_tokens)
        precision = settled("the denoiser's precision", "auto", torch.device("cpu"), work)
        numbers = {**asdict(config), "precision": precision}
        record(stage="config", torch=torch.__version__, threads=torch.get_num_threads(), **numbers)
        yield record, precision == "bf16"


def denoiser_work(config: PretrainConfig, picture_tokens: int) -> Work:
    """The denoiser's layers in a step: the picture's tokens and the text's, each through a block's own."""
    tokens = config.batch * picture_tokens
    shapes = ((WIDTH, WIDTH, 4), (WIDTH, 4 * WIDTH, 1), (4 * WIDTH, WIDTH, 1))
    return tuple((tokens, inputs, outputs, times * 2 * config.layers) for inputs, outputs, times in shapes)


@torch.no_grad()
def go_on_with(pipeline: StableDiffusion3Pipeline, start: StableDiffusion3Pipeline) -> None:
    """Give a new pipeline another one's denoiser and text encoders; a word that both know keeps its embedding."""
    pipeline.transformer.load_state_dict(start.transformer.state_dict())
    new, old = pipeline.tokenizer.get_vocab(), start.tokenizer.get_vocab()
    shared = [(new[piece], old[piece]) for piece in new if piece in old]
    rows, known = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    for name in ("text_encoder", "text_encoder_2"):
        encoder, before = getattr(pipeline, name), getattr(start, name).state_dict()
        weights = encoder.state_dict()
        for key, value in before.items():
            if "token_embedding" in key:
                weights[key][rows] = value[known]
            else:
                weights[key].copy_(value)


def draw_scenes(config: PretrainConfig, recipe: Recipe = RECIPE) -> tuple[list[Prompt], Tensor]:
    """N captions drawn at random and their pictures, (N, 3, 64, 64) in uint8 to keep them small."""
    rng = np.random.default_rng(derive_seed(config.seed, "scenes"))
    names, weights = tuple(recipe.task_weights), tuple(recipe.task_weights.values())
    by_task = {task: [p for p in recipe.prompts if p.metadata["task"] == task] for task in names}
    tasks = rng.choice(names, size=config.pictures, p=weights)
    prompts = [by_task[task][rng.integers(len(by_task[task]))] for task in tasks]
    pictures = np.empty((config.pictures, 3, SIZE, SIZE), dtype=np.uint8)
    for index, prompt in enumerate(prompts):
        pictures[index] = (render(dict(prompt.metadata), rng, recipe.vocabulary) * 255).round().astype(np.uint8)
    return prompts, torch.from_numpy(pictures)


def save_in_fp16(pipeline: StableDiffusion3Pipeline, output: Path) -> None:
    """Save a pipeline with its two large networks in float16: diffusers' loader brings its models back to float32.

    transformers' loader keeps a file's type, so the small text encoders stay in float32.
    """
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(output)
