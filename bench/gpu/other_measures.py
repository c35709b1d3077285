"""The measurements that need files, several processes or the embedded world."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dgpo_plugin.adapters.load import apply_adapter, read_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.errors import StopNow, Stopped, UserError
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.load import load_model
from dgpo_plugin.models.memory import shard
from dgpo_plugin.training.run import resume, train

from ..timing import wait_for
from .card import peak_memory
from .measures import Measured, Workload, rates_of, timed
from .rows import Row
from .setting import Setting


def adapter(setting: Setting) -> Measured:
    """Measure a quantized base's rates and memory, and an adapter saved from it and applied, unmerged, to another."""
    workload = Workload(setting)
    found = rates_of(workload, setting)
    torch.manual_seed(1)
    for parameter in workload.policy.parameters.values():
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    latents, conditioning = workload.inputs(2)
    with torch.no_grad():
        trained = workload.policy.velocity(latents, 0.5, conditioning)
        with workload.policy.as_reference():
            base = workload.policy.velocity(latents, 0.5, conditioning)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "adapter.safetensors"
        export_adapter(workload.policy, workload.policy.copy_weights(), file, TrainingFacts(setting.config, 0))
        del workload.policy
        other = setting.random_model(encoders=False)
        other.place()
        apply_adapter(other, file)
    with torch.no_grad():
        applied = other.velocity(latents, 0.5, conditioning)
    change = (trained - base).norm()
    found["applied_difference"] = float((applied - trained).norm() / change)
    found["change"] = float(change / base.norm())
    return found


def shard_denoiser(setting: Setting) -> Measured:
    """Compare FSDP2 over one process with the whole denoiser: the same numbers, and what it costs."""
    workload, size = Workload(setting), 2 if setting.tiny else 8
    forward, training = workload.forward(size), workload.training(size)
    before = forward()
    found: Measured = {"images": size}
    found["whole"] = {"forward": timed(forward, setting), "training": timed(training, setting)}
    shard(workload.model.denoiser, list(workload.policy.parameters.values()), setting.device)
    after = forward()
    found["split"] = {"forward": timed(forward, setting), "training": timed(training, setting)}
    found["relative_difference"] = float((after - before).norm() / before.norm())
    found["backend"] = str(torch.distributed.get_backend())
    return found


def load(setting: Setting) -> Measured:
    """Load a pipeline of full size from a folder, as users load theirs."""
    model: Any = setting.random_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pipeline"
        started = time.perf_counter()
        model.pipeline.save_pretrained(folder)
        found: Measured = {"write_seconds": time.perf_counter() - started}
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        del model
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        with peak_memory(setting.device) as peaks:
            started = time.perf_counter()
            loaded = load_model(setting.config.model.model_copy(update={"path": str(folder)}), setting.device)
            wait_for(setting.device)
            found["load_seconds"] = time.perf_counter() - started
        loaded.encode(["a cat"])
    return found | {"bytes": size, "peak_bytes": peaks.allocated, "gbs": size / found["load_seconds"] / 1e9}


ALLOWS_SEVERAL = (2, 30, 0)
"""The first NCCL that lets processes share a card (experimental), where NCCL_MULTI_RANK_GPU_ENABLE is 1."""


def _rank(number: int, store: str, backend: str, answers: Any) -> None:
    """Be one of two processes that sum a number."""
    from datetime import timedelta

    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    try:
        rendezvous = torch.distributed.FileStore(store, 2)  # type: ignore[attr-defined]
        torch.distributed.init_process_group(
            backend, store=rendezvous, rank=number, world_size=2, timeout=timedelta(seconds=20)
        )
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        one = torch.ones(1, device=device)
        torch.distributed.all_reduce(one)
        answers.put((number, float(one), ""))
    except Exception as error:  # whatever NCCL says is the finding
        lines = [line for line in str(error).splitlines() if line.strip()]
        answers.put((number, 0.0, lines[-1] if lines else type(error).__name__))
    os._exit(0)


