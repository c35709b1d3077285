"""How the shapes pipeline is trained: the VAE on pictures, then the denoiser with its text encoders on latents."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.worlds.shapes.pretrain_networks import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    PretrainConfig,
    build_vae,
)
from dgpo_plugin.worlds.shapes.pretrain_recipe import Recipe
from dgpo_plugin.worlds.shapes.verify import verify

Record = Callable[..., None]
"""Writes its keyword arguments as a line of the log."""
THIRD_ENCODER_PADDING = (1, 77, 256)
"""Third-encoder token counts seen in training: ours inside, ComfyUI's without a T5, diffusers' default."""


# ---- the VAE

DECODER_RATE, DECODER_BATCH, DECODER_NOISE = 7e-4, 32, 0.03
"""AdamW's peak rate, pictures a step, and noise as a share of the latents' deviation, of the decoder alone."""


def train_vae(
    pictures: Tensor, config: PretrainConfig, record: Record, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train the VAE on pictures (N, 3, 64, 64), uint8; its latent scale and shift are measured at the end.

    Args:
        start: the trained VAE that is gone on with; None to start from nothing.
    """
    vae = (start or build_vae()).train().to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.vae_learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(config.vae_iterations))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "vae"))
    started = time.perf_counter()
    for iteration in _progress("VAE", config.vae_iterations):
        chosen = torch.randint(len(pictures), (config.vae_batch,), generator=generator)
        target = _to_model_range(pictures[chosen]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = (decoded - target).square().mean() + 0.2 * (decoded - target).abs().mean()
        loss = error + config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        _optimize(loss, parameters, optimizer, schedule)
        if iteration % 250 == 0 or iteration == config.vae_iterations - 1:
            seconds = round(time.perf_counter() - started, 1)
            record(stage="vae", iteration=iteration, error=error.item(), loss=loss.item(), seconds=seconds)
    latents = encode_pictures(vae.eval(), pictures[:4096], normalized=False)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae.to(memory_format=torch.contiguous_format)


def sharpen_decoder(
    vae: AutoencoderKL, pictures: Tensor, latents: Tensor, config: PretrainConfig, record: Record, *, in_bf16: bool
) -> None:
    """Go on with the VAE's decoder alone, which costs half a step and moves no latent.

    Args:
        latents: the pictures', (N, 16, 8, 8), as the denoiser sees them; a little noise stands for the denoiser's.
        in_bf16: compute the passes in bf16, not in float32.
    """
    vae.to(memory_format=torch.channels_last)
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=DECODER_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(config.decoder_iterations))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "decoder"))
    means = latents / vae.config.scaling_factor + vae.config.shift_factor
    started = time.perf_counter()
    for iteration in _progress("decoder", config.decoder_iterations):
        chosen = torch.randint(len(pictures), (DECODER_BATCH,), generator=generator)
        clean = means[chosen]
        noisy = clean + DECODER_NOISE * clean.std() * torch.randn(clean.shape, generator=generator)
        target = _to_model_range(pictures[chosen]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            decoded = vae.decoder(noisy)
        difference = decoded.float() - target
        loss = difference.square().mean() + 0.2 * difference.abs().mean()
        _optimize(loss, parameters, optimizer, schedule)
        if iteration % 250 == 0 or iteration == config.decoder_iterations - 1:
            seconds = round(time.perf_counter() - started, 1)
            record(stage="decoder", iteration=iteration, loss=loss.item(), seconds=seconds)
    vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, *, normalized: bool = True) -> Tensor:
    """Posterior means of pictures (N, 3, 64, 64) in uint8: (N, 16, 8, 8), ``normalized`` as the denoiser sees them."""
    latents = torch.cat([vae.encode(_to_model_range(batch)).latent_dist.mean for batch in pictures.split(256)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor if normalized else latents


def _to_model_range(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


# ---- the denoiser


@dataclass(frozen=True)
class Passes:
    """How the denoiser's passes are computed: in bf16 or in float32, by torch.compile or as they stand."""

    in_bf16: bool
    compiled: bool


def train_denoiser(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    prompts: Sequence[Prompt],
    config: PretrainConfig,
    passes: Passes,
    rate: Callable[[int], float],
    look: Callable[[int, float, float], bool],
) -> None:
    """Flow matching on cached latents, with both text encoders; the pipeline ends with the averaged weights.

    Args:
        latents: (N, 16, H, W), as the denoiser sees them.
        prompts: N, what each shows.
        rate: the learning rate's factor by step, from 0.
        look: called every ``config.log_every`` steps and after the last, while the pipeline has the averaged weights,
            with the number of steps done, a smoothed loss, and seconds; whether that is enough.
    """
    transformer, attention = pipeline.transformer, PaddedAttention()
    original_processors = transformer.attn_processors
    transformer.set_attn_processor(attention)
    denoise = torch.compile(transformer) if passes.compiled else transformer
    networks = (transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "denoiser"))
    token_ids, rows = _tokenized_once(pipeline, prompts)
    started, smoothed_loss = time.perf_counter(), 0.0
    for iteration in _progress("denoiser", config.iterations):
        batch = _draw_batch(latents, rows, config, generator)
        attention.count_last_token(batch.third_encoder_tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=passes.in_bf16):
            context, pooled = encode_ids(pipeline, token_ids[batch.rows])
            predicted = denoise(batch.noisy, context, pooled, batch.sigma * 1000, return_dict=False)[0]
        loss = (predicted.float() - batch.velocity).square().mean()
        _optimize(loss, parameters, optimizer, schedule)
        decay = min(config.ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        smoothed_loss = loss.item() if iteration == 0 else 0.98 * smoothed_loss + 0.02 * loss.item()
        if (iteration + 1) % config.log_every == 0 or iteration == config.iterations - 1:
            seconds = round(time.perf_counter() - started, 1)
            with _exchanged(parameters, average):
                attention.count_last_token_once()
                enough = look(iteration + 1, smoothed_loss, seconds)
            if enough:
                break
    _assign(parameters, average)
    transformer.set_attn_processor(original_processors)


@dataclass(frozen=True)
class _Batch:
    """One step's latents, noised, and what the denoiser is told about them.

    Attributes:
        noisy, velocity: (N, 16, H, W).
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
    """Token ids of the empty text and of each different text, (texts, tokens); every prompt's row among them, (N,)."""
    texts = sorted({prompt.text for prompt in prompts})
    row_of = {text: index for index, text in enumerate(texts, start=1)}
    return tokenize(pipeline, ["", *texts]), torch.tensor([row_of[prompt.text] for prompt in prompts])


class PaddedAttention:
    """SD3's joint attention with the last text token counted several times.

    The third encoder's tokens are all zero and carry no position, so they stay equal through every layer, and
    attending to n of them is attending to one with log n added to its logit: exactly diffusers' default padding of
    256 tokens at the price of one.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def count_last_token(self, copies: Tensor) -> None:
        """Have each text's last token stand for so many copies of it, (N,)."""
        self.bias = copies.log().view(-1, 1, 1, 1)

    def count_last_token_once(self) -> None:
        """Have each text's last token stand for itself alone, in batches of any size."""
        self.bias = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,  # noqa: ARG002 (diffusers hands it on)
    ) -> tuple[Tensor, Tensor]:
        batch, image_tokens, _ = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        image_q = attn.norm_q(heads(attn.to_q(hidden_states)))
        image_k = attn.norm_k(heads(attn.to_k(hidden_states)))
        text_q = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_k = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        q, k = torch.cat([image_q, text_q], dim=2), torch.cat([image_k, text_k], dim=2)
        v = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        mask = None if self.bias is None else nn.functional.pad(self.bias, (k.shape[2] - 1, 0)).to(q.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(batch, q.shape[2], -1)
        image, text = mixed[:, :image_tokens], mixed[:, image_tokens:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def tokenize(pipeline: StableDiffusion3Pipeline, texts: list[str]) -> Tensor:
    """The token ids of N texts, (N, as many as a text may have); both text encoders share the tokenizer."""
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def encode_ids(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What ``encode_prompt`` gives with one third-encoder token, differentiably: (N, T + 1, 128), pooled (N, 128)."""
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    context = nn.functional.pad(context, (0, 0, 0, 1))
    return context, torch.cat([output.text_embeds for output in outputs], dim=-1)


@torch.no_grad()
def sample_pictures(
    pipeline: StableDiffusion3Pipeline, texts: list[str], noise: Tensor, guidance: float, steps: int = 10
) -> Tensor:
    """A picture of each text, (N, 3, H, W) in [0, 1], from noise (N, 16, ...), with a plain Euler loop."""
    vae = pipeline.vae
    pipeline.scheduler.set_timesteps(steps)
    context, pooled = encode_ids(pipeline, tokenize(pipeline, texts + [""] * len(texts)))
    x = noise
    for sigma, following in itertools.pairwise(pipeline.scheduler.sigmas):
        t = sigma.expand(2 * len(texts)) * 1000
        both = pipeline.transformer(x.repeat(2, 1, 1, 1), context, pooled, t, return_dict=False)[0]
        prompted, empty = both.chunk(2)
        x = x + (following - sigma) * (empty + guidance * (prompted - empty))
    decoded: Tensor = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def task_accuracy(pipeline: StableDiffusion3Pipeline, recipe: Recipe, guidance: float) -> dict[str, float]:
    """Strict accuracy in [0, 1] for each task type that is judged; and the headline's mean."""
    images_per_task = recipe.images_per_task
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    accuracy = {}
    for task in recipe.task_weights:
        candidates = [p for p in recipe.judged if p.metadata["task"] == task]
        prompts = [candidates[i] for i in rng.integers(len(candidates), size=images_per_task)]
        noise = torch.randn(images_per_task, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        pictures = sample_pictures(pipeline, [p.text for p in prompts], noise, guidance).numpy()
        verdicts = verify(pictures, [dict(p.metadata) for p in prompts], recipe.vocabulary)
        accuracy[task] = float(np.mean([verdict.strict for verdict in verdicts]))
    return {**accuracy, "mean": float(np.mean([accuracy[task] for task in recipe.headline]))}


@contextlib.contextmanager
def _exchanged(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Have other values in the parameters for the block."""
    own = [parameter.detach().clone() for parameter in parameters]
    _assign(parameters, values)
    yield
    _assign(parameters, own)


@torch.no_grad()
def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


# ---- both


def _optimize(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One step of the optimizer and of its schedule, with the gradient's norm cut to 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def warm_cosine(total: int, warm: int = 100) -> Callable[[int], float]:
    """A learning rate's factor by step: a linear warm-up, then a cosine to 2 % of the peak."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))

    return factor


def _progress(name: str, total: int) -> Iterator[int]:
    """Count to a total, with a bar on the terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        yield from bar.track(range(total), description=name)
