"""What a run will take, from the model's configuration files alone: ``dgpo plan``.

The denoiser, the VAE and the policy are built with their real code on the meta device, where tensors have shapes and
no memory, and are run once; what they would have had in memory at their worst moment is counted.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgpo_plugin.adapters.load import AdapterFile
from dgpo_plugin.algorithms import algorithm_of
from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.names import FAMILIES
from dgpo_plugin.config.fields import ModelConfig, RunConfig
from dgpo_plugin.models.attention import checkpoint_blocks
from dgpo_plugin.models.base import DTYPES, Model, refuse_seams
from dgpo_plugin.models.load import model_skeleton
from dgpo_plugin.models.memory import can_offload_denoiser
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.rewards import REWARDS

GIB = 2**30
RESERVE = 0.08
"""Share of a device's memory that is never the run's: its context, and what the allocator cannot use."""
FEATURES_PARAMETERS = 303_129_600
"""DINOv3 ViT-L/16's; a smaller one may be named."""
WORN = "adapter that the base wears"
GRAPHS = "the rollout's graphs"
"""The part of a plan's weights that ``algorithm.keep_graphs`` adds."""
BYTES_PER_WEIGHT = {"torchao-int8": 1.0, "bitsandbytes-int8": 1.0, "bitsandbytes-nf4": 0.53}
"""Of a quantized linear layer, its scales included."""


@dataclass(frozen=True)
class Plan:
    """Bytes, counts and images; see :func:`rows`.

    Attributes:
        parameters, trainable: of the denoiser, of the adapter.
        weights: on the device in every phase, by part.
        phases: on the device for the time of a phase, on top of ``weights``.
        encoding: on the device while texts are encoded, if the text encoders are offloaded: the largest, and what
            cannot leave.
        images, denoiser_evaluations: an iteration, over all processes; evaluations with every optional pass, and none
            that is skipped.
        micro_batch: images through the denoiser at once.
    """

    parameters: int
    trainable: int
    weights: dict[str, int]
    phases: dict[str, int]
    images: int
    denoiser_evaluations: int
    micro_batch: int
    encoding: int = 0

    @property
    def peak(self) -> int:
        return max(self.encoding, sum(self.weights.values()) + max(self.phases.values()))

    def fits(self, device_bytes: int) -> bool:
        """Whether a device with so many bytes of memory holds the run."""
        return self.peak <= usable_bytes(device_bytes)


def usable_bytes(device_bytes: int) -> int:
    """What a run may take of a device's memory."""
    return int(device_bytes * (1 - RESERVE))


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of all tensors made in the block that are alive, and their highest sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def leave_out(self, module: nn.Module) -> None:
        """Leave a module's weights out of the count."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._known.add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.alive -= size


class _Attention(torch.autograd.Function):
    """What fused attention leaves in memory: its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, out, out.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_slopes: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention without its matrix of scores, which no kernel in use keeps; the meta device would write it out."""
    functional, name = torch.nn.functional, "scaled_dot_product_attention"
    original = getattr(functional, name)

    def fused(query: Tensor, key: Tensor, value: Tensor, *_rest: Any, **_options: Any) -> Any:
        return _Attention.apply(query, key, value)

    setattr(functional, name, fused)
    try:
        yield
    finally:
        setattr(functional, name, original)


def make_plan(config: RunConfig, processes: int = 1) -> Plan:
    """Build and run the model on the meta device.

    Raises:
        UserError: no such model, or more processes than images.
    """
    images = config.training.images
    if processes > images:
        raise UserError(f"{processes} processes for {images} images an iteration; plan for at most {images}")
    share = -(-images // processes)
    size = min(config.training.micro_batch_size or share, share)
    cost = algorithm_of(config.algorithm).cost(config)
    with torch.device("meta"), _fused_attention():
        model = model_skeleton(config.model)
        refuse_seams(model, config.model)
        parameters = sum(p.numel() for p in model.denoiser.parameters())
        weights = {"denoiser": _denoiser_bytes(model, config) // (processes if config.model.shard else 1)}
        if config.model.adapter is not None:
            weights[WORN] = _worn_bytes(config.model.adapter)
        if not config.model.offload:
            weights["VAE and text encoders"] = sum(map(_bytes, [model.vae, *model.encoders]))
        policy = Policy(model, config.lora, seed=0, unconditional=model.blank_conditioning(1))
        if config.training.gradient_checkpointing:
            checkpoint_blocks(model.denoiser)
        trainable = sum(p.numel() for p in policy.parameters.values())
        # The adapter, its gradient, AdamW's two moments, the average; the algorithm's own copies.
        weights["adapter and optimizer"] = (5 + cost.adapter_copies) * 4 * trainable
        if cost.kept_graphs:
            graph = _graph(policy, size, cost.training_guidance)
            weights[GRAPHS] = -(-share // size) * cost.kept_graphs * graph
        if rewards := _reward_bytes(config):
            weights["rewards"] = rewards
        weights["an iteration's latents"] = _rollout_bytes(config, model, share, cost.latents)
        phases = {"encoding pictures": _encoding_pictures(model, config)} if config.pairs is not None else {}
        phases |= {
            "sampling": _sampling(policy, size, cost.rollout_guidance),
            "decoding": _decoding(model, config, size),
            "training": _training(policy, size, cost.training_guidance),
        }
        encoding = _encoding(config.model, model, weights) if config.model.offload else 0
    return Plan(
        parameters, trainable, weights, phases, images, images * (cost.sampling + cost.training), size, encoding
    )


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _worn_bytes(adapter: str) -> int:
    """An adapter's tensors, which stay as they are stored."""
    with prefixed(f"model: adapter {adapter}"):
        return sum(tensor.nbytes for tensor in AdapterFile.read(Path(adapter)).tensors.values())


