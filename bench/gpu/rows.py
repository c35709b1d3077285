"""What is measured of a card, the most valuable first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dgpo_plugin.common.errors import UserError, did_you_mean

Kind = Literal[
    "card",
    "iteration",
    "rates",
    "profile",
    "numerics",
    "attention",
    "layouts",
    "adapter",
    "shard",
    "resumed",
    "ranks",
    "load",
    "comparison",
]


DGPO = {"name": "dgpo"}
GRPO = {"name": "flow-grpo", "noise_level": 0.7, "clip": 1e-4, "kl_weight": 0.04, "guidance": 4.5}


@dataclass(frozen=True)
class Row:
    """One measurement, in a process of its own.

    Attributes:
        name: ``model/what``, or one word.
        kind: which function measures it.
        about: what it is, for people.
        model: its name in :mod:`dgpo_bench.gpu.published`; empty for none.
        settings: changes to the run's configuration, by dotted name.
        options: what the measuring function alone reads.
        algorithm: the run's, its name and what is not as published.
        minutes: how long it may take before it is ended.
    """

    name: str
    kind: Kind
    about: str
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    minutes: float = 2.0
    algorithm: Mapping[str, Any] = field(default_factory=lambda: DGPO)


FAST = {"name": "flow-grpo-fast", "noise_level": 0.8, "clip": 1e-5, "kl_weight": 0, "guidance": 1, "keep_graphs": True}
KEEPING = {"training.gradient_checkpointing": True}
SAVING = {"model.offload": True, "training.gradient_checkpointing": True, "training.micro_batch_size": 4}
LARGE = {
    "training.gradient_checkpointing": True,
    "training.micro_batch_size": 4,
    "training.group_size": 8,
    "algorithm.rollout_guidance": 1,
}
SIZES = [1, 2, 4, 8, 12, 16, 24]

ROWS = (
    Row("card", "card", "matrix products and a copy", minutes=1),
    Row("layouts/one", "layouts", "attention's gradients made contiguous", options={"even": True}, minutes=1),
    Row("layouts/two", "layouts", "the same in FLUX.1's two layouts", options={"even": False}, minutes=1),
    Row("sd35/dgpo", "iteration", "DGPO, a group of 24, 512 pixels", "sd35"),
    Row("sd35/rates", "rates", "the denoiser by micro-batch", "sd35", options={"sizes": SIZES}),
    Row("sd35/profile", "profile", "its kernels' time by kind", "sd35"),
    Row("sd35/plain-norms", "rates", "with diffusers' RMSNorm", "sd35", options={"sizes": [8], "plain_norms": True}),
    Row("sd35/compile", "rates", "with model.compile", "sd35", {"model.compile": True}, {"sizes": [8]}, 3),
    Row("sd35/flow-grpo", "iteration", "Flow-GRPO, the same group", "sd35", algorithm=GRPO),
    Row("sd35/keep-graphs", "iteration", "Flow-GRPO-Fast, keep_graphs, checkpointing", "sd35", KEEPING, algorithm=FAST),
    Row("sd35/12-gib", "iteration", "DGPO, offload, checkpointing, micro-batch 4", "sd35", SAVING, {"aim": 12}),
    Row("sd35/profile-compile", "profile", "kernels with model.compile", "sd35", {"model.compile": True}, minutes=3),
    Row("sd35/dgpo-compile", "iteration", "DGPO with model.compile", "sd35", {"model.compile": True}, minutes=3),
    Row("sd35/numerics", "numerics", "bf16 against fp32", "sd35"),
    Row("sd35/attention", "attention", "attention back ends", "sd35"),
    Row(
        "sd35/int8",
        "adapter",
        "torchao-int8, an adapter on it",
        "sd35",
        {"model.quantization": "torchao-int8"},
        {"sizes": [8]},
    ),
    Row(
        "sd35/nf4",
        "adapter",
        "nf4, an adapter on it",
        "sd35",
        {"model.quantization": "bitsandbytes-nf4"},
        {"sizes": [8]},
    ),
    Row("sd35/shard", "shard", "FSDP2, a mesh of one process", "sd35"),
    Row("resumed", "resumed", "a run of the embedded world, whole and stopped in the middle"),
    Row("ranks", "ranks", "two NCCL processes on one card", minutes=1),
    Row("flux1/dgpo", "iteration", "DGPO without guidance, a group of 8, 512 pixels", "flux1", LARGE),
    Row("sdxl/dgpo", "iteration", "DGPO, 1024 pixels", "sdxl", {"training.micro_batch_size": 4}),
    Row("sd35/fp16", "iteration", "fp16 and its scaler", "sd35", {"model.precision": "fp16"}),
    Row(
        "sd35/checkpointing",
        "rates",
        "gradient checkpointing",
        "sd35",
        {"training.gradient_checkpointing": True},
        {"sizes": [8, 24]},
    ),
    Row("z-image/dgpo", "iteration", "DGPO without guidance, a group of 8, 512 pixels", "z-image", LARGE),
    Row("sd15/dgpo", "iteration", "DGPO, 512 pixels", "sd15"),
    Row(
        "qwen-image/dgpo",
        "iteration",
        "DGPO without guidance, a group of 8, 512 pixels",
        "qwen-image",
        LARGE,
        minutes=3,
    ),
    Row("sd35/load", "load", "from a folder on disk", "sd35", minutes=3),
    Row("comparison", "comparison", "the embedded comparison", options={"seeds": 8}, minutes=10),
)


def choose_rows(only: str | None) -> list[Row]:
    """The rows that ``--only`` names: whole names, or models; all of them for None.

    Raises:
        UserError: a name that is neither.
    """
    if only is None:
        return list(ROWS)
    wanted = [name.strip() for name in only.split(",")]
    known = {row.name: row for row in ROWS}
    for name in wanted:
        if name not in known and all(row.model != name for row in ROWS):
            raise UserError(f"--only {name}: no such row or model{did_you_mean(name, list(known))}; {', '.join(known)}")
    return [row for row in ROWS if row.name in wanted or row.model in wanted]
