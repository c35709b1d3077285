"""Sana: linear attention over deeply compressed latents, Gemma's hidden states as conditions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model

from dgpo_plugin.config.fields import Schedule
from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.pipeline import PipelineModel

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the pipeline puts before every prompt but the empty one."""


class SanaModel(PipelineModel):
    """Sana, of diffusers' ``SanaPipeline``."""

    pipeline_class = SanaPipeline
    component_classes = {"transformer": SanaTransformer2DModel, "vae": AutoencoderDC, "text_encoder": Gemma2Model}
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v", "to_out.0")

    def variant(self) -> tuple[str, str]:
        dims = self.denoiser.config
        sizes = {(28, 36): "-600m", (20, 70): "-1600m", (60, 70): "-4800m"}
        return f"sana{sizes.get((dims.num_layers, dims.num_attention_heads), '')}", ""

    def default_size(self) -> tuple[int, int]:
        return self.square(int(self.denoiser.config.sample_size))

    def latents_per_token(self) -> int:
        return int(self.denoiser.config.patch_size)

    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        nonempty = [text for text in texts if text]
        batches = [(nonempty, INSTRUCTION)] if nonempty else []
        if "" in texts:
            batches.append(([""], None))
        row = {text: n for n, text in enumerate([*nonempty, ""])}
        encoded = Conditioning.concatenate([self._encode_after(instruction, batch) for batch, instruction in batches])
        return encoded[[row[text] for text in texts]]

    def _encode_after(self, instruction: list[str] | None, texts: list[str]) -> Conditioning:
        context, mask, _, _ = self.pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return Conditioning({"context": context, "mask": mask})

    def token_counts(self, tokenizer: Any, texts: list[str]) -> list[int]:
        # SanaPipeline._get_gemma_prompt_embeds: the instruction's tokens, but for two, do not count.
        instruction = "\n".join(INSTRUCTION)
        counts = super().token_counts(tokenizer, [instruction + text for text in texts])
        return [count - len(tokenizer.encode(instruction)) + 2 for count in counts]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(pixels).latent  # no distribution, as of other VAEs
        return latents

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"context": (length, self.denoiser.config.caption_channels), "mask": (length,)}

    def timestep(self, sigma: float) -> float:
        # Whole ones, cut off as the pipeline's scheduler does.
        return float(int(round(sigma * 1000, 2))) * float(self.denoiser.config.timestep_scale)

    def velocity(self, latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        predicted: Tensor = self.denoiser(
            latents.to(self.denoiser.dtype),
            encoder_hidden_states=tensors["context"].to(self.denoiser.dtype),
            encoder_attention_mask=tensors["mask"],
            timestep=self.timesteps(sigma, latents),
            return_dict=False,
        )[0]
        return predicted.float()

    def sigmas(
        self,
        steps: int,
        shift: float | None = None,
        schedule: Schedule = "native",  # noqa: ARG002 (the pipeline's own is DPM-Solver++'s)
    ) -> list[float]:
        changes = {} if shift is None else {"flow_shift": shift}
        scheduler = DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config, **changes)
        scheduler.set_timesteps(steps)
        return [float(sigma) for sigma in scheduler.sigmas[:-1]] + [0.0]
