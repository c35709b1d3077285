"""Pictures that ComfyUI's VAEs decoded, refused where they are none: NaN would be shown as black, and scored so."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.decoded import Blame, PictureCheck

VAE_CURE = "start ComfyUI with --fp32-vae or --bf16-vae, or load another VAE"
BLAME = Blame(
    place="Compare adapter",
    vae_fault="this VAE overflows in the precision that ComfyUI runs it in",
    vae_cure=VAE_CURE,
    denoiser_cure="lower the adapter's strength or cfg, or start ComfyUI with --force-fp32",
)


def decode(vae: Any, latents: Tensor, check: PictureCheck) -> Tensor:
    """Pictures (N, H, W, C) in [0, 1] of latents (N, ...), a video VAE's first frames.

    Args:
        vae: ComfyUI's.

    Raises:
        UserError: they are none, by :class:`~dgpo_plugin.models.decoded.PictureCheck`.
    """

    def first_frames(latents: Tensor) -> Tensor:
        images: Tensor = vae.decode(latents)
        return images[:, 0] if images.ndim == 5 else images

    def channels_first(latents: Tensor) -> Tensor:
        return first_frames(latents).movedim(-1, 1)

    images = first_frames(latents)
    check(images.movedim(-1, 1), latents.to(images.device), channels_first)
    return images


def refuse_broken(images: Tensor, where: str) -> None:
    """Refuse pictures (N, H, W, C) that are not finite, wherever they come from.

    Args:
        where: begins the message.

    Raises:
        UserError: some are not.
    """
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise UserError(
            f"{where}: {broken} of {len(images)} pictures are NaN or infinite, which is the VAE's doing if the latents "
            f"are sound; {VAE_CURE}"
        )
