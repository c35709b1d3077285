"""A base that wears an adapter: what is trained comes on top, says so, and is used with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline
from rich.console import Console
from torch import Tensor

from dgpo_plugin.adapters import AdapterCard, TrainingFacts, export_adapter, read_adapter
from dgpo_plugin.adapters.load import apply_adapter, base_notes, load_base
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.generate import fixed_noise
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.training.plan import make_plan
from dgpo_plugin.training.run import resume, train
from tests.conftest import SMALL, shapes_run, spread

pytestmark = pytest.mark.fast

PLAIN: dict[str, Any] = {"path": "shapes", "max_sequence_length": 1}
QUIET = Console(quiet=True)
LORA = LoraConfig(rank=4, alpha=4)


def exported(path: Path, std: float, **model: Any) -> Policy:
    """A policy over a base, and its adapter's file."""
    config = shapes_run(model={**PLAIN, **model})
    policy = spread(Policy(load_base(config.model), LORA, seed=0), std)
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(config, 1))
    return policy


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and one that was trained on top of it."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    exported(first, 0.1)
    exported(second, 0.2, adapter=str(first))
    return first, second


def velocities(thing: Policy | Model) -> Tensor:
    model = thing.model if isinstance(thing, Policy) else thing
    conditioning = model.encode(["a red circle", "two blue squares"])
    with torch.no_grad():
        return thing.velocity(fixed_noise(model, range(2), 0), 0.7, conditioning)


def wearing(*paths: Path, strength: float | None = None) -> Model:
    model = load_base(ModelConfig(**PLAIN))
    for path in paths:
        apply_adapter(model, path, strength=strength)
    return model


def test_the_frozen_base_is_the_model_with_the_adapter(files: tuple[Path, Path]) -> None:
    first, second = files
    policy = spread(Policy(load_base(ModelConfig(**PLAIN, adapter=str(first))), LORA, seed=0), 0.2)
    with policy.as_reference():
        assert torch.equal(velocities(policy), velocities(wearing(first)))
    assert torch.equal(velocities(policy), velocities(wearing(first, second)))
    distances = [float((velocities(policy) - velocities(other)).abs().max()) for other in (wearing(first), wearing())]
    assert min(distances) > 0.01


def test_at_a_strength(files: tuple[Path, Path]) -> None:
    first, _ = files
    half = load_base(ModelConfig(**PLAIN, adapter=str(first), adapter_strength=0.5))
    assert torch.equal(velocities(half), velocities(wearing(first, strength=0.5)))
    assert not torch.equal(velocities(half), velocities(wearing(first)))


def test_only_the_new_adapter_is_exported_and_says_what_it_is_for(files: tuple[Path, Path]) -> None:
    first, second = map(read_adapter, files)
    assert second.tensors.keys() == first.tensors.keys()
    assert dict(AdapterCard.of(second).rows())["on top of"] == "first.safetensors"
    assert dict(AdapterCard.of(first).rows())["on top of"] == "-"
    assert second.header["dgpo.on_top_of_sha256"] == first.content_hash


def test_one_that_is_called_like_any_other_is_named_by_its_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "distilled" / "adapter.safetensors", tmp_path / "second.safetensors"
    exported(first, 0.1)
    exported(second, 0.2, adapter=str(first), adapter_strength=0.8)
    assert read_adapter(second).header["dgpo.on_top_of"] == "distilled at strength 0.8"


