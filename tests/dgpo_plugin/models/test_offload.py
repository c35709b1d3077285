"""Text encoders that wait in main memory: one on the device at a time, and each over the bus once for a set of texts.

There is no second device here: where modules are is made up, and their moves are counted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from dgpo_plugin.common.names import WORLDS
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import load_model, memory
from dgpo_plugin.models.sequential_offload import one_module_at_a_time
from dgpo_plugin.models.text_cache import EncodedTexts
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.fast

HOME, DEVICE = torch.device("cpu"), torch.device("cpu:0")  # unequal, and tensors can go to both
TEXTS = [f"{number} red circles" for number in range(70)]


class Bus:
    """Modules' made-up places, what crossed in which order, and how many were on the device at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, modules: dict[str, nn.Module], on_device: set[str]) -> None:
        self.places = {name: DEVICE if name in on_device else HOME for name in modules}
        self.crossed: list[tuple[str, torch.device]] = []
        self.most = 0
        names = {module: name for name, module in modules.items()}
        monkeypatch.setattr(memory, "device_of", lambda module: self.places[names[module]])
        for name, module in modules.items():
            monkeypatch.setattr(module, "to", partial(self.move, name))

    def move(self, name: str, target: torch.device) -> None:
        self.places[name] = target
        self.crossed.append((name, target))
        self.most = max(self.most, sum(place == DEVICE for place in self.places.values()))


def configured(name: str, folder: Path, **options: Any) -> ModelConfig:
    if name in WORLDS:
        return ModelConfig(path=name, max_sequence_length=8, **options)
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        FAMILIES[name].build(folder)
    chosen = FAMILIES[name]
    return ModelConfig(
        path=str(folder),
        width=chosen.width,
        height=chosen.height,
        max_sequence_length=chosen.tokens,
        offload=True,
        **options,
    )


@pytest.mark.parametrize("name", ["shapes", *FAMILIES])
def test_encoders_cross_the_bus_once_for_all_texts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(name, tmp_path).model_copy(update={"offload": True})
    plain = EncodedTexts(load_model(config.model_copy(update={"offload": False})), TEXTS)[TEXTS].tensors
    model: Any = load_model(config)
    model.device = DEVICE
    modules = {"denoiser": model.denoiser, **{f"encoder {n}": e for n, e in enumerate(model.encoders)}}
    bus = Bus(monkeypatch, modules, {"denoiser"})
    counted = {name: Mock(wraps=module.forward) for name, module in modules.items()}
    for name, module in modules.items():
        monkeypatch.setattr(module, "forward", counted[name])
    encoded = EncodedTexts(model, TEXTS)[TEXTS].tensors
    assert all(torch.equal(encoded[key], value) for key, value in plain.items())
    encoders = [
        crossing for n in range(len(model.encoders)) for crossing in ((f"encoder {n}", DEVICE), (f"encoder {n}", HOME))
    ]
    assert bus.crossed == [("denoiser", HOME), *encoders, ("denoiser", DEVICE)]
    assert bus.most == 1
    assert all(counted[f"encoder {n}"].call_count == 3 for n in range(len(model.encoders)))  # 70 texts, 32 at once


def test_a_denoiser_that_cannot_leave_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(ModelConfig(path="shapes", max_sequence_length=8))
    model.device = DEVICE
    modules = {"denoiser": model.denoiser, **{f"encoder {n}": e for n, e in enumerate(model.encoders)}}
    bus = Bus(monkeypatch, modules, {"denoiser"})
    for options in ({"quantization": "bitsandbytes-int8"}, {"shard": True}):
        model.config = ModelConfig(path="shapes", max_sequence_length=8, offload=True, **options)
        model.encode(["a red circle"])
    assert {name for name, _ in bus.crossed} == modules.keys() - {"denoiser"}
    assert bus.most == 2


def test_modules_may_be_asked_in_any_order_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second before the first, the first twice; nothing is computed twice, and an error leaves all as it was."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    bus = Bus(monkeypatch, {"first": first, "second": second}, set())
    computed: list[str] = []
    for name, module in {"first": first, "second": second}.items():
        module.register_forward_hook(lambda *_, name=name: computed.append(name))
    inputs = [torch.randn(1, 2) for _ in range(3)]

    def job(x: torch.Tensor) -> torch.Tensor:
        return torch.add(first(second(x)), first(x))

    with torch.no_grad():
        expected = [job(x) for x in inputs]
        got = one_module_at_a_time([partial(job, x) for x in inputs], [first, second], DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [name for name, target in bus.crossed if target == DEVICE] == ["second", "first"]

    def broken() -> None:
        second(inputs[0])
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        one_module_at_a_time([broken], [first, second], DEVICE)
    assert set(bus.places.values()) == {HOME}
    assert "forward" not in vars(first) | vars(second)
