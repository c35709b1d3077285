"""Train an adapter from Python: `python examples/train_in_python.py OUTPUT [section.field=value ...]`.

The same as `dgpo train shapes --output OUTPUT`, with a look at every iteration on the way. The embedded world needs no
GPU and no download; `model.path=...`, a reward and prompts make it any other run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from dgpo_plugin import UserError, load_config
from dgpo_plugin.training import run
from dgpo_plugin.training.trainer import Trainer


def show(trainer: Trainer, record: dict[str, float] | None) -> None:
    """Look at a run as it goes: once when everything is loaded, then after every iteration.

    Args:
        trainer: has the model, the policy and what else there is.
        record: the line of metrics.jsonl; None the first time.
    """
    if record is None:
        parameters = sum(parameter.numel() for parameter in trainer.policy.parameters.values())
        print(f"training {parameters:,} parameters on {len(trainer.groups.prompts)} prompts")
    else:
        print(f"{record['iteration']:.0f}: reward {record['reward']:.3f}, learned from {record['grad_norm']:.4f}")


def main() -> None:
    """Train, and say where the adapter is."""
    output, *changes = sys.argv[1:]
    try:
        adapter = run.train(load_config("shapes", changes), Path(output), Console(quiet=True), watch=show)
    except UserError as error:  # anything that you can mend, in one line
        raise SystemExit(f"error: {error}") from error
    print(f"adapter: {adapter}")


if __name__ == "__main__":
    main()
