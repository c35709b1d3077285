"""The parts of a configuration that say which base is trained, how it is held in memory, and what adapter it gets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dgpo_plugin.config.reward_fields import Section


class ModelConfig(Section):
    """The base model, and how it is held in memory."""

    path: str = Field(description="A world's name (`dgpo list worlds`), a local diffusers folder, or a hub id.")
    adapter: str | None = Field(
        None,
        description="A finished adapter that the base wears, frozen: what is trained comes on top of it, and is used "
        "together with it. A file, or the folder that diffusers or peft saved; null for none.",
    )
    adapter_strength: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Of that adapter; null for 1, as it was trained, where the file's scale is known.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Floating-point type of the frozen weights and the forward passes, but the VAE's; the adapter is "
        "always trained in float32. auto is bf16 where it works and is faster, else fp32: tried out on a CPU, and "
        "written into the run as what it is.",
    )
    vae_precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Floating-point type of the VAE, whose pictures are what is rewarded; fp16 overflows in some "
        "(Stable Diffusion XL's).",
    )
    max_sequence_length: int = Field(
        256, ge=1, le=512, description="Tokens of the T5 encoder, where the model has one."
    )
    embedded_guidance: float = Field(
        3.5, ge=0, description="What a guidance-distilled model (FLUX dev) is told; others have no use for it."
    )
    width: int | None = Field(None, ge=16, description="Of the pictures, in pixels; null for the model's own.")
    height: int | None = Field(None, ge=16, description="Likewise; both are given, or neither.")
    quantization: Literal["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"] | None = Field(
        None,
        description="How the frozen denoiser's linear layers are made smaller, and by which package, which must be "
        "installed; null for not at all.",
    )
    shard: bool = Field(
        False,
        description="Split the frozen base over the processes (FSDP2) instead of copying it to each, if it fits on "
        "none. One process holds all of it, and gains nothing.",
    )
    offload: bool = Field(
        False,
        description="Keep the text encoders and the VAE in main memory while they are not used, and the denoiser while "
        "the encoders are.",
    )
    sliced_decode: bool = Field(False, description="Decode image by image: less memory, the same pictures.")
    tiled_decode: Literal[False, True, "accept-seams"] = Field(
        False,
        description="Decode tile by tile too: still less memory, and faint seams in pictures larger than a tile, which "
        "rewards would see; so training refuses those unless this is accept-seams.",
    )
    compile: bool = Field(
        False,
        description="Let torch.compile fuse the denoiser's repeated blocks: a minute or more at the start, other "
        "rounding.",
    )

    @model_validator(mode="after")
    def _size_is_whole(self) -> ModelConfig:
        if (self.width is None) != (self.height is None):
            given, missing = ("width", "height") if self.height is None else ("height", "width")
            raise ValueError(f"{given} is given without {missing}; give both, or neither for the model's own size")
        return self

    @model_validator(mode="after")
    def _strength_has_an_adapter(self) -> ModelConfig:
        if self.adapter_strength is not None and self.adapter is None:
            raise ValueError(
                "adapter_strength is given without adapter, whose strength it is; name that, or leave it out"
            )
        return self


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(
        64,
        ge=1,
        le=2**16,
        description="Columns of lora_B: how many directions the update of a layer's weights may have.",
    )
    alpha: float = Field(128, gt=0, description="The update is multiplied by alpha / rank.")
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="What lora_A starts from (lora_B is 0): kaiming, uniform within 1 / sqrt(inputs), peft's default; "
        "or gaussian, normal with standard deviation 1 / rank, peft's init_lora_weights=\"gaussian\", as in DGPO's "
        "released code.",
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        description="Ends of the names of the linear layers that get an adapter; each must match one. Null for the "
        "model family's attention projections.",
    )
    license: str = Field(
        "",
        description="License under which the adapter is passed on, for its card; empty for none stated. The base "
        "model's terms may bind it.",
    )
