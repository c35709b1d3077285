"""What diffusers' text-to-image pipelines have in common; a family adds conditioning, velocity and the rest."""

from __future__ import annotations

import functools
import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.config.fields import ModelConfig, Schedule
from dgpo_plugin.models.base import DTYPES, Model, Sigma, TextLengths, dtype_of
from dgpo_plugin.models.base_identity import BaseIdentity, identity_of_parts
from dgpo_plugin.models.conditioning import Conditioning, finite
from dgpo_plugin.models.decoded import PictureCheck, blame, checked_latents
from dgpo_plugin.models.memory import can_offload_denoiser, on_device
from dgpo_plugin.models.modules import check_parts, load_modules
from dgpo_plugin.models.parts import empty_module, told_in_one_line
from dgpo_plugin.models.sequential_offload import one_module_at_a_time
from dgpo_plugin.models.speed import contiguous_tokens, fuse_norms
from dgpo_plugin.samplers.ode import dpm_flow_sigmas, shifted_levels

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

TEXT_BATCH_SIZE = 32
"""Texts that go through the text encoders at once."""
TEXT_LENGTH_TENSORS = ("mask", "length")
"""Conditioning tensors that say how much of a padded text is text; they are of integers."""


def per_image(value: float, latents: Tensor) -> Tensor:
    """One value for each image, (N,), on the latents' device: a denoiser's timestep or guidance."""
    return torch.full((len(latents),), value, device=latents.device)


