"""What training Stable Diffusion 3.5 Medium at 512 pixels takes, on which GPU: `python tools/plan_sd35_medium.py`.

From the published shapes of its parts, without the (gated) weights. With access to the model the same numbers come
from `dgpo plan my.yaml --memory 16` where my.yaml says `model: {path: stabilityai/stable-diffusion-3.5-medium}`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dgpo_bench.gpu.published import published
from dgpo_plugin.commands.terminal import quieten
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.training.plan import GIB, GRAPHS, make_plan

SIZES = (1, 2, 4, 8, 12, 24)
SAVINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("as it is", {}, {}),
    ("offload", {"offload": True}, {}),
    ("and checkpointing", {"offload": True}, {"gradient_checkpointing": True}),
    ("and nf4", {"offload": True, "quantization": "bitsandbytes-nf4"}, {"gradient_checkpointing": True}),
]


def configuration(
    folder: Path, micro_batch_size: int, model: dict[str, Any], training: dict[str, Any], **sections: Any
) -> RunConfig:
    """The paper's larger geometry: 24 groups of 24, LoRA of rank 64, 512 pixels, bf16."""
    values = {
        "model": {"path": str(folder), "precision": "bf16", "width": 512, "height": 512, **model},
        "lora": {"rank": 64, "alpha": 128},
        "prompts": {"train": "geneval/train"},
        "rewards": "jpeg-size",
        "training": {
            "prompts_per_iteration": 24,
            "group_size": 24,
            "micro_batch_size": micro_batch_size,
            **training,
        },
        **sections,
    }
    return parse_config(values, "example")


def print_kept_graphs(folder: Path) -> None:
    """What ``algorithm.keep_graphs`` takes of each image, where Flow-GRPO-Fast trains 3 steps without guidance."""
    for label, training in (("as it is", {}), ("checkpointing", {"gradient_checkpointing": True})):
        config = configuration(folder, 1, {}, training, algorithm={"name": "flow-grpo-fast", "keep_graphs": True})
        graphs = make_plan(config).weights[GRAPHS] / config.training.images
        print(f"kept graphs of an image's 3 steps, {label}: {graphs / GIB:.2f} GiB")


def main() -> None:
    """Print a row for each way to save memory, and the micro-batch that each GPU has room for."""
    quieten()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        published("sd35").write_configurations(folder)
        print(
            f"{'':<18} {'micro-batch 1':>14} {'micro-batch 8':>14}   largest of 1, 2, 4, 8, 12, 24 in 12 / 16 / 24 GiB"
        )
        for label, model, training in SAVINGS:
            plans = {size: make_plan(configuration(folder, size, model, training)) for size in SIZES}
            fits = []
            for gib in (12, 16, 24):
                room = [size for size, plan in plans.items() if plan.fits(int(gib * GIB))]
                fits.append(str(max(room)) if room else "-")
            one, eight = plans[1].peak / GIB, plans[8].peak / GIB
            print(f"{label:<18} {one:>10.1f} GiB {eight:>10.1f} GiB   {' / '.join(fits)}")
        print_kept_graphs(folder)


if __name__ == "__main__":
    main()
