"""Sampling as users do it: Euler on the pipeline's own schedule, fixed seeds, with whatever adapter is in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgpo_plugin.models.base import Model, guided_velocity
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.samplers.ode import sample_ode
from dgpo_plugin.seeding import seeded_noise


def fixed_noise(model: Model, pictures: Sequence[int], seed: int) -> Tensor:
    """(N, ...): the noise of the numbered pictures, each seeded alone."""
    return torch.stack([seeded_noise(model.latent_shape, seed, "picture", number) for number in pictures])


def encode_in_batches(model: Model, texts: Sequence[str], batch_size: int = 32) -> Conditioning:
    """The text encoders over any number of texts, kept in main memory."""
    home = torch.device("cpu")
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return Conditioning.concatenate([model.encode(batch).on(home) for batch in batches])


@torch.no_grad()
def sample_latents(
    model: Model, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, batch_size: int = 256
) -> Tensor:
    """Clean latents (N, ...) for N texts from N noises.

    Equal to the diffusers pipeline's for the same noise, steps and guidance.
    """
    unique = sorted(set(texts))
    encoded = encode_in_batches(model, ["", *unique])
    device = model.device
    rows = torch.tensor([1 + unique.index(text) for text in texts])
    sigmas = model.sigmas(steps, None)
    parts = []
    for chosen in torch.arange(len(texts)).split(batch_size):
        conditioning, empty = encoded[rows[chosen]].on(device), encoded[:1].on(device)

        def velocity(
            x: Tensor, sigma: float, asked: Conditioning = conditioning, empty: Conditioning = empty
        ) -> Tensor:
            return guided_velocity(model, x, sigma, asked, empty, guidance)

        parts.append(sample_ode(velocity, noise[chosen].to(device), sigmas, "euler"))
    return torch.cat(parts)


def decode_in_batches(decode: Callable[[Tensor], Tensor], latents: Tensor, batch_size: int = 256) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1], float32 on the CPU."""
    return torch.cat([decode(part).cpu() for part in latents.split(batch_size)])


def to_image(image: Tensor) -> Image.Image:
    """One picture (3, H, W) in [0, 1]."""
    return image_grid(image[None], columns=1)


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Pictures (N, 3, H, W) in [0, 1] row by row on white."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
