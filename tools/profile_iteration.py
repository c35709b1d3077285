"""Where an iteration's time goes: `python tools/profile_iteration.py [algorithm] [iterations]`, one thread.

Everything is charged to the denoiser (forward and backward), the decoder, the reward, or, what is left, overhead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from dgpo_bench.preset import load_preset
from dgpo_plugin.commands.terminal import quieten
from dgpo_plugin.training.build import build_trainer

spent: dict[str, float] = {}


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its seconds added to a part."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - started

    return wrapped


def main() -> None:
    """Train a few iterations of one algorithm of the shapes comparison and print the shares."""
    quieten()
    torch.set_num_threads(1)
    algorithm = sys.argv[1] if len(sys.argv) > 1 else "dgpo"
    iterations = int(sys.argv[2]) if len(sys.argv) > 2 else 6
    preset, task = load_preset("shapes")
    trainer = build_trainer(preset.run_config(task, algorithm, 0))
    trainer.model.velocity = timed("denoiser forward", trainer.model.velocity)  # type: ignore[method-assign]
    trainer.model.decode = timed("decode", trainer.model.decode)  # type: ignore[method-assign]
    # In the reward's own thread, which has no public name.
    trainer.scorer._score = timed("reward", trainer.scorer._score)  # type: ignore[method-assign]  # noqa: SLF001
    # The graph below the loss is the denoiser's but for a few vectors.
    trainer.accelerator.backward = timed("denoiser backward", trainer.accelerator.backward)
    total = 0.0
    for index, record in enumerate(trainer.iterations()):
        if index == 0:
            spent.clear()  # the first iteration warms caches up
            continue
        total += record["seconds"]
        if index == iterations:
            break
    spent["overhead"] = total - sum(spent.values())
    print(f"{algorithm}: {total / iterations:.2f} s per iteration")
    for part, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {part:<18} {seconds / iterations:6.3f} s  {seconds / total:5.1%}")


if __name__ == "__main__":
    main()