class PipelineModel(Model):
    """A :class:`~dgpo_plugin.models.base.Model` out of a diffusers pipeline; a family is a subclass.

    Class attributes of a family, besides :class:`~dgpo_plugin.models.base.Model`'s:
        pipeline_class: of diffusers.
        component_classes: class of every folder with weights; the denoiser's is ``prefix``, the encoders' names start
            with ``text_encoder``.
        load_options: for diffusers' ``from_pretrained``.
        text_readers: the encoders whose tokens the denoiser reads, not only a vector for the whole text.
        optional_parts: text encoders that the pipeline can do without.
        linear_sigmas: the pipeline gives its scheduler 1 .. 1/steps even where that does not shift them dynamically.

    Args:
        pipeline: of ``pipeline_class``, its modules loaded.
        folder: that it is from.
        device: where latents and conditioning belong.

    Raises:
        UserError: ``model.width`` or ``model.height`` is no multiple of what the denoiser's tokens cover.
    """

    pipeline_class: ClassVar[Any]
    component_classes: ClassVar[dict[str, Any]]
    load_options: ClassVar[dict[str, Any]] = {}
    optional_parts: ClassVar[tuple[str, ...]] = ()
    linear_sigmas: ClassVar[bool] = False
    text_readers: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    # They are diffusers' and transformers' classes, whose configurations are read.
    denoiser: Any
    vae: Any
    encoders: list[Any]

    def __init__(self, pipeline: Any, config: ModelConfig, folder: Path, device: torch.device) -> None:
        pipeline.set_progress_bar_config(disable=True)
        if config.tiled_decode:
            pipeline.vae.enable_tiling()
        if config.sliced_decode or config.tiled_decode:
            pipeline.vae.enable_slicing()
        self.pipeline = pipeline
        self.config = config
        self.path = config.path
        self.folder = folder
        self.device = device
        self.denoiser = getattr(pipeline, self.prefix).requires_grad_(False).eval()
        if device.type != "cpu":  # a plan, on the meta device, is a GPU's
            fuse_norms(self.denoiser)
        contiguous_tokens(self.denoiser)
        self.vae = pipeline.vae
        named = [getattr(pipeline, name) for name in self.component_classes if name.startswith("text_encoder")]
        self.encoders = [encoder for encoder in named if encoder is not None]
        for module in (self.vae, *self.encoders):
            module.requires_grad_(False).eval()
        self.width, self.height = self._size()
        pixels = self.pixels_per_latent()
        self.latent_shape = (self.latent_channels(), self.height // pixels, self.width // pixels)
        self.architecture, self.kohya_version = self.variant()
        self._check_pictures = PictureCheck(blame(config))

    # ---- what a family says, besides `velocity`

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Conditioning:
        """The text encoders' output for one batch of texts, one row a text; the encoders are on the model's device."""

    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of one text's tensors from :meth:`encode`, by name."""

    def variant(self) -> tuple[str, str]:
        """ModelSpec's and kohya's name of this base, where the family has several: told from its parts' configurations.

        kohya's are what sd-scripts and musubi-tuner write as ``ss_base_model_version``.
        """
        return self.architecture, self.kohya_version

    def default_size(self) -> tuple[int, int]:
        """Width and height of the pictures that the base was trained on, in pixels."""
        return self.square(int(self.pipeline.default_sample_size))

    def square(self, latents: int) -> tuple[int, int]:
        """Width and height, in pixels, of a square of so many of the VAE's latents a side."""
        side = latents * int(self.pipeline.vae_scale_factor)
        return side, side

    def largest_side(self) -> float:
        """Pixels along a side of the largest picture that the denoiser has positions for."""
        return math.inf

    def pixels_per_latent(self) -> int:
        """Pixels along a side that one latent stands for."""
        return int(self.pipeline.vae_scale_factor)

    def latents_per_token(self) -> int:
        """Latents along a side that make one token of the denoiser."""
        return 2

    def latent_channels(self) -> int:
        """C of the latents, (N, C, H, W)."""
        return int(self.denoiser.config.in_channels)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE decodes them, from (N, C, H, W)."""
        return latents / float(self.vae.config.scaling_factor) + float(self.vae.config.get("shift_factor") or 0)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents that the denoiser is trained on, (N, C, H, W), from the VAE's own: :meth:`unscaled` backwards."""
        return (latents - float(self.vae.config.get("shift_factor") or 0)) * float(self.vae.config.scaling_factor)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The VAE's own latents, without an axis of frames, from pixels (N, 3, height, width) in [-1, 1]."""
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode()
        return latents

    @classmethod
    def component_overrides(cls, folder: Path) -> dict[str, Any]:  # noqa: ARG003 (FLUX.2's need it)
        """Components to give the pipeline instead of its own, which would need more than text does."""
        return {}

    # ---- what all share

    def _size(self) -> tuple[int, int]:
        """Width and height of the pictures, in pixels: those asked for, else the base's own."""
        own_width, own_height = self.default_size()
        width, height = self.config.width or own_width, self.config.height or own_height
        token, largest = self.pixels_per_latent() * self.latents_per_token(), self.largest_side()
        for name, side in (("width", width), ("height", height)):
            if side % token:
                raise UserError(f"model.{name} {side}: must be a multiple of {token}")
            if side > largest:
                raise UserError(f"model.{name} {side}: this base has no positions beyond {largest} pixels")
        return width, height

    @functools.cached_property
    def identity(self) -> BaseIdentity:
        return identity_of_parts(self.folder, self.pipeline.components)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], output_device: torch.device | None = None) -> Conditioning:
        def encode_batch(batch: Sequence[str]) -> Conditioning:
            return self.encode_texts(batch).on(output_device or self.device)

        starts = range(0, len(texts), TEXT_BATCH_SIZE)
        jobs = [functools.partial(encode_batch, texts[start : start + TEXT_BATCH_SIZE]) for start in starts]
        if not self.config.offload:
            return finite(Conditioning.concatenate([job() for job in jobs]), self.config)
        # Offloaded encoders come one by one, each once for all texts.
        with on_device([self.denoiser] if can_offload_denoiser(self.config) else [], torch.device("cpu")):
            encoded = Conditioning.concatenate(one_module_at_a_time(jobs, self.encoders, self.device))
        return finite(encoded, self.config)

    def text_lengths(self, texts: Sequence[str]) -> list[TextLengths]:
        lengths = []
        for name in [each for each in self.text_readers if each in self.component_classes]:
            encoder, tokenizer = (
                getattr(self.pipeline, part) for part in (name, name.replace("text_encoder", "tokenizer"))
            )
            if encoder is None or tokenizer is None:
                continue
            limit, setting = self.config.max_sequence_length, "model.max_sequence_length"
            if encoder.config.model_type.startswith("clip"):
                limit, setting = min(tokenizer.model_max_length, encoder.config.max_position_embeddings), ""
            lengths.append(TextLengths(name, limit, self.token_counts(tokenizer, list(texts)), setting))
        return lengths

    def token_counts(self, tokenizer: Any, texts: list[str]) -> list[int]:
        """Tokens of each text as the pipeline gives it to the tokenizer, before it is cut to the encoder's limit."""
        return [len(tokens) for tokens in tokenizer(texts, verbose=False).input_ids]

    def blank_conditioning(self, count: int) -> Conditioning:
        shapes = self.conditioning_shapes()
        types = {name: torch.long if name in TEXT_LENGTH_TENSORS else self.denoiser.dtype for name in shapes}
        return Conditioning({name: torch.zeros(count, *shape, dtype=types[name]) for name, shape in shapes.items()})

    def embedded_guidance(self, latents: Tensor) -> Tensor | None:
        """What a guidance-distilled denoiser is told, (N,); None for others."""
        return per_image(self.config.embedded_guidance, latents) if self.denoiser.config.guidance_embeds else None

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: torch.device) -> PipelineModel:
        """Load a diffusers folder, placed as the configuration says, but for the denoiser (:meth:`place`).

        Raises:
            UserError: the folder's weights cannot be loaded, not all of them arrive, or they cannot be quantized as
                the configuration says.
        """
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        with prefixed(f"model {config.path}"):
            check_parts(cls, folder)
            modules = load_modules(cls, folder, config, device)
            with told_in_one_line():
                overrides = cls.component_overrides(folder)
                # Given as None first: diffusers would check them against classes that may not be importable.
                given = {**cls.load_options, **dict.fromkeys(overrides), **modules}
                pipeline = cls.pipeline_class.from_pretrained(folder, local_files_only=True, **given)
                pipeline.register_modules(**overrides)
        # Convolutions are faster with channels last, on CPUs and GPUs alike; the numbers are the same.
        if not any(p.ndim > 4 for p in pipeline.vae.parameters()):
            pipeline.vae.to(memory_format=torch.channels_last)
        model = cls(pipeline, config, folder, device)
        if not config.offload:
            for module in (model.vae, *model.encoders):
                module.to(device)
        return model

    def place(self) -> None:
        if self.config.quantization is None and not self.config.shard:
            self.denoiser.to(self.device)

    @classmethod
    def skeleton(cls, folder: Path, config: ModelConfig) -> PipelineModel:
        """A model without weights, from a folder's configuration files; make it under ``torch.device("meta")``.

        Raises:
            UserError: a configuration file cannot be read.
        """
        modules = {
            name: empty_module(module_class, folder / name, cls.dtypes(config)[name])
            if (folder / name).is_dir()
            else None
            for name, module_class in cls.component_classes.items()
        }
        return cls.assembled(folder, config, modules, torch.device("meta"))

    @classmethod
    def dtypes(cls, config: ModelConfig) -> dict[str, torch.dtype]:
        """The type of each component's weights, by its folder."""
        return dict.fromkeys(cls.component_classes, dtype_of(config)) | {"vae": DTYPES[config.vae_precision]}

    @classmethod
    def assembled(
        cls, folder: Path, config: ModelConfig, modules: Mapping[str, nn.Module | None], device: torch.device
    ) -> PipelineModel:
        """A model of modules that are there already and the rest of a folder's configuration, without tokenizers.

        Args:
            modules: one for each of ``component_classes``; None for one that the folder lacks.
        """
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        absent = [name for name, value in index.items() if isinstance(value, list) and name not in modules]
        required, _ = cls.pipeline_class._get_signature_keys(cls.pipeline_class)  # noqa: SLF001 (no public way)
        absent += [name for name in required if name not in modules]
        settings = {name: value for name, value in index.items() if not name.startswith("_") and name not in modules}
        settings = {name: value for name, value in settings.items() if not isinstance(value, list)}
        if (folder / "scheduler").is_dir():
            with torch.device("cpu"):  # its tables are values
                settings["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
        pipeline = cls.pipeline_class(**{**dict.fromkeys(absent), **modules, **settings, **cls.load_options})
        if (folder / "tokenizer" / "tokenizer_config.json").exists():
            tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
            pipeline.tokenizer_max_length = tokenizer["model_max_length"]
        return cls(pipeline, config, folder, device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        pictures = self._decoded(latents)
        if latents.device.type != "meta":  # a plan's have no numbers
            self._check_pictures(pictures, latents, self._decoded)
        return pictures.clamp(0, 1)

    def _decoded(self, latents: Tensor) -> Tensor:
        """The VAE's own pictures, (N, 3, height, width), float32; what is outside of [0, 1] is not cut off."""
        with on_device([self.vae], latents.device):
            decoded: Tensor = self.vae.decode(self.unscaled(latents).to(self.vae.dtype), return_dict=False)[0]
        if decoded.ndim == 5:  # a video VAE's single frame
            decoded = decoded[:, :, 0]
        return decoded.float() / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, pictures: Tensor) -> Tensor:
        if not len(pictures):
            return torch.zeros(0, *self.latent_shape, device=self.device)
        with on_device([self.vae], self.device):
            pixels = ((2 * picture.to(self.device) - 1).to(self.vae.dtype) for picture in pictures.split(1))
            encoded = [self.scaled(self.encode_pixels(each).float()) for each in pixels]
        return checked_latents(torch.cat(encoded), self.config)

    def timestep(self, sigma: float) -> float:
        """What the denoiser is told of a noise level: that, unless a family says otherwise."""
        return sigma

    def levels(self, sigmas: Sequence[float]) -> Tensor:
        return torch.tensor([[self.timestep(sigma)] for sigma in sigmas], dtype=torch.float32, device=self.device)

    def timesteps(self, sigma: Sigma, latents: Tensor) -> Tensor:
        """What the denoiser is told of each image's noise level, (N,), float32."""
        return sigma[:, 0] if isinstance(sigma, Tensor) else per_image(self.timestep(sigma), latents)

    def sigmas(self, steps: int, shift: float | None = None, schedule: Schedule = "native") -> list[float]:
        if schedule == "dpm":
            return dpm_flow_sigmas(steps, self.shift(steps) if shift is None else shift)
        settings = self.pipeline.scheduler.config
        dynamic = settings.get("use_dynamic_shifting")
        changes = {} if shift is None or dynamic else {"shift": shift}
        scheduler = type(self.pipeline.scheduler).from_config(settings, **changes)
        linear = np.linspace(1.0, 1 / steps, steps)
        if dynamic:
            # The shift grows with the picture.
            mu = self.dynamic_shift(steps) if shift is None else self._scheduler_mu(shift)
            scheduler.set_timesteps(sigmas=linear, mu=mu)
        elif self.linear_sigmas:
            scheduler.set_timesteps(sigmas=linear)
        else:
            scheduler.set_timesteps(steps)
        return [float(sigma) for sigma in scheduler.sigmas]

    def training_sigmas(self) -> list[float]:
        settings = self.pipeline.scheduler.config
        fixed = 1.0 if settings.get("use_dynamic_shifting") else settings.get("flow_shift") or settings.get("shift")
        return shifted_levels(float(fixed or 1.0))

    def shift(self, steps: int) -> float:
        """The factor by which the model's own schedule of so many steps shifts its timesteps towards noise."""
        settings = self.pipeline.scheduler.config
        if not settings.get("use_dynamic_shifting"):
            return float(settings.get("shift", 1.0))
        mu = self.dynamic_shift(steps)
        return mu if settings.get("time_shift_type") == "linear" else math.exp(mu)

    def _scheduler_mu(self, shift: float) -> float:
        """The ``mu`` for which a dynamically shifting scheduler shifts by a factor: its logarithm if exponential."""
        linear = self.pipeline.scheduler.config.get("time_shift_type") == "linear"
        return shift if linear else math.log(shift)

    def diffusers_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The layout of a U-Net's blocks, by which kohya's names of SDXL are understood. No file and no hub is asked.
        options = {"unet_config": self.denoiser.config} if self.prefix == "unet" else {}
        read = self.pipeline_class.lora_state_dict(dict(tensors), **options)
        named: dict[str, Tensor] = read[0] if isinstance(read, tuple) else read
        own = {key.removeprefix(f"{self.prefix}."): tensor for key, tensor in named.items()}
        return dict(convert_unet_state_dict_to_peft(own))

    def tile(self) -> int | None:
        if not self.config.tiled_decode:
            return None
        factor = int(self.pipeline.vae_scale_factor)
        # Two ways in which diffusers' VAEs say it.
        size = getattr(self.vae, "tile_latent_min_size", None) or self.vae.tile_sample_min_height // factor
        return int(size) * factor if max(self.width, self.height) > int(size) * factor else None

    def dynamic_shift(self, steps: int) -> float:  # noqa: ARG002 (FLUX.2's depends on it)
        """The ``mu`` of a schedule that is shifted with the picture's size, for as many tokens as this one has.

        It lies on a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
        """
        settings = self.pipeline.scheduler.config
        _, height, width = self.latent_shape
        tokens = (height // self.latents_per_token()) * (width // self.latents_per_token())
        low, high = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
        least, most = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
        return float(least + (most - least) * (tokens - low) / (high - low))
