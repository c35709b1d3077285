"""How long DGPO's iterations take beside the loop of its released code: `python tools/beside_released_loop.py`.

Both train the embedded world's model on the same numbers of passes, in turns, with one thread. The other loop is
written here from what the released one does (Luo-Yihong/DGPO, scripts/train_sd3_dgpo.py): float32 weights under
autocast, peft's own LoRA layers, the frozen base by switching the adapter off, the old policy by copying its weights in
and out, one micro-batch after the other. Its gathering, logging and progress bars are left out, and rewards of both. A
line for each way to train has the ratio of seconds, theirs over ours: above 1 ours is faster.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import peft
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dgpo_bench.preset import load_preset
from dgpo_bench.tune import nested
from dgpo_plugin.algorithms.forward import matching_error
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.models.pipeline import ATTENTION
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.training.build import build_trainer

WORLD = "shapes-2"
WARM_UP = 3
"""Iterations before the first that counts: the old policy is not the policy then."""
GUIDANCE, STEPS, GROUPS, SIZE, TIMES, NOISIEST = 3.0, 10, 4, 8, 4, 5


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        micro_batch: images that go through the denoiser together.
        clip: whether the loss looks at the old policy.
        reference_guidance: of the frozen base in the loss.
    """

    precision: str
    micro_batch: int
    clip: bool
    reference_guidance: float

    def __str__(self) -> str:
        clip, reference = "with clip" if self.clip else "no clip", f"reference at {self.reference_guidance:g}"
        return f"{self.precision}, micro-batches of {self.micro_batch}, {clip}, {reference}"


WAYS = [
    Way(precision, micro_batch, clip, reference)
    for precision in ("fp32", "bf16")
    for micro_batch in (SIZE, GROUPS * SIZE)
    for clip, reference in ((False, 1.0), (True, 1.0), (True, 2.0))
]