def _encoding(config: ModelConfig, model: Model, weights: dict[str, int]) -> int:
    """Encoders come one by one; in the middle of a run, as for large prompt sets, what stays is there too."""
    staying = ["adapter and optimizer", WORN, "rewards", *([] if can_offload_denoiser(config) else ["denoiser"])]
    return max(map(_bytes, model.encoders)) + sum(weights.get(name, 0) for name in staying)


def _denoiser_bytes(model: Model, config: RunConfig) -> int:
    whole = _bytes(model.denoiser)
    if config.model.quantization is None:
        return whole
    linear = [m.weight for m in model.denoiser.modules() if isinstance(m, nn.Linear)]
    small = sum(w.numel() for w in linear) * BYTES_PER_WEIGHT[config.model.quantization]
    return int(whole - sum(w.numel() * w.element_size() for w in linear) + small)


def _reward_bytes(config: RunConfig) -> int:
    """Weights of our rewards' networks, which score beside the sampling; what a user's own takes is not known."""
    size = 0
    guard = config.training.guard
    for label, term in [*config.judged_by.items(), *({} if guard is None else guard.metrics).items()]:
        scoring = term.scoring(config.scoring)
        if scoring.device != "cpu":
            size += REWARDS.get(term.name(label)).parameters * DTYPES[scoring.precision].itemsize
    if config.algorithm.picture_network is not None and config.scoring.device != "cpu":
        size += FEATURES_PARAMETERS * DTYPES[config.scoring.precision].itemsize
    return size


def _rollout_bytes(config: RunConfig, model: Model, share: int, kept: int) -> int:
    """What is kept of an iteration's samples, so many latents each, and the conditioning of its prompts."""
    one = 4 * torch.Size(model.latent_shape).numel()
    conditioning = model.blank_conditioning(config.training.prompts_per_iteration).table
    return share * kept * one + sum(t.numel() * t.element_size() for t in conditioning.values())


@contextlib.contextmanager
def _counting(*modules: nn.Module) -> Iterator[MemoryCount]:
    count = MemoryCount()
    for module in modules:
        count.leave_out(module)
    with count:
        yield count


def _sampling(policy: Policy, size: int, guidance: float) -> int:
    with _counting(policy.model.denoiser) as count, torch.no_grad():
        conditioning = policy.model.blank_conditioning(1)[[0] * size]
        policy.velocity(torch.zeros(size, *policy.model.latent_shape), 0.5, conditioning, guidance)
    return count.peak


