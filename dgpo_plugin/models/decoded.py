"""Pictures as they leave the VAE, and latents: whether they are any, and if not, whose fault it is.

NaN becomes black on its way into 8 bits, and a reward that works on bytes scores it without a word. Numbers that are
not finite are always an error: of the denoiser where its latents are not finite already, of the VAE else.

A picture of one flat color may be what the prompt asks for, in every picture of a batch too. So it is no error by
itself: the VAE is then shown plain noise, of which one that works makes no flat picture. If it makes one, it is at
fault, whatever the prompts were; if not, a line says once what was seen, and the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.seeding import seeded_noise
from dgpo_plugin.config.fields import ModelConfig

log = logging.getLogger(__name__)
LARGE = 1000.0
"""Latents beyond this are none that a VAE was trained on: those of all families are a few units wide."""


@dataclass(frozen=True)
class Blame:
    """What to say of broken pictures.

    Attributes:
        place: begins the message about the VAE: the setting, as in ``model.vae_precision fp16``.
        vae_fault: why it gives no numbers.
        vae_cure, denoiser_cure: what to do where it, or the denoiser, is at fault.
    """

    place: str
    vae_fault: str
    vae_cure: str
    denoiser_cure: str


def blame(config: ModelConfig) -> Blame:
    """What to say of pictures that are none: which precision to change, or else what."""
    half, denoiser = config.vae_precision, config.precision
    # Some VAEs have activations beyond 65504 (diffusers' force_upcast says which, and says it of others too).
    faults = {"fp16": "this VAE overflows in it", "bf16": "this VAE overflows in it", "fp32": "its weights are damaged"}
    cures = {"fp16": "set it to fp32 or bf16", "bf16": "set it to fp32", "fp32": "fetch the folder vae again"}
    precision = "" if denoiser == "fp32" else f", set model.precision to fp32 (it is {denoiser})"
    cure = f"lower training.learning_rate{precision}, or fetch the model again if it does so without an adapter"
    return Blame(f"model.vae_precision {half}", faults[half], cures[half], cure)


def checked_latents(latents: Tensor, config: ModelConfig) -> Tensor:
    """The latents (N, ...) that a VAE made of pictures, if they are numbers; a plan's, on the meta device, as they are.

    Raises:
        UserError: they are not; which precision to change.
    """
    if latents.device.type != "meta" and not latents.isfinite().all():
        told = blame(config)
        raise UserError(
            f"{told.place}: {told.vae_fault}; {told.vae_cure} (its latents of a picture are NaN or infinite)"
        )
    return latents


class PictureCheck:
    """Looks at every batch that a VAE decodes."""

    def __init__(self, blame: Blame) -> None:
        self._blame = blame
        self._seen_flat = False

    def __call__(self, pictures: Tensor, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> None:
        """Refuse pictures that are not finite, and flat ones of a VAE that makes no others.

        Args:
            pictures: (N, 3, H, W), before they are clamped to [0, 1].
            latents: that they were decoded from, (N, ...).
            decode: the VAE, from such latents to such pictures.

        Raises:
            UserError: the denoiser's latents or the VAE's pictures are not finite, or the VAE makes flat ones of all.
        """
        blame, count = self._blame, len(pictures)
        lost, broken, flat = _counts(pictures, latents)
        if lost:
            raise UserError(
                f"{lost} of {count} latents are NaN or infinite before the VAE sees them, so it is the denoiser (or "
                f"a text encoder); {blame.denoiser_cure}"
            )
        if broken:
            raise UserError(self._broken(f"{broken} of {count} pictures are NaN or infinite", latents, decode))
        if flat and not self._seen_flat:
            color = _color(pictures)
            if _fails_on_noise(decode, latents):
                raise UserError(
                    f"{blame.place}: this VAE makes {color} pictures of everything, even of noise; {blame.vae_cure}"
                )
            self._seen_flat = True
            log.warning(
                "%d of %d pictures are %s all over; the VAE works, so either the prompt asks for that, or the "
                "denoiser went astray: %s (told once)",
                flat,
                count,
                color,
                blame.denoiser_cure,
            )

    def _broken(self, seen: str, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> str:
        largest = float(latents.abs().max())
        if largest > LARGE and not _fails_on_noise(decode, latents):
            return (
                f"{self._blame.place}: {seen}, of latents up to {largest:.1e}, while the VAE decodes others; it is the "
                f"denoiser: {self._blame.denoiser_cure}"
            )
        return f"{self._blame.place}: {self._blame.vae_fault}; {self._blame.vae_cure} ({seen}, the latents are not)"


def _fails_on_noise(decode: Callable[[Tensor], Tensor], latents: Tensor) -> bool:
    """Whether a VAE makes no picture of standard normal noise either, which is as wide as latents are."""
    noise = seeded_noise(latents.shape[1:], 0, "probe of the VAE")[None].to(latents)
    _, broken, flat = _counts(decode(noise), noise)
    return bool(broken or flat)


def _counts(pictures: Tensor, latents: Tensor) -> tuple[int, int, int]:
    """How many latents are not finite, and how many pictures are not, or are one color in 8 bits."""
    lost = ~latents.isfinite().flatten(1).all(1)
    broken = ~pictures.isfinite().flatten(1).all(1)
    bytes_ = (pictures.clamp(0, 1) * 255).round().flatten(2)
    flat = (bytes_.amax(2) == bytes_.amin(2)).all(1)
    # Read at once: each number asked for would wait for the device.
    first, second, third = torch.stack([lost.sum(), broken.sum(), flat.sum()]).tolist()
    return first, second, third


def _color(pictures: Tensor) -> str:
    """The color of the first flat picture, in words."""
    small = (pictures.clamp(0, 1) * 255).round().flatten(2)
    flat = (small.amax(2) == small.amin(2)).all(1)
    red, green, blue = (int(value) for value in small[flat][0, :3, 0].tolist())
    names = {(0, 0, 0): "black", (255, 255, 255): "white"}
    return names.get((red, green, blue), f"of one flat color, rgb({red}, {green}, {blue})")