class ReleasedLoop:
    """The other loop: :meth:`iterate` does one iteration and returns the seconds of its rollout and of its training."""

    def __init__(self, way: Way, prompts: Sequence[Prompt]) -> None:
        self.way, self.prompts = way, prompts
        self.pipe: Any = StableDiffusion3Pipeline.from_pretrained(
            world_pipeline(WORLD), text_encoder_3=None, tokenizer_3=None
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.transformer.requires_grad_(requires_grad=False)
        settings = peft.LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=list(ATTENTION))
        self.model: Any = peft.get_peft_model(self.pipe.transformer, settings)
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.old = [each.detach().clone() for each in self.trained]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=1e-4)
        self.pipe.scheduler.set_timesteps(STEPS)
        self.sigmas = self.pipe.scheduler.sigmas.tolist()
        self.step = self.evaluations = 0
        self.negative = self.encode([""])

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        context, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return context, pooled

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.way.precision == "bf16")

    def velocity(self, x: Tensor, sigma: float, context: Tensor, pooled: Tensor, guidance: float = 1.0) -> Tensor:
        if guidance > 1:
            none = [each.expand(len(x), *each.shape[1:]) for each in self.negative]
            x, context, pooled = torch.cat([x, x]), torch.cat([none[0], context]), torch.cat([none[1], pooled])
        self.evaluations += len(x) * (3 if torch.is_grad_enabled() else 1)
        t = torch.full((len(x),), sigma * 1000)
        out: Tensor = self.model(
            hidden_states=x, timestep=t, encoder_hidden_states=context, pooled_projections=pooled, return_dict=False
        )[0]
        if guidance > 1:
            without, with_prompt = out.chunk(2)
            out = without + guidance * (with_prompt - without)
        return out

    @torch.no_grad()
    def sample(self, context: Tensor, pooled: Tensor) -> Tensor:
        parts = []
        for rows in torch.arange(GROUPS * SIZE).split(self.way.micro_batch):
            channels, side = self.pipe.transformer.config.in_channels, self.pipe.transformer.config.sample_size
            x = torch.randn(len(rows), channels, side, side)
            with self.autocast():
                for sigma, after in zip(self.sigmas, self.sigmas[1:], strict=False):
                    x = x + (after - sigma) * self.velocity(x, sigma, context[rows], pooled[rows], GUIDANCE).float()
                vae = self.pipe.vae
                vae.decode(x / vae.config.scaling_factor + (vae.config.shift_factor or 0), return_dict=False)
            parts.append(x)
        return torch.cat(parts)

    @contextlib.contextmanager
    def old_weights(self) -> Iterator[None]:
        kept = [each.detach().clone() for each in self.trained]
        for each, old in zip(self.trained, self.old, strict=True):
            each.data.copy_(old)
        yield
        for each, own in zip(self.trained, kept, strict=True):
            each.data.copy_(own)

    def train(self, clean: Tensor, context: Tensor, pooled: Tensor, advantages: Tensor) -> None:
        chosen = torch.randperm(NOISIEST)[:TIMES].tolist()
        batches = torch.arange(len(clean)).split(self.way.micro_batch)
        for rows in batches:
            x0, given, own = clean[rows], (context[rows], pooled[rows]), advantages[rows]
            for sigma in (self.sigmas[step] for step in chosen):
                noise = torch.randn(len(rows) // SIZE, *x0.shape[1:]).repeat_interleave(SIZE, 0)
                noisy, target = (1 - sigma) * x0 + sigma * noise, noise - x0
                with self.autocast():
                    with torch.no_grad():
                        with self.model.disable_adapter():
                            base = self.velocity(noisy, sigma, *given, self.way.reference_guidance)
                        if self.way.clip:
                            with self.old_weights():
                                old = self.velocity(noisy, sigma, *given)
                    predicted = self.velocity(noisy, sigma, *given)
                d, d_base = matching_error(predicted, target), matching_error(base, target)
                with torch.no_grad():
                    score = (10 * own * (d - d_base)).view(-1, SIZE).mean(1).repeat_interleave(SIZE)
                if self.way.clip:
                    ratio = torch.exp(matching_error(old, target) - d)
                    out = torch.where(own > 0, ratio > 1.01, ratio < 0.99)
                    d = torch.where(out, d.detach(), d)
                kl = matching_error(predicted, base)
                loss = (torch.sigmoid(score) * own * d).mean() + 0.02 * kl.mean()
                (loss / (len(batches) * TIMES)).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(0.3, 0.001 * self.step)
        for old, own in zip(self.old, self.trained, strict=True):
            old.mul_(decay).add_(own.detach(), alpha=1 - decay)
        self.step += 1

    def iterate(self, iteration: int) -> tuple[float, float]:
        drawn = [self.prompts[(iteration * GROUPS + k) % len(self.prompts)].text for k in range(GROUPS)]
        context, pooled = (each.repeat_interleave(SIZE, 0) for each in self.encode(drawn))
        began = time.perf_counter()
        clean = self.sample(context, pooled)
        sampled = time.perf_counter()
        rewards = torch.rand(GROUPS, SIZE)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten()
        self.train(clean, context, pooled, advantages)
        return sampled - began, time.perf_counter() - sampled


def our_config(way: Way) -> RunConfig:
    """The embedded world's comparison as such an iteration."""
    preset, task = load_preset(WORLD)
    changed = {
        "model.precision": way.precision,
        "rollout.steps": STEPS,
        "training.prompts_per_iteration": GROUPS,
        "training.group_size": SIZE,
        "training.micro_batch_size": way.micro_batch,
        "training.guard": None,
        "algorithm.timesteps": TIMES,
        "algorithm.noisiest_steps": NOISIEST,
        "algorithm.clip": 1e-2 if way.clip else None,
        "algorithm.reference_guidance": way.reference_guidance,
        "algorithm.rollout_guidance": GUIDANCE,
    }
    config: RunConfig = preset.run_config(task, "dgpo", 0, nested(changed))
    return config


@click.command()
@click.option("--iterations", default=12, show_default=True, help="That count, of each way.")
def main(iterations: int) -> None:
    """Time both, in turns."""
    torch.set_num_threads(1)
    prompts = load_prompts(f"{WORLD}/train")
    for way in WAYS:
        trainer, other = build_trainer(our_config(way)), ReleasedLoop(way, prompts)
        ours = trainer.iterations(share_done=lambda: 0.0)
        pairs = []
        for number in range(WARM_UP + iterations):
            other.evaluations = 0
            theirs, record = other.iterate(number), next(ours)
            if number >= WARM_UP and other.evaluations != record["denoiser_evaluations"]:
                raise AssertionError(f"{way}: {other.evaluations} passes, ours {record['denoiser_evaluations']}")
            rollout = record["rollout_seconds"] + record["decode_seconds"]
            pairs.append((theirs, (rollout, record["training_seconds"])))
        counted = pairs[WARM_UP:]
        ratios = [
            statistics.median(their / our for their, our in each)
            for each in (
                [(their[0], our[0]) for their, our in counted],
                [(their[1], our[1]) for their, our in counted],
                [(sum(their), sum(our)) for their, our in counted],
            )
        ]
        seconds = [statistics.median(sum(each) for each in side) for side in zip(*counted, strict=True)]
        click.echo(
            f"{way}: rollout {ratios[0]:.2f}, training {ratios[1]:.2f}, iteration {ratios[2]:.2f}"
            f" ({seconds[0]:.2f} s and {seconds[1]:.2f} s)"
        )


if __name__ == "__main__":
    main()
