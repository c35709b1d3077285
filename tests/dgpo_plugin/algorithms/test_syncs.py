"""The host never waits for the device once a micro-batch: what would make it wait is counted, on the CPU."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_bench.gpu.published import published
from dgpo_bench.gpu.random_model import random_conditioning, random_model
from dgpo_plugin.algorithms import Random
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.build import build_trainer
from tests.dgpo_plugin.algorithm_cases import config_for, make_algorithm, rollout_and_advantages

pytestmark = pytest.mark.fast

WAITING = {
    "aten::_local_scalar_dense",  # item, float, bool
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::is_nonzero",
    "aten::equal",
    "aten::lift_fresh",  # a tensor from Python's numbers, which a device has to be sent
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
"""Wait if a mask is among the indices: how many rows it has must be known."""
READING = {"tolist", "numpy", "cpu"}
"""Methods that on the CPU leave no trace below."""


class Syncs:
    """Counts, in its block, operations for which a host waits on a GPU."""

    def __init__(self) -> None:
        self.seen = collections.Counter[str]()
        self._modes = (_Below(self.seen), _Above(self.seen))

    def __enter__(self) -> Syncs:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*problem)

    @property
    def count(self) -> int:
        return self.seen.total()


class _Below(TorchDispatchMode):
    def __init__(self, seen: collections.Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        masked = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masked:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Above(TorchFunctionMode):
    def __init__(self, seen: collections.Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[[0, 1]],
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_the_count_sees_what_waits(waits: Callable[[torch.Tensor], object]) -> None:
    x, rows = torch.arange(4.0), torch.arange(2)
    with Syncs() as syncs:
        waits(x)
    assert syncs.count > 0
    with Syncs() as syncs:
        x[rows] = x[rows].square() + x[:2]
        _ = x[1:3].mean() + torch.full((), 2.0)
    assert syncs.count == 0


@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ("dgpo", ["algorithm.kl_weight=0.5", "algorithm.clip=0.001", "algorithm.reference_guidance=2"]),
        ("dgpo", ["algorithm.reference=old_policy", "algorithm.kl_weight=0"]),
        ("dgpo", ["algorithm.t_min=0.4", "algorithm.text_dropout=0.5"]),
        ("flow-grpo", []),
        ("flow-grpo", ["algorithm.guidance=2"]),
        ("flow-grpo-fast", []),
        ("flow-grpo-guard", []),
        ("flow-grpo-gardo", []),
        ("flow-dppo", []),
        ("nft", []),
        ("elbo", ["algorithm.ratio_clip=0.1", "algorithm.soft_clip=3", "algorithm.old_weight=0.1"]),
        ("awm", []),
        ("ram", []),
        ("crd", []),
        ("online-dpo", ["algorithm.beta=10"]),
    ],
)
def test_waits_do_not_grow_with_micro_batches(policy: Policy, algorithm: str, extra: list[str]) -> None:
    config = config_for(algorithm, *extra)
    rollout, advantages = rollout_and_advantages(config, policy)
    counts = {}
    for size in (8, 2):
        trained = make_algorithm(config_for(algorithm, *extra, f"training.micro_batch_size={size}"), policy)
        trained.after_step(5)
        with Syncs() as syncs:
            trained.gradient(rollout, advantages, Random(0, 0))
        counts[size] = syncs.count
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize(
    ("algorithm", "extra", "kinds", "images"), [("ram", [], 3, 8), ("online-dpo", ["algorithm.beta=10"], 2, 4)]
)
def test_groups_at_flow_times_of_their_own_go_through_the_denoiser_together(
    policy: Policy, algorithm: str, extra: list[str], kinds: int, images: int
) -> None:
    """One pass of each kind (old, base, differentiated) for each of three times, and not one for each group."""
    config = config_for(algorithm, "algorithm.timesteps=3", *extra)
    rollout, advantages = rollout_and_advantages(config, policy)
    sizes: list[int] = []
    handle = policy.model.denoiser.register_forward_pre_hook(
        lambda _, given, named: sizes.append(len(named["hidden_states"])), with_kwargs=True
    )
    make_algorithm(config, policy).gradient(rollout, advantages, Random(0, 0))
    handle.remove()
    assert sizes == [images] * 3 * kinds


def test_an_optimizer_steps_waits_do_not_grow_with_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for targets in ('["attn.to_q"]', '["attn.to_q","attn.to_k","attn.to_v","attn.to_out.0"]'):
        trainer = build_trainer(config_for("dgpo", f"lora.target_modules={targets}"))
        *most, last = trainer.policy.parameters.values()
        for parameter in most:
            parameter.grad = torch.zeros_like(parameter)
        last.grad = torch.ones_like(last)  # to be found after all others
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # it keeps its counts on the CPU
        with Syncs() as syncs:
            assert trainer.optimizer_step() > 0
        counts[len(trainer.policy.parameters)] = syncs.count
    assert len(counts) == 2
    assert set(counts.values()) == {2}, counts  # is there a gradient, and how long is it


@pytest.mark.parametrize(
    ("name", "most"),
    # One question for how long the texts are, of the two whose denoisers take texts in their own length.
    [("sd35", 0), ("flux1", 0), ("sdxl", 0), ("sd15", 0), ("z-image", 1), ("qwen-image", 1)],
)
def test_no_familys_pass_waits_for_each_image(name: str, most: int) -> None:
    config = ModelConfig(path="", precision="fp32", width=32, height=32, max_sequence_length=16)
    model = random_model(published(name).tiny(), config, torch.device("cpu"), encoders=False)
    waits = []
    for size in (2, 4):
        latents, asked = torch.randn(size, *model.latent_shape), random_conditioning(model, size)
        model.velocity(latents, 0.5, asked)  # fills diffusers' tables
        with Syncs() as syncs:
            model.velocity(latents, 0.5, asked)
        waits.append(syncs.count)
    assert waits == [most, most]