def ranks(*, tiny: bool) -> Measured:
    """Whether two processes on one card can sum a number."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    on_card = torch.cuda.is_available() and not tiny
    backend = "nccl" if on_card else "gloo"
    found: Measured = {"backend": backend}
    if on_card:
        version = torch.cuda.nccl.version()
        found["nccl"] = ".".join(map(str, version))
        if version < ALLOWS_SEVERAL:
            found["note"] = f"NCCL {found['nccl']} allows one process a card; 2.30 allows several"
    with tempfile.TemporaryDirectory() as name:
        answers = context.SimpleQueue()
        pair = [context.Process(target=_rank, args=(n, f"{name}/store", backend, answers)) for n in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            process.join(45)
        sums = []
        while not answers.empty():
            sums.append(answers.get())
        for process in pair:
            process.kill()
    found["works"] = len(sums) == 2 and all(value == 2 for _, value, _ in sums)
    found["messages"] = sorted({message for _, _, message in sums if message})
    return found


class _Halfway:
    """Ends a run after some iterations, for another process or another day to go on with."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def __call__(self, _trainer: object, record: dict[str, float] | None) -> None:
        if record is not None and record["iteration"] == self.iterations:
            raise StopNow


def resumed(*, tiny: bool) -> Measured:
    """Train the embedded world whole, whole again, and stopped in the middle and gone on with: are the bits the same?

    Float32 and bf16 each; the differences are of the adapters' weights, in parts of what was trained.
    """
    silent = Console(file=io.StringIO())
    found: Measured = {"iterations": 4 if tiny else 10}
    few = ["training.prompts_per_iteration=2", "training.group_size=4"] if tiny else []
    for precision in ("fp32",) if tiny else ("fp32", "bf16"):
        settings = [f"training.iterations={found['iterations']}", "evaluation.images=8", f"model.precision={precision}"]
        config = load_config("shapes", [*settings, *few])
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            whole, again = (read_adapter(train(config, folder / run, silent)).tensors for run in ("whole", "again"))
            with contextlib.suppress(Stopped):
                train(config, folder / "cut", silent, watch=_Halfway(found["iterations"] // 2))
            gone_on = read_adapter(resume(folder / "cut", silent)).tensors
        apart = {"again_difference": _apart(again, whole), "resumed_difference": _apart(gone_on, whole)}
        found[precision] = {**apart, "seconds": time.perf_counter() - started}
        found["same_bits"] = found.get("same_bits", True) and not any(apart.values())
    return found


def _apart(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """How far one adapter is from another, in parts of that one's norm; 0 only if every bit is the same."""
    if all(torch.equal(ours[key], reference[key]) for key in reference):
        return 0.0
    both = [torch.cat([table[key].double().flatten() for key in reference]) for table in (ours, reference)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def comparison(row: Row, folder: Path, *, tiny: bool) -> Measured:
    """Run the embedded comparison, with as many seeds as the row says; one that was cut off goes on.

    Raises:
        UserError: what a comparison refuses, or no run that was finished.
    """
    from ..compare import compare
    from ..plan import Plan
    from ..preset import load_preset
    from ..records import read_results
    from ..report.verdict import conclusions
    from ..size import SizeName

    name: SizeName = "quick" if tiny else "default"
    preset, task = load_preset("shapes")
    size = preset.sized(name, seeds=row.options["seeds"])
    if tiny:
        few = {**preset.shared["training"], "prompts_per_iteration": 2, "group_size": 4}
        preset = preset.model_copy(update={"shared": {**preset.shared, "training": few}})
        prompts = {"test_prompts": 2, "validation_prompts": 1, "out_of_domain_prompts": 2, "images_per_prompt": 2}
        size = size.model_copy(update={"seeds": 1, "evaluations": 6000, "flops": None, "schedule": (), **prompts})
    plan = Plan.of("shapes", preset, task, name, size, list(preset.algorithms), jobs=1)
    # Half of the cores, as most computers count each twice.
    plan = plan.model_copy(update={"threads": max(1, plan.threads // 2)})
    started = time.perf_counter()
    compare(plan, folder, _SilentListener())
    results = read_results(folder / "results.json")
    finished = [cell for cell in results.cells if cell.status == "done"]
    if not finished:
        raise UserError(f"{folder}: no run was finished")
    return {"seconds": time.perf_counter() - started, "runs": len(finished), "verdict": conclusions(folder)[0]}


class _SilentListener:
    """A listener that shows nothing."""

    def expect(self, forecast: object) -> None:
        """Ignore the forecast."""

    def listen(self, event: object) -> None:
        """Ignore the event."""
