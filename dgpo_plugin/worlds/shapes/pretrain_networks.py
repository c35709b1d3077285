"""What the shapes pipeline is made of: its sizes, its tokenizers and its untrained networks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.worlds.shapes.render import SIZE

TEXT_TOKENS = 12
"""The longest caption, "a red circle right of a blue square", is ten tokens with both ends."""
TEXT_WIDTH = 64
"""Features of one text encoder's token."""
WIDTH = 128
"""Features of the denoiser's token: two heads of 64."""
LATENT_CHANNELS = 16
LATENT_SIZE = SIZE // 8
"""Latents a side: the VAE's factor is 8."""


@dataclass(frozen=True)
class PretrainConfig:
    """Every number that the shipped weights depend on, besides the machine's float rounding.

    Attributes:
        pictures: drawn once, for the VAE and for the denoiser.
        vae_iterations, vae_batch, vae_learning_rate: steps of the VAE, pictures in each, AdamW's peak rate.
        kl_weight: of the VAE's posterior, a latent.
        decoder_iterations: steps of the VAE's decoder alone, on latents that stay as they are, after those; 0 for none.
        iterations, batch, learning_rate: the same of the denoiser and its text encoders.
        layers: blocks of the denoiser.
        caption_dropout: share of pictures that are trained on the empty caption.
        ema_decay: of the averaged weights, which are the result, once it has risen to that.
        shift: of the timesteps towards noise.
        log_every: steps of the denoiser from one measurement of its accuracy to the next.
        enough: mean accuracy, at the best guidance, at which a measurement ends the training; None for none.
    """

    seed: int = 0
    pictures: int = 80_000
    vae_iterations: int = 3_000
    vae_batch: int = 48
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    decoder_iterations: int = 0
    iterations: int = 16_000
    batch: int = 128
    learning_rate: float = 2e-3
    layers: int = 4
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    shift: float = 3.0
    log_every: int = 1_000
    enough: float | None = None


def build_vae() -> AutoencoderKL:
    """A small untrained ``AutoencoderKL`` of factor 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_pipeline(vae: AutoencoderKL, config: PretrainConfig, prompts: Sequence[Prompt]) -> StableDiffusion3Pipeline:
    """The untrained pipeline round a trained VAE, with a tokenizer for the world's prompts."""
    return pipeline_of(vae, config, clip_tokenizer(prompts), LATENT_SIZE)


def pipeline_of(
    vae: AutoencoderKL, config: PretrainConfig, tokenizer: CLIPTokenizer, latent_size: int
) -> StableDiffusion3Pipeline:
    """The untrained pipeline round a trained VAE and a tokenizer, for latents of at most so many a side."""
    transformer = SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=config.layers,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=latent_size,
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


def zero_modulations(transformer: SD3Transformer2DModel) -> None:
    """Start every block and the output at zero (adaLN-zero), which trains faster and more evenly."""
    linears = [block.norm1.linear for block in transformer.transformer_blocks]
    linears += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for linear in [*linears, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def clip_tokenizer(prompts: Sequence[Prompt]) -> CLIPTokenizer:
    """CLIP's byte-level BPE, with merges learnt from the world's own captions, ties broken by the alphabet."""
    words = Counter(word for prompt in prompts for word in prompt.text.split())
    merges = learn_bpe(words)
    letters = byte_alphabet()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=TEXT_TOKENS)


def learn_bpe(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one piece, the most frequent pair first, then the alphabetically first."""
    spelling = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in spelling.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, pieces in spelling.items():
            spelling[word] = _merge(pieces, best)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's vocabularies, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def zero_t5() -> T5EncoderModel:
    """A T5 whose output is exactly zero, as if it were absent: diffusers will not load a pipeline without one."""
    encoder = T5EncoderModel(
        T5Config(vocab_size=128, d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def empty_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that reads every text as nothing but its end, so that one token is never too few."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer.normalizer = Replace(Regex(r"[\s\S]"), "")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=256
    )
