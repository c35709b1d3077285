"""What the words pipeline is made of besides shapes' networks: its sizes, and a tokenizer that spells."""

from __future__ import annotations

from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from dgpo_plugin.worlds.shapes.pretrain_networks import PretrainConfig, byte_alphabet, pipeline_of
from dgpo_plugin.worlds.words import render
from dgpo_plugin.worlds.words.captions import COLORS, FONTS, GROUNDS

TEXT_TOKENS = 16
"""A prompt is 14 tokens with both ends."""
LATENT_HEIGHT, LATENT_WIDTH = render.HEIGHT // 8, render.WIDTH // 8
"""The VAE's factor is 8."""
WHOLE_WORDS = ("in", "on", "a", "ground", *FONTS, *GROUNDS, *COLORS)
"""What is one token; the word to draw, which none of them is, is spelled letter by letter."""


def build_pipeline(vae: AutoencoderKL, config: PretrainConfig) -> StableDiffusion3Pipeline:
    """The untrained pipeline round a trained VAE."""
    return pipeline_of(vae, config, spelling_tokenizer(), LATENT_WIDTH)


def spelling_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE without a merge, so that it spells, but for the words that name fonts and grounds."""
    letters = byte_alphabet()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_TOKENS)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in WHOLE_WORDS])
    return tokenizer
