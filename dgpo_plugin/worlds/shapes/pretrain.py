"""How the shipped pipeline was made: ``dgpo worlds pretrain shapes`` runs this file.

Tokenizers, then the VAE on rendered pictures, then the denoiser and its two CLIP text encoders jointly on cached
latents by flow matching. The result is a plain diffusers ``StableDiffusion3Pipeline`` folder; the log beside it
(``pretrain.jsonl``) holds the settings, the losses and the accuracy on the way.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.distributed.processor import Work, settled
from dgpo_plugin.worlds.shapes.render import SIZE, render
from dgpo_plugin.worlds.shapes.scenes import TASKS, all_prompts
from dgpo_plugin.worlds.shapes.verify import verify

TEXT_TOKENS = 12
"""The longest caption, "a red circle right of a blue square", is ten tokens with both ends."""
TEXT_WIDTH = 64
WIDTH = 128
"""Two heads of 64."""
LATENT_CHANNELS = 16
LATENT_SIZE = SIZE // 8
TASK_WEIGHTS = dict(zip(TASKS, (0.08, 0.12, 0.25, 0.10, 0.20, 0.25), strict=True))
THIRD_ENCODER_PADDING = (1, 77, 256)
"""Third-encoder token counts seen in training: ours inside, ComfyUI's without a T5, diffusers' default."""


@dataclass(frozen=True)
class PretrainConfig:
    """Every number that the shipped weights depend on, besides the machine's float rounding."""

    seed: int = 0
    pictures: int = 80_000
    vae_iterations: int = 3_000
    vae_batch: int = 48
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    iterations: int = 16_000
    batch: int = 128
    learning_rate: float = 2e-3
    layers: int = 4
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    shift: float = 3.0


def pretrain(output: Path, config: PretrainConfig, *, compile_model: bool = False) -> None:
    """Train the shapes pipeline from nothing and save it to ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(derive_seed(config.seed, "pretrain"))
    with (output / "pretrain.jsonl").open("w", encoding="utf-8") as log:

        def record(**entry: Any) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        # The first thing, because what it may have to mask is fixed once anything was computed.
        half = settled("the denoiser's precision", "auto", torch.device("cpu"), lambda: _work(config)) == "bf16"
        numbers = {**asdict(config), "precision": "bf16" if half else "fp32"}
        record(stage="config", torch=torch.__version__, threads=torch.get_num_threads(), **numbers)
        prompts, pictures = _scenes(config)
        vae = train_vae(pictures, config, record)
        latents = encode_all(vae, pictures)
        pipeline = build_pipeline(vae, config)
        pipeline.save_pretrained(output)
        train_denoiser(pipeline, latents, prompts, config, record, half=half, compile_model=compile_model)
        save_half(pipeline, output)


def pretrain_again(output: Path, seed: int, iterations: int | None, compile_model: bool) -> None:
    """Make the pipeline as the shipped one was, which is what a world's ``pretrain`` names.

    Args:
        iterations: of the denoiser; None for as many as the shipped one had.
    """
    config = PretrainConfig(seed=seed) if iterations is None else PretrainConfig(seed=seed, iterations=iterations)
    pretrain(output, config, compile_model=compile_model)


def _work(config: PretrainConfig) -> Work:
    """The denoiser's layers in a step: the picture's tokens and the text's, each through a block's own."""
    tokens = config.batch * (LATENT_SIZE // 2) ** 2
    shapes = ((WIDTH, WIDTH, 4), (WIDTH, 4 * WIDTH, 1), (4 * WIDTH, WIDTH, 1))
    return tuple((tokens, inputs, outputs, times * 2 * config.layers) for inputs, outputs, times in shapes)


def _scenes(config: PretrainConfig) -> tuple[list[Prompt], Tensor]:
    """Captions and their pictures, (N, 3, 64, 64) in uint8 to keep them small."""
    rng = np.random.default_rng(derive_seed(config.seed, "scenes"))
    by_task = {task: [p for p in all_prompts() if p.metadata["task"] == task] for task in TASKS}
    tasks = rng.choice(TASKS, size=config.pictures, p=[TASK_WEIGHTS[task] for task in TASKS])
    prompts = [by_task[task][rng.integers(len(by_task[task]))] for task in tasks]
    pictures = np.empty((config.pictures, 3, SIZE, SIZE), dtype=np.uint8)
    for index, prompt in enumerate(prompts):
        pictures[index] = (render(dict(prompt.metadata), rng) * 255).round().astype(np.uint8)
    return prompts, torch.from_numpy(pictures)


def _to_model_range(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


# --- the VAE -------------------------------------------------------------------------------------------------------


def train_vae(pictures: Tensor, config: PretrainConfig, record: Any) -> AutoencoderKL:
    """A small ``AutoencoderKL`` of factor 8; its latent scale and shift are measured at the end."""
    vae = AutoencoderKL(
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
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(config.vae_iterations))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "vae"))
    started = time.perf_counter()
    for iteration in _progress("VAE", config.vae_iterations):
        chosen = torch.randint(len(pictures), (config.vae_batch,), generator=generator)
        target = _to_model_range(pictures[chosen]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = (decoded - target).square().mean() + 0.2 * (decoded - target).abs().mean()
        loss = error + config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if iteration % 250 == 0 or iteration == config.vae_iterations - 1:
            seconds = round(time.perf_counter() - started, 1)
            record(stage="vae", iteration=iteration, error=error.item(), loss=loss.item(), seconds=seconds)
    latents = encode_all(vae.eval(), pictures[:4096], normalised=False)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Tensor, *, normalised: bool = True) -> Tensor:
    """Posterior means, (N, 16, 8, 8); ``normalised`` as the denoiser sees them."""
    latents = torch.cat([vae.encode(_to_model_range(batch)).latent_dist.mean for batch in pictures.split(256)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor if normalised else latents


# --- tokenizers, text encoders, pipeline -----------------------------------------------------------------------------


def build_pipeline(vae: AutoencoderKL, config: PretrainConfig) -> StableDiffusion3Pipeline:
    """The untrained pipeline round a trained VAE."""
    tokenizer = clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=config.layers,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    _start_as_identity(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=vae,
        text_encoder=_clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=_silent_t5(),
        tokenizer_3=_silent_tokenizer(),
    )


def _start_as_identity(transformer: SD3Transformer2DModel) -> None:
    """adaLN-zero: every block and the output start at zero, which trains faster and more evenly."""
    linears = [block.norm1.linear for block in transformer.transformer_blocks]
    linears += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for linear in [*linears, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, with merges learnt from the world's own captions, ties broken by the alphabet."""
    words = Counter(word for prompt in all_prompts() for word in prompt.text.split())
    merges = learn_bpe(words)
    letters = _byte_alphabet()
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


