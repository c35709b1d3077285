"""Noise-predicting models seen as flows, so that every sampler and algorithm here works on them unchanged.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), their x_t = a x0 + s eps divided by a + s is the flow's
x_t = (1 - sigma) x0 + sigma eps at sigma = s / (a + s), and its velocity eps - x0 follows from their prediction. An
Euler step of that flow is DDIM's step with eta = 0, and DPM-Solver++ is itself, being a matter of x0 and eps alone.
"""

from __future__ import annotations

import functools
from abc import abstractmethod

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import Schedule
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import PipelineModel


class NoisePredictingModel(PipelineModel):
    """What families have in common whose U-Nets predict epsilon or v on a table of a thousand noise levels."""

    prefix = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def default_resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.pixels_per_latent()

    def latents_per_token(self) -> int:
        return 1

    def adapter_key(self, name: str) -> str:
        # kohya's names: of U-Nets ComfyUI reads no others that diffusers reads too.
        module, _, matrix = name.rpartition(".")
        kohya_matrix = {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]
        return f"lora_{self.prefix}_{module.replace('.', '_')}.{kohya_matrix}.weight"

    @abstractmethod
    def predict(self, noisy: Tensor, timestep: float, tensors: dict[str, Tensor]) -> Tensor:
        """The U-Net's own output for x_t, (N, C, H, W).

        Args:
            noisy: x_t, (N, C, H, W).
            tensors: the conditioning's, N rows each.
        """

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        a, s = amplitudes(sigma)
        tensors = conditioning.tensors
        noisy = latents * (a + s)
        predicted = self.predict(noisy.to(tensors["context"].dtype), self._timestep(sigma), tensors).float()
        if self._prediction_type() == "epsilon":
            return predicted - (noisy - s * predicted) / a
        # v = a eps - s x0
        return (a * predicted + s * noisy) - (a * noisy - s * predicted)

    def sigmas(self, steps: int, shift: float | None = None, schedule: Schedule = "native") -> list[float]:
        if shift is not None:
            raise UserError("rollout.shift: this model predicts noise on a fixed schedule; set it to null")
        # With leading spacing DDIM's last step starts at t = 1, the solver's a whole stride above that.
        scheduler_class = DPMSolverMultistepScheduler if schedule == "dpm" else DDIMScheduler
        scheduler = scheduler_class.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        table = self._sigma_table
        return [float(table[int(t)]) for t in scheduler.timesteps] + [0.0]

    def initial_scale(self, sigma: float) -> float:
        a, s = amplitudes(sigma)
        return 1 / (a + s)

    def error_weight(self, sigma: float) -> float:
        a, _ = amplitudes(sigma)
        # The velocity's error is epsilon's over 1 - sigma, and v's is epsilon's over a.
        return (1 - sigma) ** 2 / (1.0 if self._prediction_type() == "epsilon" else a**2)

    def _prediction_type(self) -> str:
        kind = str(self.pipeline.scheduler.config.prediction_type)
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"model {self.config.path}: predicts {kind}; supported: epsilon, v_prediction")
        return kind

    @functools.cached_property
    def _sigma_table(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The sigma of every timestep, rising, (timesteps,)."""
        alpha = self.pipeline.scheduler.alphas_cumprod.double().numpy()
        a, s = np.sqrt(alpha), np.sqrt(1 - alpha)
        table: np.ndarray[tuple[int], np.dtype[np.float64]] = s / (a + s)
        return table

    def _timestep(self, sigma: float) -> float:
        """The timestep of a sigma: the inverse of the table, between its entries along straight lines."""
        table = self._sigma_table
        return round(float(np.interp(sigma, table, np.arange(len(table)))), 6)


def amplitudes(sigma: float) -> tuple[float, float]:
    """The amplitudes of image and noise at a sigma: (a, s) with a^2 + s^2 = 1 and s / (a + s) = sigma."""
    ratio = sigma / (1 - sigma)
    a = 1 / float(np.sqrt(1 + ratio**2))
    return a, ratio * a
