"""What a cell costs while it trains: its denoiser's floating-point operations, its time by part, its memory."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.trainer import Trainer

from .gpu.flops import Flops, written_out_attention

PARTS = ("encoding", "rollout", "decode", "reward_wait", "training")
"""Of an iteration's time, as ``metrics.jsonl`` names them, without ``_seconds``."""


def count_flops(trainer: Trainer) -> Flops | None:
    """The operations of one image's passes through a run's own denoiser and adapter, counted on it once.

    Returns:
        None where the counter would see something else than what runs: a quantized, compiled or sharded denoiser.
    """
    config = trainer.config.model
    if config.quantization is not None or config.compile or config.shard:
        return None
    policy: Policy = trainer.policy
    latents = torch.zeros(1, *policy.model.latent_shape, device=policy.model.device)
    conditioning = trainer.groups.encoded[[""]].on(policy.model.device)
    with written_out_attention():
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            policy.velocity(latents, 0.5, conditioning)
        with FlopCounterMode(display=False) as training:
            loss = policy.velocity(latents, 0.5, conditioning).square().mean()
            torch.autograd.grad(loss, list(policy.parameters.values()), allow_unused=True)
    return Flops(forward.get_total_flops(), training.get_total_flops())


def iteration_flops(flops: Flops, record: dict[str, float]) -> float:
    """The operations of an iteration, from its line of ``metrics.jsonl``, where a pass with a backward counts three."""
    differentiated = record["differentiated_evaluations"]
    plain = record["denoiser_evaluations"] - differentiated
    return plain * flops.forward + differentiated / 3 * flops.training


def parts_of(record: dict[str, float]) -> dict[str, float]:
    """Seconds of an iteration by part."""
    return {part: record[f"{part}_seconds"] for part in PARTS if f"{part}_seconds" in record}
