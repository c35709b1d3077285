"""What the words pipeline is made of: its sizes, its tokenizer and its untrained networks."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dgpo_plugin.worlds.shapes.pretrain_networks import (
    LATENT_CHANNELS,
    byte_alphabet,
    empty_tokenizer,
    zero_modulations,
    zero_t5,
)
from dgpo_plugin.worlds.words import render
from dgpo_plugin.worlds.words.captions import COLORS, FONTS, GROUNDS

TEXT_TOKENS = 16
"""A prompt is 14 tokens with both ends."""
TEXT_WIDTH = 64
"""Features of one text encoder's token."""
WIDTH = 128
"""Features of the denoiser's token: two heads of 64."""
LATENT_HEIGHT, LATENT_WIDTH = render.HEIGHT // 8, render.WIDTH // 8
"""The VAE's factor is 8."""
WHOLE_WORDS = ("in", "on", "a", "ground", *FONTS, *GROUNDS, *COLORS)
"""What is one token; the word to draw, which none of them is, is spelled letter by letter."""


@dataclass(frozen=True)
class PretrainConfig:
    """Every number that the shipped weights depend on, besides the machine's float rounding.

    Attributes:
        pictures: drawn once, for the VAE and for the denoiser.
        vae_iterations, vae_batch, vae_learning_rate: steps of the VAE, pictures in each, AdamW's peak rate.
        kl_weight: of the VAE's posterior, a latent.
        iterations, batch, learning_rate: the same of the denoiser and its text encoders, its rate constant once warm,
            so that a shorter training is the beginning of a longer one.
        layers: blocks of the denoiser.
        caption_dropout: share of pictures that are trained on the empty caption.
        ema_decay: of the averaged weights, which are the result, once it has risen to that.
        shift: of the timesteps towards noise.
        evaluate_every: iterations between two readings of the words that it draws.
    """

    seed: int = 0
    pictures: int = 24_000
    vae_iterations: int = 2_000
    vae_batch: int = 48
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    iterations: int = 1_150
    batch: int = 64
    learning_rate: float = 1.5e-3
    layers: int = 4
    caption_dropout: float = 0.1
    ema_decay: float = 0.99
    shift: float = 3.0
    evaluate_every: int = 250


def build_pipeline(vae: AutoencoderKL, config: PretrainConfig) -> StableDiffusion3Pipeline:
    """The untrained pipeline round a trained VAE."""
    tokenizer = spelling_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_WIDTH,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=config.layers,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_WIDTH,
        qk_norm="rms_norm",
    )
    zero_modulations(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=vae,
        text_encoder=_clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=zero_t5(),
        tokenizer_3=empty_tokenizer(),
    )


def spelling_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE without a merge, so that it spells, but for the words that name fonts and grounds."""
    letters = byte_alphabet()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_TOKENS)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in WHOLE_WORDS])
    return tokenizer


def _clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
