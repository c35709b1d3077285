"""How the words pipeline is trained: the denoiser with its text encoders on latents, by flow matching."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.rewards.ocr.reward import OcrReward
from dgpo_plugin.worlds.shapes.pretrain_loops import (
    THIRD_ENCODER_PADDING,
    PaddedAttention,
    Record,
    encode_ids,
    exchanged,
    optimize,
    progress,
)
from dgpo_plugin.worlds.shapes.pretrain_networks import LATENT_CHANNELS
from dgpo_plugin.worlds.words.captions import validation_prompts
from dgpo_plugin.worlds.words.pretrain_networks import LATENT_HEIGHT, LATENT_WIDTH, TEXT_TOKENS, PretrainConfig

GUIDANCES = (1.0, 2.0, 3.0, 4.5)
WARM = 100
"""Steps in which the learning rate rises."""


def train_denoiser(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    prompts: Sequence[Prompt],
    config: PretrainConfig,
    record: Record,
    keep: Callable[[int], None],
    *,
    in_bf16: bool,
) -> None:
    """Flow matching on cached latents, with both text encoders; the pipeline ends with the averaged weights.

    Args:
        latents: (N, 16, 4, 8), as the denoiser sees them.
        prompts: N, what each shows.
        keep: called after every evaluation, with the iteration, while the pipeline has the averaged weights.
        in_bf16: compute the passes in bf16, not in float32.
    """
    transformer, attention, reader = pipeline.transformer, PaddedAttention(), OcrReward()
    original_processors = transformer.attn_processors
    transformer.set_attn_processor(attention)
    networks = (transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "denoiser"))
    token_ids, rows = _tokenized_once(pipeline, prompts)
    started, smoothed_loss = time.perf_counter(), 0.0
    for iteration in progress("denoiser", config.iterations):
        batch = _draw_batch(latents, rows, config, generator)
        attention.count_last_token(batch.third_encoder_tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            context, pooled = encode_ids(pipeline, token_ids[batch.rows])
            predicted = transformer(batch.noisy, context, pooled, batch.sigma * 1000, return_dict=False)[0]
        loss = (predicted.float() - batch.velocity).square().mean()
        optimize(loss, parameters, optimizer, schedule)
        decay = min(config.ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        smoothed_loss = loss.item() if iteration == 0 else 0.98 * smoothed_loss + 0.02 * loss.item()
        if (iteration + 1) % config.evaluate_every == 0 or iteration == config.iterations - 1:
            seconds = round(time.perf_counter() - started, 1)
            with exchanged(parameters, average):
                attention.count_last_token_once()
                read = {f"guidance_{g:g}": words_read(pipeline, reader, guidance=g) for g in GUIDANCES}
                record(stage="denoiser", iteration=iteration + 1, loss=smoothed_loss, seconds=seconds, **read)
                keep(iteration + 1)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    transformer.set_attn_processor(original_processors)


@dataclass(frozen=True)
class _Batch:
    """One step's latents, noised, and what the denoiser is told about them.

    Attributes:
        noisy, velocity: (N, 16, 4, 8).
        sigma: (N,) in [0, 1].
        rows: each caption's row among the token ids, (N,); 0, the empty text's, where it is dropped.
        third_encoder_tokens: how many each text has of them, (N,).
    """

    noisy: Tensor
    velocity: Tensor
    sigma: Tensor
    rows: Tensor
    third_encoder_tokens: Tensor


def _draw_batch(latents: Tensor, rows: Tensor, config: PretrainConfig, generator: torch.Generator) -> _Batch:
    chosen = torch.randint(len(latents), (config.batch,), generator=generator)
    clean = latents[chosen]
    kept = torch.rand(config.batch, generator=generator) >= config.caption_dropout
    sigma = torch.randn(config.batch, generator=generator).sigmoid()
    sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
    noise = torch.randn(clean.shape, generator=generator)
    copies = torch.tensor(THIRD_ENCODER_PADDING)[torch.randint(3, (config.batch,), generator=generator)]
    blend = sigma.view(-1, 1, 1, 1)
    return _Batch((1 - blend) * clean + blend * noise, noise - clean, sigma, rows[chosen] * kept, copies)


def _tokenized_once(pipeline: StableDiffusion3Pipeline, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Token ids of the empty text and of each different text, (texts, 16), and every prompt's row among them, (N,)."""
    texts = sorted({prompt.text for prompt in prompts})
    row_of = {text: index for index, text in enumerate(texts, start=1)}
    return tokenize(pipeline, ["", *texts]), torch.tensor([row_of[prompt.text] for prompt in prompts])


def tokenize(pipeline: StableDiffusion3Pipeline, texts: list[str]) -> Tensor:
    """The token ids of N texts, (N, 16); both text encoders share the tokenizer."""
    batch = pipeline.tokenizer(
        texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


@torch.no_grad()
def words_read(
    pipeline: StableDiffusion3Pipeline, reader: OcrReward, guidance: float, pictures: int = 60, steps: int = 10
) -> dict[str, float]:
    """How the words of validation prompts are read, with a plain Euler loop.

    Returns:
        ``exact``, the share that is read as it is asked for, and ``close``, the mean reward ``ocr``; both in [0, 1].
    """
    generator = torch.Generator().manual_seed(1)
    prompts = validation_prompts()[:pictures]
    pipeline.scheduler.set_timesteps(steps)
    vae = pipeline.vae
    ids = tokenize(pipeline, [prompt.text for prompt in prompts] + [""] * len(prompts))
    context, pooled = encode_ids(pipeline, ids)
    x = torch.randn(len(prompts), LATENT_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH, generator=generator)
    for sigma, following in itertools.pairwise(pipeline.scheduler.sigmas):
        t = sigma.expand(2 * len(prompts)) * 1000
        both = pipeline.transformer(x.repeat(2, 1, 1, 1), context, pooled, t, return_dict=False)[0]
        prompted, empty = both.chunk(2)
        x = x + (following - sigma) * (empty + guidance * (prompted - empty))
    decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    closeness = reader((decoded / 2 + 0.5).clamp(0, 1), prompts)
    return {"exact": (closeness == 1).float().mean().item(), "close": closeness.mean().item()}
