"""Train an adapter from Python: `python examples/train_in_python.py OUTPUT [section.field=value ...]`.

The loop in your own hands: look at every iteration, stop when you like, draw pictures, write the adapter. The embedded
world needs no GPU and no download; `model.path=...`, `rewards=...` and `prompts.train=...` make it any other run.
`dgpo_plugin.training.run.train` is this loop with a folder, checkpoints, exact resume and Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dgpo_plugin import UserError, load_config
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.common.pictures import image_grid
from dgpo_plugin.training.build import build_trainer


def train(output: Path, changes: list[str]) -> Path:
    """Train, and give the adapter's path.

    Args:
        changes: to the preset `shapes`, each ``section.field=value``.
    """
    config = load_config("shapes", changes)
    trainer = build_trainer(config)
    before = trainer.held_out_reward()
    print(f"held-out reward of the base: {before}")
    for record in trainer.iterations():
        print(f"{record['iteration']:.0f}: reward {record['reward']:.3f}, gradient {record['grad_norm']:.4f}")
    after = trainer.held_out_reward()
    print(f"held-out reward of the adapter: {after}")

    output.mkdir(parents=True, exist_ok=True)
    weights = trainer.average_now()
    pictures = trainer.held_out.sample(weights, trainer.held_out.first(4), seed=1)
    image_grid(pictures, columns=4).save(output / "pictures.png")
    adapter = output / "adapter.safetensors"
    facts = TrainingFacts(trainer.config, trainer.steps, reward_before=before.value, reward_after=after.value)
    export_adapter(trainer.policy, weights, adapter, facts)
    return adapter


def main() -> None:
    """Train, and say where the adapter is."""
    output, *changes = sys.argv[1:]
    try:
        print(f"adapter: {train(Path(output), changes)}")
    except UserError as error:  # anything that you can mend, in one line
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
