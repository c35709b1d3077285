"""What diffusers' text-to-image pipelines have in common; a family adds conditioning, velocity and the rest."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig, Schedule
from dgpo_plugin.models.base import DTYPES, dtype_of
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.in_turn import in_turn
from dgpo_plugin.models.memory import at_work, can_leave, empty_module, load_quantized
from dgpo_plugin.models.speed import fuse_norms
from dgpo_plugin.samplers.ode import dpm_flow_sigmas

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The projections of joint attention over text and picture, as diffusers names them."""


ENCODED_AT_ONCE = 32
"""Texts."""
COUNTS = ("mask", "length")
"""Conditioning tensors that say how much of a padded text is text."""


def filled(value: float, latents: Tensor) -> Tensor:
    """(N,) of one value, on the latents' device: a denoiser's timestep or guidance."""
    return torch.full((len(latents),), value, device=latents.device)


class PipelineModel:
    """See :class:`dgpo_plugin.models.base.Model`; a family is a subclass.

    Class attributes of a family:
        pipeline_class: of diffusers.
        parts: class of every folder with weights; the denoiser's is ``prefix``, the encoders' start ``text_encoder``.
        prefix: the denoiser's folder, and of its keys in an adapter file.
        lora_targets: module name endings that get an adapter by default.
        architecture: ModelSpec's name of the base.
        load_options: for diffusers' ``from_pretrained``.
        linear_sigmas: the pipeline gives its scheduler 1 .. 1/steps even where that does not shift them dynamically.
    """

    pipeline_class: ClassVar[Any]
    parts: ClassVar[dict[str, Any]]
    prefix: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]]
    architecture: ClassVar[str]
    load_options: ClassVar[dict[str, Any]] = {}
    linear_sigmas: ClassVar[bool] = False

    def __init__(self, pipeline: Any, config: ModelConfig, identity: dict[str, str], device: torch.device) -> None:
        pipeline.set_progress_bar_config(disable=True)
        if config.tiled_decode:
            pipeline.vae.enable_tiling()
        if config.sliced_decode or config.tiled_decode:
            pipeline.vae.enable_slicing()
        self.pipeline = pipeline
        self.config = config
        self.identity = identity
        self.device = device
        self.denoiser = getattr(pipeline, self.prefix).requires_grad_(False).eval()
        if device.type != "cpu":  # a plan, on the meta device, is a GPU's
            fuse_norms(self.denoiser)
        self.vae = pipeline.vae
        named = [getattr(pipeline, name) for name in self.parts if name.startswith("text_encoder")]
        self.encoders = [encoder for encoder in named if encoder is not None]
        for part in (self.vae, *self.encoders):
            part.requires_grad_(False).eval()
        self.resolution = config.resolution or self.default_resolution()
        grid = self.pixels_a_latent() * self.latents_a_token()
        if self.resolution % grid:
            raise UserError(f"model.resolution {self.resolution}: must be a multiple of {grid}")
        side = self.resolution // self.pixels_a_latent()
        self.latent_shape: tuple[int, ...] = (self.latent_channels(), side, side)

    # ---- what a family says

    def ask_encoders(self, texts: Sequence[str]) -> Conditioning:
        """The text encoders' output, one row a text; they are on the model's device."""
        raise NotImplementedError

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one text's tensors from ``encode``, by name; those in :data:`COUNTS` are of integers."""
        raise NotImplementedError

    def velocity(self, latents: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The denoiser's velocity, (N, ...) like ``latents``, float32."""
        raise NotImplementedError

    def default_resolution(self) -> int:
        return int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)

    def pixels_a_latent(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def latents_a_token(self) -> int:
        """Along a side."""
        return 2

    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE decodes them."""
        vae = self.vae.config
        scale, shift = float(vae.scaling_factor), float(getattr(vae, "shift_factor", None) or 0)
        return latents / scale + shift

    def adapter_key(self, name: str) -> str:
        """An adapter file's key for ``<module>.lora_A`` or ``.lora_B``, as diffusers and ComfyUI both read it."""
        return f"{self.prefix}.{name}.weight"

    def guided(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """One velocity from the empty prompt's and the prompt's: v_empty + g (v_prompt - v_empty)."""
        return without + guidance * (with_prompt - without)

    def initial_scale(self, sigma: float) -> float:
        """What standard normal noise is multiplied by to start at a schedule's first sigma."""
        return 1.0

    def error_weight(self, sigma: float) -> float:
        """The squared error of the model's own prediction over that of its velocity, at a sigma."""
        return 1.0

    # ---- what all share

    @torch.no_grad()
    def encode(self, texts: Sequence[str], home: torch.device | None = None) -> Conditioning:
        """The text encoders' output, one row a text; offloaded encoders come one by one, each once for all texts.

        Args:
            home: where to keep it; None for the model's device.
        """

        def ask(batch: Sequence[str]) -> Conditioning:
            return self.ask_encoders(batch).on(home or self.device)

        jobs = [
            functools.partial(ask, texts[at : at + ENCODED_AT_ONCE]) for at in range(0, len(texts), ENCODED_AT_ONCE)
        ]
        if not self.config.offload:
            return Conditioning.concatenate([job() for job in jobs])
        with at_work([self.denoiser] if can_leave(self.config) else [], torch.device("cpu")):
            return Conditioning.concatenate(in_turn(jobs, self.encoders, self.device))

    def blank_conditioning(self, count: int) -> Conditioning:
        """What ``encode`` would return for so many texts, of zeros."""
        shapes = self.conditioning_shapes()
        types = {name: torch.long if name in COUNTS else self.denoiser.dtype for name in shapes}
        return Conditioning({name: torch.zeros(count, *shape, dtype=types[name]) for name, shape in shapes.items()})

    def embedded_guidance(self, latents: Tensor) -> Tensor | None:
        """What a guidance-distilled denoiser is told, (N,); None for others."""
        return filled(self.config.embedded_guidance, latents) if self.denoiser.config.guidance_embeds else None

    @classmethod
    def lighter_parts(cls, folder: Path) -> dict[str, Any]:
        """Parts to give the pipeline instead of its own, which would need more than text asks for."""
        return {}

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, identity: dict[str, str], device: torch.device) -> PipelineModel:
        """From a diffusers folder, placed as the configuration says, but for the denoiser (:meth:`place`)."""
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            lighter = cls.lighter_parts(folder)
            # Given as None first: diffusers would check them against classes that may not be importable.
            replaced: dict[str, Any] = dict.fromkeys(lighter)
            if config.quantization is not None:
                replaced[cls.prefix] = load_quantized(cls.parts[cls.prefix], folder / cls.prefix, config, device)
            pipeline = cls.pipeline_class.from_pretrained(
                folder,
                dtype={"default": dtype_of(config), "vae": DTYPES[config.vae_precision]},
                local_files_only=True,
                **cls.load_options,
                **replaced,
            )
            pipeline.register_modules(**lighter)
        except (OSError, ValueError) as error:
            raise UserError(f"model {config.path}: cannot be loaded ({str(error).splitlines()[0]})") from error
        # Convolutions are faster with channels last, on CPUs and GPUs alike; the numbers are the same.
        if not any(p.ndim > 4 for p in pipeline.vae.parameters()):
            pipeline.vae.to(memory_format=torch.channels_last)
        model = cls(pipeline, config, identity, device)
        if not config.offload:
            for part in (model.vae, *model.encoders):
                part.to(device)
        return model

    def place(self) -> None:
        """Put the denoiser on its device; a quantized one is there already, one to be split is put there by that."""
        if self.config.quantization is None and not self.config.shard:
            self.denoiser.to(self.device)

    @classmethod
    def skeleton(cls, folder: Path, config: ModelConfig) -> PipelineModel:
        """From the configuration files alone; make it under ``torch.device("meta")``."""
        modules = {
            name: empty_module(kind, folder / name, cls.dtypes(config)[name]) if (folder / name).is_dir() else None
            for name, kind in cls.parts.items()
        }
        return cls.assembled(folder, config, modules, torch.device("meta"))

    @classmethod
    def dtypes(cls, config: ModelConfig) -> dict[str, torch.dtype]:
        """Of the weights of each part."""
        return dict.fromkeys(cls.parts, dtype_of(config)) | {"vae": DTYPES[config.vae_precision]}

    @classmethod
    def assembled(
        cls, folder: Path, config: ModelConfig, modules: Mapping[str, nn.Module | None], device: torch.device
    ) -> PipelineModel:
        """From modules that are there already, and the rest of a folder's configuration; it has no tokenizers.

        Args:
            modules: one for each of ``parts``.
        """
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        others = [name for name, value in index.items() if isinstance(value, list) and name not in modules]
        others += [
            name for name in cls.pipeline_class._get_signature_keys(cls.pipeline_class)[0] if name not in modules
        ]
        settings = {name: value for name, value in index.items() if not name.startswith("_") and name not in modules}
        settings = {name: value for name, value in settings.items() if not isinstance(value, list)}
        if (folder / "scheduler").is_dir():
            with torch.device("cpu"):  # its tables are values
                settings["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
        pipeline = cls.pipeline_class(**{**dict.fromkeys(others), **modules, **settings, **cls.load_options})
        if (folder / "tokenizer" / "tokenizer_config.json").exists():
            tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
            pipeline.tokenizer_max_length = tokenizer["model_max_length"]
        return cls(pipeline, config, {"path": config.path, "weights_hash": ""}, device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), float32 in [0, 1].

        Raises:
            UserError: the VAE overflows in fp16.
        """
        with at_work([self.vae], latents.device):
            decoded: Tensor = self.vae.decode(self.unscaled(latents).to(self.vae.dtype), return_dict=False)[0]
        if decoded.ndim == 5:  # a video VAE's single frame
            decoded = decoded[:, :, 0]
        # Some VAEs have activations beyond 65504 (diffusers' force_upcast says which, and says it of others too).
        if decoded.dtype == torch.float16 and latents.isfinite().all() and not decoded.isfinite().all():
            raise UserError("model.vae_precision fp16: this VAE overflows in it; set it to fp32 or bf16")
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, steps: int, shift: float | None = None, schedule: Schedule = "native") -> list[float]:
        """See :meth:`dgpo_plugin.models.base.Model.sigmas`."""
        if schedule == "dpm":
            return dpm_flow_sigmas(steps, self.shift(steps) if shift is None else shift)
        settings = self.pipeline.scheduler.config
        dynamic = settings.get("use_dynamic_shifting")
        changes = {} if shift is None or dynamic else {"shift": shift}
        scheduler = type(self.pipeline.scheduler).from_config(settings, **changes)
        linear = np.linspace(1.0, 1 / steps, steps)
        if dynamic:
            # The shift grows with the picture.
            scheduler.set_timesteps(sigmas=linear, mu=self.dynamic_shift(steps) if shift is None else self._mu(shift))
        elif self.linear_sigmas:
            scheduler.set_timesteps(sigmas=linear)
        else:
            scheduler.set_timesteps(steps)
        return [float(sigma) for sigma in scheduler.sigmas]

    def shift(self, steps: int) -> float:
        """By which the model's own schedule of so many steps shifts its timesteps towards noise."""
        settings = self.pipeline.scheduler.config
        if not settings.get("use_dynamic_shifting"):
            return float(settings.get("shift", 1.0))
        mu = self.dynamic_shift(steps)
        return mu if settings.get("time_shift_type") == "linear" else math.exp(mu)

    def _mu(self, shift: float) -> float:
        """What a dynamically shifting scheduler must be told for it: an exponential one the logarithm."""
        linear = self.pipeline.scheduler.config.get("time_shift_type") == "linear"
        return shift if linear else math.log(shift)

    def tile(self) -> int | None:
        """Pixels a side of the tiles that a picture of this size is decoded in; None if it is decoded whole."""
        if not self.config.tiled_decode:
            return None
        factor = int(self.pipeline.vae_scale_factor)
        # Two ways in which diffusers' VAEs say it.
        size = getattr(self.vae, "tile_latent_min_size", None) or self.vae.tile_sample_min_height // factor
        return int(size) * factor if self.resolution > int(size) * factor else None

    def dynamic_shift(self, steps: int) -> float:
        """mu: a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
        settings = self.pipeline.scheduler.config
        tokens = (self.latent_shape[1] // self.latents_a_token()) * (self.latent_shape[2] // self.latents_a_token())
        low, high = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
        least, most = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
        return float(least + (most - least) * (tokens - low) / (high - low))
