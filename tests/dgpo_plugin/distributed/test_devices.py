"""Several GPUs: each process uses its own, in every thread. No GPU is needed: torch's answers are made up."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgpo_plugin.common.names import FAMILIES
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ModelConfig, ScoringConfig
from dgpo_plugin.distributed.device import best_device, numbered
from dgpo_plugin.models.load import load_model
from dgpo_plugin.rewards.networks.base import NeuralReward
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.rewards.served.wire import as_png
from tests.conftest import one_reward
from tests.dgpo_plugin.served_rewards import serving

pytestmark = pytest.mark.fast


class FourGPUs:
    """torch.accelerator on a machine with four; each thread has a current one, at its start the first."""

    def __init__(self) -> None:
        self._chosen = threading.local()

    def is_available(self) -> bool:
        return True

    def current_accelerator(self) -> torch.device:
        return torch.device("cuda")

    def device_count(self) -> int:
        return 4

    def current_device_index(self) -> int:
        return getattr(self._chosen, "index", 0)

    def set_device_index(self, index: int) -> None:
        self._chosen.index = index


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FourGPUs:
    """The third of four processes on this machine."""
    found = FourGPUs()
    monkeypatch.setattr(torch, "accelerator", found)
    monkeypatch.setenv("LOCAL_RANK", "2")
    return found


class Network(nn.Linear):
    """Notes where it is sent, and stays on the CPU."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, target: Any) -> Network:  # type: ignore[override]
        if isinstance(target, torch.device):
            self.sent.append(str(target))
        return self


class Pictures(Tensor):
    """Likewise."""

    def to(self, *target: Any, **options: Any) -> Tensor:
        return self


class Mean(NeuralReward):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.zeros(len(images))


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_rewards_network_goes_to_its_own_processs_gpu(gpus: FourGPUs, asked: str, used: str) -> None:
    """In the scoring thread as in any other, where torch would take ``cuda`` for the first."""
    network = Network()
    scorer = Scorer(one_reward(Mean(network, ScoringConfig(device=asked))))
    pictures = torch.zeros(2, 3, 4, 4).as_subclass(Pictures)
    scorer.submit(pictures, [Prompt("a")] * 2).result()
    assert network.sent == [used]


def test_a_users_own_reward_that_says_cuda_means_its_own_processs_gpu(gpus: FourGPUs) -> None:
    seen = []

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(gpus.current_device_index())
        return torch.zeros(len(images))

    Scorer(one_reward(reward)).submit(torch.zeros(2, 3, 4, 4), [Prompt("a")] * 2).result()
    assert seen == [2]


def test_a_served_reward_means_the_gpu_that_its_file_chose(gpus: FourGPUs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is no one's rank; requests are answered in threads of their own."""
    monkeypatch.delenv("LOCAL_RANK")
    gpus.set_device_index(3)
    seen = []

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(gpus.current_device_index())
        return torch.zeros(len(images))

    body = '{"images": ["' + as_png(torch.zeros(3, 4, 4)) + '"], "prompts": [{"text": "a"}]}'
    with serving(reward) as url:
        urllib.request.urlopen(f"{url}/score", body.encode()).close()
    assert seen == [3]


def test_a_device_has_its_processs_number(gpus: FourGPUs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_device() == torch.device("cuda:2")
    assert numbered(torch.device("cuda:0")) == torch.device("cuda:0")
    assert numbered(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(gpus, "device_count", lambda: 1)  # each process is shown its own alone
    assert best_device() == torch.device("cuda:0")
    monkeypatch.delenv("LOCAL_RANK")
    gpus.set_device_index(1)
    assert best_device() == torch.device("cuda:1")


def test_a_model_is_loaded_on_its_processs_gpu(gpus: FourGPUs, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []

    class Family:
        @staticmethod
        def load(folder: object, config: object, device: torch.device) -> None:
            placed.append(device)

    monkeypatch.setattr(FAMILIES, "load", lambda _name: Family)
    load_model(ModelConfig(path="shapes"), "cuda", place=False)
    assert placed == [torch.device("cuda:2")]