def _byte_alphabet() -> list[str]:
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
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _silent_t5() -> T5EncoderModel:
    """A T5 whose output is exactly zero, as if it were absent: diffusers will not load a pipeline without one."""
    encoder = T5EncoderModel(
        T5Config(vocab_size=128, d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def _silent_tokenizer() -> PreTrainedTokenizerFast:
    """Reads every text as nothing but its end, so that one token is never too few."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer.normalizer = Replace(Regex(r"[\s\S]"), "")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=256
    )


# --- the denoiser ----------------------------------------------------------------------------------------------------


class _PaddedAttention:
    """SD3's joint attention with the last text token counted ``copies`` times.

    The third encoder's tokens are all zero and carry no position, so they stay equal through every layer, and
    attending to n of them is attending to one with log n added to its logit: exactly diffusers' default padding of
    256 tokens at the price of one.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        batch, image_tokens, _ = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        image_q = attn.norm_q(heads(attn.to_q(hidden_states)))
        image_k = attn.norm_k(heads(attn.to_k(hidden_states)))
        text_q = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_k = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        q, k = torch.cat([image_q, text_q], dim=2), torch.cat([image_k, text_k], dim=2)
        v = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        mask = None if self.bias is None else self.bias.to(q.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(batch, q.shape[2], -1)
        image, text = mixed[:, :image_tokens], mixed[:, image_tokens:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def train_denoiser(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    prompts: list[Prompt],
    config: PretrainConfig,
    record: Any,
    *,
    half: bool,
    compile_model: bool,
) -> None:
    """Flow matching on cached latents, in bf16 or float32; the pipeline ends with the averaged weights."""
    transformer = pipeline.transformer
    encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
    attention = _PaddedAttention()
    original_processors = transformer.attn_processors
    transformer.set_attn_processor(attention)
    forward = torch.compile(transformer) if compile_model else transformer
    parameters = [*transformer.parameters(), *encoders.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(config.iterations))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "denoiser"))
    texts = sorted({prompt.text for prompt in prompts})
    tokens = tokenize(pipeline, ["", *texts])
    token_row = {text: index for index, text in enumerate(texts, start=1)}
    rows = torch.tensor([token_row[prompt.text] for prompt in prompts])
    started, running = time.perf_counter(), 0.0
    for iteration in _progress("denoiser", config.iterations):
        chosen = torch.randint(len(latents), (config.batch,), generator=generator)
        clean = latents[chosen]
        kept = torch.rand(config.batch, generator=generator) >= config.caption_dropout
        sigma = torch.randn(config.batch, generator=generator).sigmoid()
        sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
        noise = torch.randn(clean.shape, generator=generator)
        copies = torch.tensor(THIRD_ENCODER_PADDING)[torch.randint(3, (config.batch,), generator=generator)]
        attention.bias = torch.zeros(config.batch, 1, 1, LATENT_SIZE**2 // 4 + TEXT_TOKENS + 1)
        attention.bias[:, 0, 0, -1] = copies.log()
        blend = sigma.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            context, pooled = encode(pipeline, tokens[rows[chosen] * kept])
            predicted = forward((1 - blend) * clean + blend * noise, context, pooled, sigma * 1000, return_dict=False)[
                0
            ]
        loss = (predicted.float() - (noise - clean)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(config.ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        running = loss.item() if iteration == 0 else 0.98 * running + 0.02 * loss.item()
        if (iteration + 1) % 1000 == 0 or iteration == config.iterations - 1:
            seconds = time.perf_counter() - started
            live = [parameter.detach().clone() for parameter in parameters]
            _assign(parameters, average)
            attention.bias = None
            accuracy = {f"accuracy_guidance_{g:g}": task_accuracy(pipeline, guidance=g) for g in (1.0, 2.5)}
            record(stage="denoiser", iteration=iteration + 1, loss=running, seconds=round(seconds, 1), **accuracy)
            _assign(parameters, live)
    _assign(parameters, average)
    transformer.set_attn_processor(original_processors)


@torch.no_grad()
def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def tokenize(pipeline: StableDiffusion3Pipeline, texts: list[str]) -> Tensor:
    """(N, 12) token ids; both text encoders share the tokenizer."""
    batch = pipeline.tokenizer(
        texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


def encode(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What ``encode_prompt`` gives with one third-encoder token, differentiably: (N, 13, 128) and pooled (N, 128)."""
    outputs = [enc(ids, output_hidden_states=True) for enc in (pipeline.text_encoder, pipeline.text_encoder_2)]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    context = nn.functional.pad(context, (0, 0, 0, 1))
    return context, torch.cat([output.text_embeds for output in outputs], dim=-1)


@torch.no_grad()
def task_accuracy(
    pipeline: StableDiffusion3Pipeline, guidance: float, images_per_task: int = 64, steps: int = 10
) -> dict[str, float]:
    """Strict accuracy for each task type, over all its prompts, with a plain Euler loop."""
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    pipeline.scheduler.set_timesteps(steps)
    sigmas = pipeline.scheduler.sigmas
    vae = pipeline.vae
    accuracy = {}
    for task in TASKS:
        candidates = [p for p in all_prompts() if p.metadata["task"] == task]
        prompts = [candidates[i] for i in rng.integers(len(candidates), size=images_per_task)]
        context, pooled = encode(pipeline, tokenize(pipeline, [p.text for p in prompts] + [""] * images_per_task))
        x = torch.randn(images_per_task, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        for sigma, following in itertools.pairwise(sigmas):
            t = sigma.expand(2 * images_per_task) * 1000
            asked, empty = pipeline.transformer(x.repeat(2, 1, 1, 1), context, pooled, t, return_dict=False)[0].chunk(2)
            x = x + (following - sigma) * (empty + guidance * (asked - empty))
        decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        pictures = (decoded / 2 + 0.5).clamp(0, 1).numpy()
        verdicts = verify(pictures, [dict(p.metadata) for p in prompts])
        accuracy[task] = float(np.mean([verdict.strict for verdict in verdicts]))
    return {**accuracy, "mean": float(np.mean(list(accuracy.values())))}


def save_half(pipeline: StableDiffusion3Pipeline, output: Path) -> None:
    """Save with the two large parts in float16: diffusers' loader brings its models back to float32.

    transformers' loader keeps a file's type, so the small text encoders stay in float32.
    """
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(output)


def _warm_cosine(total: int, warm: int = 100) -> Any:
    """Linear warm-up, then a cosine to 2 % of the peak."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))

    return factor


def _progress(name: str, total: int) -> Iterator[int]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        yield from bar.track(range(total), description=name)
