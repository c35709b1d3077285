"""How fast a configuration trains on this machine, against the ceiling: the bare denoiser's own rate.

The ceiling is timed on the trainer's own denoiser, its adapter off, before every iteration: a machine that warms up or
is busy for a while slows both alike.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.provenance import package_versions
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.distributed.device import best_device, runs_on_cpu
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.trainer import Trainer

from .timing import median_seconds

PARTS = ("rollout", "decode", "reward_wait", "training")
Record = dict[str, float]


class Spread(BaseModel):
    """The median over iterations, the lowest and the highest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    low: float
    high: float


class Throughput(BaseModel):
    """Rates over iterations, after two that warm up. A forward is one evaluation, a backward two.

    Attributes:
        ceiling: evaluations/s of the denoiser with its adapter off and no gradient, in the rollout's batches.
        ceiling_training: evaluations/s of it on the training phase's passes: forwards as above, and forwards with a
            backward to its inputs.
        rollout, training: evaluations/s of the two phases of an iteration.
        rollout_of_ceiling, training_of_ceiling: those over the ceiling timed just before the iteration.
        images, samples: per second of rollout, per second of training (a sample is an image at one timestep).
        share: of an iteration's time, by part.
        peak_memory: bytes, of iterations alone; the GPU's, or the process's on a CPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    created: str
    preset: str
    algorithm: str
    device: str
    precision: str
    threads: int
    packages: dict[str, str]
    iterations: int
    seconds_per_iteration: Spread
    ceiling: Spread
    ceiling_training: Spread
    rollout: Spread
    training: Spread
    rollout_of_ceiling: Spread
    training_of_ceiling: Spread
    images: Spread
    samples: Spread
    share: dict[str, float]
    peak_memory: int

    def rows(self) -> list[tuple[str, str]]:
        """What the command prints: (label, value)."""

        def of(rate: Spread, share: Spread, ceiling: Spread) -> str:
            return (
                f"{rate.median:,.0f} denoiser evaluations/s, {share.median:.0%} ({share.low:.0%} to {share.high:.0%}) "
                f"of the bare denoiser's {ceiling.median:,.0f}"
            )

        seconds = self.seconds_per_iteration
        return [
            ("device", f"{self.device}, {self.precision}, {self.threads} threads"),
            ("iteration", f"{seconds.median:.3f} s ({seconds.low:.3f} to {seconds.high:.3f}), {self.algorithm}"),
            ("rollout", f"{self.images.median:,.1f} images/s"),
            ("", of(self.rollout, self.rollout_of_ceiling, self.ceiling)),
            ("training", f"{self.samples.median:,.1f} samples/s"),
            ("", of(self.training, self.training_of_ceiling, self.ceiling_training)),
            *((f"share of {part.replace('_', ' ')}", f"{share:.1%}") for part, share in self.share.items()),
            ("peak memory", f"{self.peak_memory / 2**30:.2f} GiB"),
        ]


def measure(name: str, config: RunConfig, iterations: int, progress: Callable[[str], None]) -> Throughput:
    """Time whole iterations, each after the bare denoiser; nothing is written.

    Args:
        name: the configuration's, for the result.
        iterations: to time, after two that warm up.
        progress: is shown a line now and then.
    """
    progress("loading")
    trainer = build_trainer(config)
    running = trainer.iterations(share_done=lambda: 0.0)  # without an end
    progress("two iterations to warm up")
    for _ in itertools.islice(running, 2):
        pass
    peak_memory = peak_bytes(runs_on_cpu())
    conditioning = trainer.model.encode(["a red circle"])
    ceilings, records = list[tuple[float, float]](), list[Record]()
    for number in range(1, iterations + 1):
        progress(f"iteration {number} of {iterations}" + (f", {records[-1]['seconds']:.2f} s" if records else ""))
        ceilings.append(bare_rates(trainer, conditioning))
        records.append(next(running))
    return _summary(name, trainer, ceilings, records, peak_memory)


def _summary(
    name: str, trainer: Trainer, ceilings: Sequence[tuple[float, float]], records: Sequence[Record], peak_memory: int
) -> Throughput:
    config, images = trainer.config, trainer.config.training.images
    cost = trainer.algorithm.cost(config)
    ceiling = [forward for forward, _ in ceilings]
    training_ceiling = [_bare_training(*pair, record) for pair, record in zip(ceilings, records, strict=True)]
    rollout = [r["rollout_evaluations"] / r["rollout_seconds"] for r in records]
    training = [(r["denoiser_evaluations"] - r["rollout_evaluations"]) / r["training_seconds"] for r in records]
    return Throughput(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        preset=name,
        algorithm=config.algorithm.name,
        device=_device_name(),
        precision=str(next(trainer.model.denoiser.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        packages=package_versions(),
        iterations=len(records),
        seconds_per_iteration=_spread([r["seconds"] for r in records]),
        ceiling=_spread(ceiling),
        ceiling_training=_spread(training_ceiling),
        rollout=_spread(rollout),
        training=_spread(training),
        rollout_of_ceiling=_spread([a / b for a, b in zip(rollout, ceiling, strict=True)]),
        training_of_ceiling=_spread([a / b for a, b in zip(training, training_ceiling, strict=True)]),
        images=_spread([images / r["rollout_seconds"] for r in records]),
        samples=_spread([images * cost.trained_steps / r["training_seconds"] for r in records]),
        share={part: statistics.median(r[f"{part}_seconds"] / r["seconds"] for r in records) for part in PARTS},
        peak_memory=peak_memory,
    )


def _bare_training(forward: float, with_backward: float, record: Record) -> float:
    """Denoiser evaluations/s of the bare denoiser on an iteration's training passes."""
    differentiated = record["differentiated_evaluations"]
    # Forwards of kept graphs are among the differentiated ones and were the rollout's: they are taken off here.
    plain = record["denoiser_evaluations"] - record["rollout_evaluations"] - differentiated
    return (plain + differentiated) / (plain / forward + differentiated / with_backward)


def bare_rates(trainer: Trainer, conditioning: Conditioning, rounds: int = 3) -> tuple[float, float]:
    """Denoiser evaluations/s of the bare denoiser: forward alone, and with a backward pass to its inputs."""
    model, training = trainer.model, trainer.config.training
    share = -(-training.images // trainer.processes.count)
    size = min(training.micro_batch_size or share, share)
    guided = trainer.algorithm.cost(trainer.config).rollout_guidance > 1
    latents = torch.randn(size, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    both = torch.cat([latents, latents]) if guided else latents  # guidance doubles the batch
    once, doubled = conditioning[[0] * size], conditioning[[0] * len(both)]

    def forward() -> None:
        model.velocity(both, 0.5, doubled)

    def backward() -> None:
        with torch.enable_grad():
            model.velocity(latents.requires_grad_(), 0.5, once).square().mean().backward()

    with trainer.policy.as_reference():
        forward_seconds = median_seconds(forward, model.device, rounds=rounds, warm_up=False)
        backward_seconds = median_seconds(backward, model.device, rounds=rounds, warm_up=False)
    return len(both) / forward_seconds, 3 * size / backward_seconds


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def _device_name() -> str:
    if runs_on_cpu():
        return "CPU"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else best_device().type


def peak_bytes(on_cpu: bool) -> int:
    """The most memory that was in use so far, in bytes: a CUDA device's, else the process's."""
    if not on_cpu and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_throughput(measured: Throughput, path: Path) -> None:
    """Write what was measured as JSON."""
    write_text_atomically(path, json.dumps(measured.model_dump(), indent=1) + "\n")
