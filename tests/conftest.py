"""Shared by all tests: one thread (equal bits, no contention), quiet libraries, the shipped pipeline loaded once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported, for the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from dgpo_plugin.commands.terminal import quieten
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig, RunConfig, ScoringConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed.processor import settled
from dgpo_plugin.models import load_model
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.rewards import RewardSet, WeightedReward, as_reward

quieten()
torch.set_num_threads(1)
ONE_WORKER = ("comfy_nodes", "parity")
"""Folders of tests that share what there is one of: a server, an environment that was loaded."""


def pytest_configure(config: pytest.Config) -> None:
    """Drop what libraries said while they were imported above.

    With several workers nothing reads it before the end, where it would come after pytest's closing line.
    """
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.read_global_capture()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (``make test``): a file's tests stay on one, and so do those of such a folder.

    What a module's fixtures made is then made once. Groups that take minutes come first, so that no worker is left with
    one at the end.
    """
    slowest: dict[str, int] = {}
    for item in items:
        group = group_of(item)
        item.add_marker(pytest.mark.xdist_group(group))
        rank = 0 if group in ONE_WORKER else 1 if item.get_closest_marker("slow") else 2
        slowest[group] = min(rank, slowest.get(group, 2))
    items.sort(key=lambda item: slowest[group_of(item)])


def group_of(item: pytest.Item) -> str:
    """The tests that stay together with this one: those of its file, or of its folder."""
    path = item.path.relative_to(Path(__file__).parent)
    return path.parts[0] if path.parts[0] in ONE_WORKER else path.as_posix()


def bf16_problem() -> str:
    """Why nothing can be computed in bf16 here; empty if it can."""
    try:
        settled("the tests", "bf16", torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


# Before any test computes something: from then on AMX that has to be masked cannot be.
BF16_PROBLEM = bf16_problem()
needs_bf16 = pytest.mark.skipif(bool(BF16_PROBLEM), reason=BF16_PROBLEM)
"""For tests that compute in bf16, which not every processor does."""

SMALL = (
    "model.precision=fp32",
    "training.prompts_per_iteration=2",
    "training.group_size=4",
    "training.iterations=2",
    "training.learning_rate=3.0e-3",
    "evaluation.images=8",
    "evaluation.steps=4",
    "logging.sample_images=4",
    "evaluation.guidance=1",
    "rollout.steps=4",
    "algorithm.sampler=dpm-solver++",
    "algorithm.rollout_guidance=1",
    "algorithm.reference_guidance=2",
    "algorithm.timesteps=2",
    "algorithm.noisiest_steps=3",
)
"""Overrides that make the shapes preset a matter of a second or two."""


BF16 = """
import torch
x = torch.ones(4, 64, 64, dtype=torch.bfloat16)
torch.nn.functional.linear(x, x[0]), x @ x, torch.nn.functional.conv2d(x[None], x[:, :4, :3, None].expand(4, 4, 3, 3))
"""


@pytest.fixture(scope="session")
def bf16() -> None:
    """Skips where the processor kills a program that computes in bf16; tried once, in a process that may die."""
    tried = subprocess.run([sys.executable, "-c", BF16], capture_output=True, text=True)
    if tried.returncode < 0:
        pytest.skip(f"bf16 does not run on this processor (signal {-tried.returncode})")
    assert tried.returncode == 0, tried.stderr


REQUIRED: dict[str, Any] = {"model": {"path": "shapes"}, "prompts": {"train": "shapes/train"}, "rewards": "shapes"}
"""What a configuration must say, as a file would."""


def shapes_run(**sections: Any) -> RunConfig:
    """A run in the shapes world, all of whose other settings are the defaults."""
    return RunConfig.model_validate({**REQUIRED, **sections})


def one_reward(reward: Callable[..., Any], label: str = "mine", **scoring: Any) -> RewardSet:
    """A function as all that a run is rewarded by."""
    return RewardSet({label: WeightedReward(as_reward(reward), scoring=ScoringConfig(**scoring))})


@pytest.fixture
def small_config() -> RunConfig:
    return load_config("shapes", SMALL)


def spread(policy: Policy, std: float = 0.05) -> Policy:
    """Give lora_B values, so that the adapter does something: it is zero after peft's start."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.parameters.items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, std, generator=generator)
    return policy


@pytest.fixture
def policy() -> Policy:
    """A fresh policy whose adapter does something."""
    return spread(
        Policy(load_model(ModelConfig(path="shapes", max_sequence_length=1)), LoraConfig(rank=4, alpha=8), seed=0)
    )
