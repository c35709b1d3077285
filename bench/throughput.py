"""How fast a configuration trains on this machine, against the ceiling: the bare denoiser's own rate."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from dgpo_plugin.config import RunConfig
from dgpo_plugin.export import package_versions
from dgpo_plugin.files import write_text_atomically
from dgpo_plugin.models import load_model
from dgpo_plugin.processes import best_device, join_processes, runs_on_cpu
from dgpo_plugin.trainer import Trainer

PARTS = ("rollout", "decode", "reward_wait", "training")


class Throughput(BaseModel):
    """Medians over iterations, after one that warms up. A forward is one evaluation, a backward two.

    Attributes:
        ceiling: evaluations/s of the denoiser without adapter and gradient, forward, in micro-batches of this run.
        ceiling_training: evaluations/s of it on the training phase's passes: forwards as above, and forwards with a
            backward to its inputs.
        rollout, training: evaluations/s of the two phases of an iteration.
        images, samples: a second of rollout, a second of training (an image at one timestep).
        share: of an iteration's time, by part.
        peak_memory: bytes; the GPU's, or the process's on a CPU.
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
    seconds_an_iteration: float
    ceiling: float
    ceiling_training: float
    rollout: float
    training: float
    images: float
    samples: float
    share: dict[str, float]
    peak_memory: int

    def rows(self) -> list[tuple[str, str]]:
        """What the command prints: (label, value)."""

        def of(rate: float, ceiling: float) -> str:
            return f"{rate:,.0f} denoiser evaluations/s, {rate / ceiling:.0%} of the bare denoiser's {ceiling:,.0f}"

        return [
            ("device", f"{self.device}, {self.precision}, {self.threads} threads"),
            ("iteration", f"{self.seconds_an_iteration:.3f} s, {self.algorithm}"),
            ("rollout", f"{self.images:,.1f} images/s"),
            ("", of(self.rollout, self.ceiling)),
            ("training", f"{self.samples:,.1f} samples/s"),
            ("", of(self.training, self.ceiling_training)),
            *((f"share of {part.replace('_', ' ')}", f"{share:.1%}") for part, share in self.share.items()),
            ("peak memory", f"{self.peak_memory / 2**30:.2f} GiB"),
        ]


def measure(name: str, config: RunConfig, iterations: int, progress: Callable[[str], None]) -> Throughput:
    """Time the bare denoiser, then whole iterations; nothing is written."""
    progress("the bare denoiser")
    forward, with_backward = _ceilings(config)
    progress("loading the trainer")
    trainer = Trainer(config.model_copy(update={"training": config.training.model_copy(update={"iterations": 10**9})}))
    records: list[dict[str, float]] = []
    for record in trainer.iterations():
        progress(f"iteration {record['iteration']:.0f} of {iterations + 1}, {record['seconds']:.2f} s")
        records.append(record)
        if len(records) > iterations:
            break
    del records[0]

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(record) for record in records)

    images = config.training.images

    def bare_training(record: dict[str, float]) -> float:
        """Evaluations/s of the bare denoiser on this iteration's training passes."""
        differentiated = record["differentiated_evaluations"]
        plain = record["denoiser_evaluations"] - record["rollout_evaluations"] - differentiated
        return (plain + differentiated) / (plain / forward + differentiated / with_backward)

    seconds = median(lambda r: r["seconds"])
    on_cpu = runs_on_cpu()
    return Throughput(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        preset=name,
        algorithm=config.algorithm.name,
        device="CPU" if on_cpu else _device_name(),
        precision=str(next(trainer.model.denoiser.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        packages=package_versions(),
        iterations=len(records),
        seconds_an_iteration=seconds,
        ceiling=forward,
        ceiling_training=median(bare_training),
        rollout=median(lambda r: r["rollout_evaluations"] / r["rollout_seconds"]),
        training=median(lambda r: (r["denoiser_evaluations"] - r["rollout_evaluations"]) / r["training_seconds"]),
        images=median(lambda r: images / r["rollout_seconds"]),
        samples=median(lambda r: images * config.trained_steps / r["training_seconds"]),
        share={part: median(lambda r, part=part: r[f"{part}_seconds"] / r["seconds"]) for part in PARTS},  # type: ignore[misc]
        peak_memory=_peak_memory(on_cpu),
    )


def _ceilings(config: RunConfig, rounds: int = 7) -> tuple[float, float]:
    """Evaluations/s of the bare denoiser: forward alone, and with a backward pass to its inputs."""
    processes = join_processes()
    device = best_device()
    model = load_model(config.model, device)
    images = config.training.images
    size = min(config.training.micro_batch_size or images, -(-images // processes.count))
    latents = torch.randn(size, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    asked = model.encode(["a red circle"])[[0] * size]

    def forward() -> None:
        with torch.no_grad():
            model.velocity(latents, 0.5, asked)

    def backward() -> None:
        model.velocity(latents.requires_grad_(), 0.5, asked).square().mean().backward()

    return size / _seconds(forward, rounds), 3 * size / _seconds(backward, rounds)


def _seconds(work: Callable[[], None], rounds: int) -> float:
    """The median of some calls, after one that warms up."""
    spent = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else best_device().type


def _peak_memory(on_cpu: bool) -> int:
    """Bytes: a CUDA device's, else the process's."""
    if not on_cpu and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_throughput(measured: Throughput, path: Path) -> None:
    """As JSON."""
    write_text_atomically(path, json.dumps(measured.model_dump(), indent=1) + "\n")
