"""Noise-predicting models seen as flows, so that every sampler and algorithm here works on them unchanged.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), their x_t = a x0 + s eps divided by a + s is the flow's
x_t = (1 - sigma) x0 + sigma eps at sigma = s / (a + s), and its velocity eps - x0 follows from their prediction. An
Euler step of that flow is DDIM's step with eta = 0, and DPM-Solver++ is itself, being a matter of x0 and eps alone.

With zero terminal SNR (``rescale_betas_zero_snr``, arXiv 2305.08891) the last timestep is pure noise: a = 0, sigma = 1.
Its v is -x0; its epsilon is x_t, whatever the picture is, so that a model that predicts epsilon cannot start there.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig, Schedule
from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import PipelineModel

ALMOST_NOISE = 2.0**-24
"""The alpha_bar that diffusers' Euler and DPM-Solver schedulers put in the place of a terminal zero."""

Table = np.ndarray[tuple[int], np.dtype[np.float64]]


class NoisePredictingModel(PipelineModel):
    """What families have in common whose U-Nets predict epsilon or v on a table of a thousand noise levels.

    Attributes:
        prediction: ``epsilon`` or ``v_prediction``, as the scheduler's configuration says.

    Raises:
        UserError: it says another, or epsilon with zero terminal SNR, or has no such table.
    """

    prefix = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, config: ModelConfig, folder: Path, device: torch.device) -> None:
        self.prediction = "epsilon" if pipeline.scheduler is None else checked_prediction(pipeline.scheduler, config)
        super().__init__(pipeline, config, folder, device)

    def described(self) -> dict[str, str]:
        told = {"modelspec.prediction_type": "v" if self.prediction == "v_prediction" else "epsilon"}
        zero = self.pipeline.scheduler is not None and has_zero_terminal_snr(self.pipeline.scheduler)
        return {**told, "ss_zero_terminal_snr": "True"} if zero else told

    def default_size(self) -> tuple[int, int]:
        sample = self.denoiser.config.sample_size
        if isinstance(sample, int):
            return self.square(sample)
        height, width = sample
        return width * self.pixels_per_latent(), height * self.pixels_per_latent()

    def latents_per_token(self) -> int:
        return 1

    def adapter_key(self, name: str) -> str:
        # kohya's names: of U-Nets ComfyUI reads no others that diffusers reads too.
        module, _, matrix = name.rpartition(".")
        kohya_matrix = {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]
        return f"lora_{self.prefix}_{module.replace('.', '_')}.{kohya_matrix}.weight"

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The U-Net's own output for x_t, (N, C, H, W).

        Args:
            noisy: x_t, (N, C, H, W).
            timesteps: (N,).
            tensors: the conditioning's, N rows each.
        """

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        tensors, timesteps = conditioning.tensors, self.timesteps(sigma, latents)
        a, s = sigma[:, 1:].view(-1, 2, 1, 1, 1).unbind(1) if isinstance(sigma, Tensor) else amplitudes(sigma)
        noisy = latents * (a + s)
        predicted = self.predict(noisy.to(tensors["context"].dtype), timesteps, tensors).float()
        if self.prediction == "epsilon":
            return predicted - (noisy - s * predicted) / a
        # v = a eps - s x0
        return (a * predicted + s * noisy) - (a * noisy - s * predicted)

    def levels(self, sigmas: Sequence[float]) -> Tensor:
        rows = [(self.timestep(sigma), *amplitudes(sigma)) for sigma in sigmas]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def sigmas(self, steps: int, shift: float | None = None, schedule: Schedule = "native") -> list[float]:
        if shift is not None:
            raise UserError("rollout.shift: this model predicts noise on a fixed schedule; set it to null")
        # With leading spacing DDIM's last step starts at t = 1, the solver's a whole stride above that.
        scheduler_class = DPMSolverMultistepScheduler if schedule == "dpm" else DDIMScheduler
        scheduler = scheduler_class.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        # The solver's own, because it begins zero terminal SNR just below sigma = 1; the rest is the pipeline's.
        table = sigma_table(scheduler) if schedule == "dpm" else self._sigma_table
        return [float(table[int(t)]) for t in scheduler.timesteps] + [0.0]

    def training_sigmas(self) -> list[float]:
        return [float(sigma) for sigma in reversed(self._sigma_table)]

    def initial_scale(self, sigma: float) -> float:
        a, s = amplitudes(sigma)
        return 1 / (a + s)

    def error_weight(self, sigma: float) -> float:
        a, _ = amplitudes(sigma)
        # The velocity's error is epsilon's over 1 - sigma, and v's is epsilon's over a; at sigma = 1 both are v's.
        return 1.0 if sigma == 1 else (1 - sigma) ** 2 / (1.0 if self.prediction == "epsilon" else a**2)

    @functools.cached_property
    def _sigma_table(self) -> Table:
        """The sigma of every timestep, rising, (timesteps,)."""
        scheduler = self.pipeline.scheduler
        if has_zero_terminal_snr(scheduler) and scheduler.alphas_cumprod[-1] > ALMOST_NOISE:
            # Said of the model, and not known to the scheduler's class, as to PNDM's.
            scheduler = DDIMScheduler.from_config(scheduler.config)
        return sigma_table(scheduler)

    def timestep(self, sigma: float) -> float:
        """The timestep of a sigma: the inverse of the table, between its entries along straight lines."""
        table = self._sigma_table
        if table[-1] == 1:  # from almost pure noise on, where other schedulers' tables end, it is the last one
            table = np.append(table[:-1], _sigmas_of(np.float64(ALMOST_NOISE)))
        return round(float(np.interp(sigma, table, np.arange(len(table)))), 6)


def checked_prediction(scheduler: Any, config: ModelConfig) -> str:
    """What a model predicts, by its scheduler's configuration, if it can be trained.

    Raises:
        UserError: another thing than epsilon and v, epsilon with zero terminal SNR, or no table of noise levels.
    """
    kind, where = str(scheduler.config.get("prediction_type", "epsilon")), f"model {config.path}: its scheduler"
    if not isinstance(vars(scheduler).get("alphas_cumprod"), torch.Tensor):
        raise UserError(
            f"{where}, {type(scheduler).__name__}, has no table of noise levels (alphas_cumprod); "
            f"put a DDIM scheduler's configuration in its place if the model was trained on one"
        )
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{where} says that it predicts {kind}; supported: epsilon, v_prediction")
    if kind == "epsilon" and has_zero_terminal_snr(scheduler):
        raise UserError(
            f"{where} says rescale_betas_zero_snr with prediction_type epsilon, which tells nothing of the picture at "
            f"the last timestep, where all is noise; set prediction_type to v_prediction if it was trained so, else "
            f"rescale_betas_zero_snr to false"
        )
    return kind


def has_zero_terminal_snr(scheduler: Any) -> bool:
    """Whether a scheduler's last timestep is pure noise, or is said to be."""
    last = float(scheduler.alphas_cumprod[-1])
    return bool(scheduler.config.get("rescale_betas_zero_snr")) or last == 0


def sigma_table(scheduler: Any) -> Table:
    """The sigma of every timestep of a scheduler, rising, (timesteps,)."""
    return _sigmas_of(scheduler.alphas_cumprod.double().numpy())


def _sigmas_of(alpha_bar: Any) -> Table:
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    table: Table = s / (a + s)
    return table


def amplitudes(sigma: float) -> tuple[float, float]:
    """The amplitudes of image and noise at a sigma: (a, s) with a^2 + s^2 = 1 and s / (a + s) = sigma."""
    if sigma == 1:
        return 0.0, 1.0
    ratio = sigma / (1 - sigma)
    a = 1 / float(np.sqrt(1 + ratio**2))
    return a, ratio * a