def _decoding(model: Model, config: RunConfig, size: int) -> int:
    with _counting(model.vae) as count:
        model.decode(torch.zeros(size, *model.latent_shape))
    return count.peak + (_bytes(model.vae) if config.model.offload else 0)


def _encoding_pictures(model: Model, config: RunConfig) -> int:
    """What preferred pairs' pictures take on their way through the VAE, one after the other."""
    with _counting(model.vae) as count:
        model.encode_images(torch.zeros(1, 3, model.height, model.width))
    return count.peak + (_bytes(model.vae) if config.model.offload else 0)


def _training(policy: Policy, size: int, guidance: float) -> int:
    with _counting(policy.model.denoiser) as count:
        conditioning = policy.model.blank_conditioning(1)[[0] * size]
        policy.velocity(
            torch.zeros(size, *policy.model.latent_shape), 0.5, conditioning, guidance
        ).square().mean().backward()
    # The adapter's gradient is counted with the adapter.
    return count.peak - sum(4 * p.numel() for p in policy.parameters.values())


def _graph(policy: Policy, size: int, guidance: float) -> int:
    """What is kept of a pass of so many images that is differentiated later, its inputs among it."""
    with _counting(policy.model.denoiser) as count:
        conditioning = policy.model.blank_conditioning(1)[[0] * size]
        velocity = policy.velocity(torch.zeros(size, *policy.model.latent_shape), 0.5, conditioning, guidance)
        alive = count.alive
    assert velocity.requires_grad
    return alive


def rows(plan: Plan, device_bytes: int, device: str) -> list[tuple[str, str]]:
    """What ``dgpo plan`` prints: (label, value)."""

    def size(count: int) -> str:
        return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"

    lines = [
        ("denoiser", f"{plan.parameters:,} parameters"),
        ("adapter", f"{plan.trainable:,} trainable parameters"),
        ("an iteration", f"{plan.images} images, {plan.denoiser_evaluations:,} denoiser evaluations"),
        ("micro-batch", f"{plan.micro_batch} images at once"),
        *((name, size(count)) for name, count in plan.weights.items()),
        *((f"{name}, at most", size(count)) for name, count in plan.phases.items()),
        *([("while texts are encoded", size(plan.encoding))] if plan.encoding else []),
        ("peak", size(plan.peak)),
    ]
    usable = usable_bytes(device_bytes)
    verdict = "fits" if plan.fits(device_bytes) else "does not fit"
    lines.append(("verdict", f"{verdict} {device}: {size(plan.peak)} of {size(usable)} usable"))
    if not plan.fits(device_bytes):
        lines.append(("try", _advice(plan)))
    return lines


def _advice(plan: Plan) -> str:
    phase = max(plan.phases, key=lambda name: plan.phases[name])
    if plan.weights.get(GRAPHS, 0) > max(plan.phases.values()):
        return "algorithm.keep_graphs=false (the result stays the same), or training.gradient_checkpointing=true"
    if plan.phases[phase] < sum(plan.weights.values()):
        return "model.precision=bf16, model.offload=true, model.quantization=bitsandbytes-nf4; model.shard on more GPUs"
    if phase == "decoding":
        return "model.sliced_decode=true, model.vae_precision=bf16, or a smaller training.micro_batch_size"
    return "a smaller training.micro_batch_size (the result stays the same), training.gradient_checkpointing=true"


def model_rows() -> list[str]:
    """What ``dgpo list models`` prints: each family, its presets, and the memory that they were planned to take."""
    file = resources.files("dgpo_plugin") / "presets" / "memory.json"
    planned = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"{'pipeline class':<26} {'preset':<22} {'memory':>9}  of"]
    for family in FAMILIES:
        known = {name: row for name, row in planned.items() if row["family"] == family}
        for name, row in known.items():
            size = f"{row['parameters'] / 1e9:.1f} B" if row["parameters"] > 1e8 else f"{row['parameters'] / 1e6:.1f} M"
            lines.append(f"{family:<26} {name:<22} {row['gib']:>5.1f} GiB  {row['model']}, {size}")
    lines.append("Any folder or hub id of these classes works; `dgpo plan` says what your settings take.")
    return lines
