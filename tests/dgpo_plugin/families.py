"""A tiny random pipeline of every family's real classes, and how that pipeline itself is asked for latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from dgpo_plugin.models.families.flux import pack, unpack
from dgpo_plugin.models.load import world_pipeline

SHAPES = world_pipeline("shapes")


@dataclass(frozen=True)
class Family:
    """Attributes:
    build: writes the pipeline's folder.
    call: the pipeline's final latents (N, C, H, W) for prompts and the noise of :func:`fixed_noise`.
    width, height, tokens: what the tiny one is made for.
    guidance: to test classifier-free guidance with; 1 where the pipeline's is another.
    """

    build: Callable[[Path], None]
    call: Callable[[Any, list[str], Tensor, int, float], Tensor]
    width: int = 32
    height: int = 32
    tokens: int = 16
    guidance: float = 3.0


def clip(width: int = 32, *, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=600,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=600, d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2)
    )


def clip_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(SHAPES / "tokenizer")


def t5_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(SHAPES / "tokenizer_3")


def byte_tokenizer(kind: Any, **settings: Any) -> Any:
    """Bytes as tokens: any text, no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return kind(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", **settings)


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer(transformers.PreTrainedTokenizerFast)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    return tokenizer


TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""A language model's configuration, but for its depth."""


def vae(channels: int, blocks: int = 2) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
    )


def ask(pipe: Any, prompts: list[str], noise: Tensor, size: tuple[int, int], steps: int, **options: Any) -> Tensor:
    """A pipeline's own final latents for pictures of a size, height and width in pixels."""
    latents: Tensor = pipe(
        prompt=list(prompts),
        latents=noise,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images  # a copy of the list: one of them writes into it
    return latents


def pixels(latents: Tensor, factor: int) -> tuple[int, int]:
    """Height and width of pictures, by their latents and how many pixels along a side one of these stands for."""
    return latents.shape[2] * factor, latents.shape[3] * factor


def flux(folder: Path) -> None:
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
        ),
        vae=vae(16),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    ).save_pretrained(folder)


def call_flux(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    height, width = noise.shape[2] // 2, noise.shape[3] // 2
    true = {} if guidance == 1 else {"negative_prompt": [""] * len(prompts), "true_cfg_scale": guidance}
    size = pixels(noise, pipe.vae_scale_factor)
    latents = ask(pipe, prompts, pack(noise), size, steps, guidance_scale=3.5, max_sequence_length=16, **true)
    return unpack(latents, height, width)


def flux2_vae() -> Any:
    torch.manual_seed(1)
    made = diffusers.AutoencoderKLFlux2(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=32,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def flux2_transformer(width: int, *, guidance: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance,
    )


def flux2_klein(folder: Path) -> None:
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **{**TEXT, "hidden_size": 16, "intermediate_size": 32}, num_hidden_layers=27, head_dim=8
            )
        ),
        tokenizer=chat_tokenizer(),
        transformer=flux2_transformer(16, guidance=False),
    ).save_pretrained(folder)


def flux2_dev(folder: Path) -> None:
    tokenizer = byte_tokenizer(transformers.PreTrainedTokenizerFast)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}{% endfor %}"
    text = {**TEXT, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 30}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text}, vision_config={"model_type": "pixtral", **vision}
    )
    diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=flux2_transformer(16, guidance=True),
    ).save_pretrained(folder)
    # As published: a processor for pictures and text, which cannot be made without torchvision.
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def call_flux2_dev(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    size = pixels(noise, 2 * pipe.vae_scale_factor)
    latents = ask(pipe, prompts, noise, size, steps, guidance_scale=3.5, max_sequence_length=32)
    return latents.transpose(1, 2).reshape(noise.shape)


def call_flux2_klein(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Patches are normalised again: the pipeline gives them as the VAE decodes them."""
    size = pixels(noise, 2 * pipe.vae_scale_factor)
    latents = ask(pipe, prompts, noise, size, steps, guidance_scale=guidance, max_sequence_length=32)
    patches = torch.nn.functional.pixel_unshuffle(latents, 2)
    mean = pipe.vae.bn.running_mean[:, None, None]
    return (patches - mean) / (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()[:, None, None]


def qwen_image(folder: Path) -> None:
    text = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 2,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 2, 4]},
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
    )
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * 16,
            latents_std=[1.5] * 16,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=byte_tokenizer(transformers.Qwen2Tokenizer),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
        ),
    ).save_pretrained(folder)


def call_qwen_image(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    height, width = noise.shape[2] // 2, noise.shape[3] // 2
    size = pixels(noise, pipe.vae_scale_factor)
    true = {} if guidance == 1 else {"negative_prompt": [""] * len(prompts), "true_cfg_scale": guidance}
    return unpack(ask(pipe, prompts, pack(noise), size, steps, max_sequence_length=64, **true), height, width)


def z_image(folder: Path) -> None:
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**TEXT, num_hidden_layers=3, head_dim=16)),
        tokenizer=chat_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=16,
            dim=64,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 12, 12],
            axes_lens=[256, 64, 64],
        ),
    ).save_pretrained(folder)


def call_z_image(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    size = pixels(noise, pipe.vae_scale_factor)
    # This pipeline adds guidance to the prompt's own velocity: theirs of g - 1 is everybody else's of g.
    return ask(pipe, prompts, noise, size, steps, guidance_scale=guidance - 1, max_sequence_length=32)


def sana(folder: Path) -> None:
    diffusers.SanaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=8,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41,
        ),
        text_encoder=transformers.Gemma2Model(transformers.Gemma2Config(**TEXT, num_hidden_layers=2, head_dim=16)),
        tokenizer=byte_tokenizer(transformers.PreTrainedTokenizerFast),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
            patch_size=1,
        ),
    ).save_pretrained(folder)


def call_sana(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    # Its own scheduler is DPM-Solver++; Euler on the same sigmas is what is compared here.
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=1, final_sigmas_type="zero"
    )
    size = pixels(noise, pipe.vae_scale_factor)
    options = {"guidance_scale": guidance, "max_sequence_length": 300, "use_resolution_binning": False}
    return ask(pipe, prompts, noise, size, steps, **options)


def unet(**settings: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **settings,
    )


def ddim(prediction: str, **settings: Any) -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction,
        **settings,
    )


def sd15(folder: Path, prediction: str = "epsilon") -> None:
    diffusers.StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=32),
        scheduler=ddim(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sd21(folder: Path) -> None:
    sd15(folder, "v_prediction")


def sdxl(folder: Path) -> None:
    diffusers.StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        scheduler=ddim("epsilon"),
    ).save_pretrained(folder)


def call_unet(pipe: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
    return ask(pipe, prompts, noise, pixels(noise, pipe.vae_scale_factor), steps, guidance_scale=guidance)


FAMILIES = {
    "flux": Family(flux, call_flux),
    "flux2-klein": Family(flux2_klein, call_flux2_klein, tokens=32),
    "flux2-dev": Family(flux2_dev, call_flux2_dev, tokens=32, guidance=1.0),
    "qwen-image": Family(qwen_image, call_qwen_image, tokens=64),
    "z-image": Family(z_image, call_z_image, tokens=32),
    "sana": Family(sana, call_sana, tokens=300),
    "sd15": Family(sd15, call_unet),
    "sd21-v": Family(sd21, call_unet),
    "sdxl": Family(sdxl, call_unet),
}
