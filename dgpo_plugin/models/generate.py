"""Sampling as users do it: Euler on the pipeline's own schedule, fixed seeds, with whatever adapter is in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgpo_plugin.common.seeding import seeded_noise
from dgpo_plugin.models.base import Model, guided_velocity
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.samplers.ode import sample_ode

BATCH_SIZE = 256
"""Pictures at once where nobody says otherwise."""


def fixed_noise(model: Model, pictures: Sequence[int], seed: int) -> Tensor:
    """Noise of the numbered pictures, each seeded alone, (N, ...)."""
    return torch.stack([seeded_noise(model.latent_shape, seed, "picture", number) for number in pictures])


def generate(
    model: Model,
    texts: Sequence[str],
    noise: Tensor,
    steps: int,
    guidance: float,
    batch_size: int = BATCH_SIZE,
    encoded: EncodedTexts | None = None,
) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1], float32 on the CPU, for N texts from N noises; see :func:`sample_latents`."""
    latents = sample_latents(model, texts, noise, steps, guidance, batch_size, encoded)
    return decode_in_batches(model.decode, latents, batch_size)


@torch.no_grad()
def sample_latents(
    model: Model,
    texts: Sequence[str],
    noise: Tensor,
    steps: int,
    guidance: float,
    batch_size: int = BATCH_SIZE,
    encoded: EncodedTexts | None = None,
) -> Tensor:
    """Clean latents (N, ...) for N texts from N noises.

    Equal to the diffusers pipeline's for the same noise, steps and guidance.

    Args:
        encoded: has the texts and the empty one; None to encode them now.
    """
    encoded = encoded or EncodedTexts(model, ["", *texts])
    empty = encoded[[""]].on(model.device)
    sigmas = model.sigmas(steps, None)
    batches = []
    for start in range(0, len(texts), batch_size):
        conditioning = encoded[texts[start : start + batch_size]].on(model.device)

        def velocity(x: Tensor, sigma: float, conditioning: Conditioning = conditioning) -> Tensor:
            return guided_velocity(model, x, sigma, conditioning, empty, guidance)

        start_noise = noise[start : start + batch_size].to(model.device) * model.initial_scale(sigmas[0])
        batches.append(sample_ode(velocity, start_noise, sigmas, "euler"))
    return torch.cat(batches)


def decode_in_batches(decode: Callable[[Tensor], Tensor], latents: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1], float32 on the CPU."""
    return torch.cat([decode(batch).cpu() for batch in latents.split(batch_size)])