def test_it_is_refused_without_the_one_that_it_is_for(files: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = files
    message = "was trained on top of first.safetensors, which the model does not wear; name that as model.adapter"
    with pytest.raises(UserError, match=message):
        apply_adapter(wearing(), second)
    exported(tmp_path / "another" / "first.safetensors", 0.3)  # of the same name, and with other numbers
    with pytest.raises(UserError, match=message):
        apply_adapter(wearing(tmp_path / "another" / "first.safetensors"), second)
    apply_adapter(wearing(), second, any_base=True)
    model = wearing(first)
    assert base_notes(apply_adapter(model, second), model) == []


def test_dgpo_sample_takes_both(files: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(str, files)

    def draw(name: str, *adapters: str) -> tuple[int, str, bytes]:
        path = tmp_path / f"{name}.png"
        given = [word for adapter in adapters for word in ("--adapter", adapter)]
        options = ["--prompt", "a red circle", "--count", "1", "--steps", "2", "--output", str(path)]
        done = CliRunner().invoke(main, ["sample", "shapes", *options, *given])
        return done.exit_code, done.output, path.read_bytes() if path.exists() else b""

    pictures = [draw("none"), draw("first", first), draw("both", first, second)]
    assert [code for code, _, _ in pictures] == [0, 0, 0], pictures
    assert len({picture for _, _, picture in pictures}) == 3
    code, said, picture = draw("second", second)
    assert (code, picture) == (2, b"")
    assert "error: adapter " in said
    assert "on top of first.safetensors" in said


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"adapter": "no.safetensors"}, r"^model: adapter no.safetensors: .*check the path$"),
        ({"adapter_strength": 0.5}, r"adapter_strength is given without adapter"),
        ({"adapter_strength": float("nan"), "adapter": "a"}, "adapter_strength"),
    ],
)
def test_mistakes_are_told_in_a_line(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as told:
        train(shapes_run_of(model), tmp_path / "run", QUIET)
    assert len(str(told.value).splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def shapes_run_of(model: dict[str, Any]) -> Any:
    return load_config("shapes", [*SMALL, *[f"model.{name}={value}" for name, value in model.items()]])


def test_a_run_goes_on_with_the_same_adapter_alone(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content counts, and the place does not."""
    first, another = files[0], tmp_path / "another.safetensors"
    exported(another, 0.3)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    config = shapes_run_of({"adapter": "first.safetensors"})  # relative to where it was started
    train(config.model_copy(update={"training": config.training.model_copy(update={"iterations": 1})}), run, QUIET)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    resume(run, QUIET, iterations=2)
    first.rename(elsewhere / "moved.safetensors")
    with pytest.raises(UserError, match=re.escape(f"model.adapter: nothing is at {first} any more")):
        resume(run, QUIET, iterations=3)
    resume(run, QUIET, overrides=[f"model.adapter={elsewhere / 'moved.safetensors'}"], iterations=3)
    with pytest.raises(UserError, match=r"model.adapter does not lead to the content that .* was trained with"):
        resume(run, QUIET, overrides=[f"model.adapter={another}"], iterations=4)
    assert read_adapter(run / "adapter.safetensors").header["dgpo.on_top_of"] == "moved.safetensors"


def test_its_memory_is_planned_for(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain, worn = (make_plan(shapes_run(model={**PLAIN, **more})) for more in ({}, {"adapter": str(files[0])}))
    size = sum(tensor.numel() * tensor.element_size() for tensor in read_adapter(files[0]).tensors.values())
    assert sum(worn.weights.values()) - sum(plain.weights.values()) == size > 0
    with pytest.raises(UserError, match="model: adapter .*gone: .*check the path"):
        make_plan(shapes_run(model={**PLAIN, "adapter": str(tmp_path / "gone")}))


def test_diffusers_takes_both(files: tuple[Path, Path]) -> None:
    """As its own users load two: each by a name, and then both set."""
    model = load_base(ModelConfig(**PLAIN))
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        world_pipeline("shapes"), text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    for name, file in zip(("first", "second"), files, strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["first", "second"])
    conditioning, noise = model.encode(["a red circle"]), fixed_noise(model, range(1), 0)
    with torch.no_grad():
        theirs = pipeline.transformer(
            hidden_states=noise,
            encoder_hidden_states=conditioning.tensors["context"],
            pooled_projections=conditioning.tensors["pooled"],
            timestep=torch.tensor([700.0]),
            return_dict=False,
        )[0]
        ours = wearing(*files).velocity(noise, 0.7, conditioning)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
