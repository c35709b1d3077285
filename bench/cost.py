"""What a cell costs while it trains: its denoiser's floating-point operations, its time by part, its memory."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.trainer import Trainer

from .gpu.flops import Flops, skeleton_flops, written_out_attention

PARTS = ("encoding", "rollout", "decode", "features", "reward_wait", "training")
"""Of an iteration's time, as ``metrics.jsonl`` names them, without ``_seconds``."""


_counted: dict[tuple[str, str], Flops] = {}
"""By model and adapter: the cells of one comparison have the same, and a process does several."""


def count_flops(trainer: Trainer) -> Flops:
    """The operations of one image's passes through a run's own denoiser and adapter, counted on it once.

    A quantized, compiled or sharded denoiser runs kernels that the counter does not know; what they compute is counted
    on the model's shapes.
    """
    key = (trainer.config.model.model_dump_json(), trainer.config.lora.model_dump_json())
    if key not in _counted:
        _counted[key] = _count(trainer)
    return _counted[key]


def _count(trainer: Trainer) -> Flops:
    config = trainer.config.model
    if config.quantization is not None or config.compile or config.shard:
        return skeleton_flops(config, trainer.config.lora)
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


def parts_of(record: dict[str, float]) -> dict[str, float]:
    """Seconds of an iteration by part."""
    return {part: record[f"{part}_seconds"] for part in PARTS if f"{part}_seconds" in record}
