"""Pictures that are none are noticed where they leave the VAE, and put down to whoever made them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from comfy_nodes.decoded import BLAME, decode, refuse_broken
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.decoded import PictureCheck, blame
from dgpo_plugin.models.generate import fixed_noise, generate
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.plan import make_plan
from tests.conftest import REQUIRED
from tests.dgpo_plugin.broken_bases import Bases, changed
from tests.dgpo_plugin.families import FAMILIES

pytestmark = pytest.mark.fast
NAN, INFINITE = float("nan"), float("inf")
SOUND = {"fp32": "its weights are damaged", "bf16": "this VAE overflows", "fp16": "this VAE overflows"}


def noise(count: int = 3) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def sound(latents: Tensor) -> Tensor:
    return latents[:, :3] / 4 + 0.5


def check(precision: Any = "fp16", **model: Any) -> PictureCheck:
    return PictureCheck(blame(ModelConfig(path="shapes", precision="fp32", vae_precision=precision, **model)))


def with_value(tensor: Tensor, value: float, number: int = 1) -> Tensor:
    changed = tensor.clone()
    changed[number, 0, 2, 1] = value
    return changed


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pictures_that_are_not_finite_are_the_vaes(value: float, precision: str) -> None:
    latents = noise()
    with pytest.raises(UserError) as told:
        check(precision)(with_value(sound(latents), value), latents, sound)
    assert str(told.value).startswith(f"model.vae_precision {precision}: {SOUND[precision]}")
    assert "(1 of 3 pictures are NaN or infinite, the latents are not)" in str(told.value)
    cures = {"fp32": "fetch the folder vae again", "bf16": "set it to fp32", "fp16": "set it to fp32 or bf16"}
    assert cures[precision] in str(told.value)


@pytest.mark.parametrize("value", [NAN, INFINITE])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_latents_that_are_not_finite_are_the_denoisers(value: float, precision: Any) -> None:
    latents = with_value(noise(), value)
    asks = PictureCheck(blame(ModelConfig(path="shapes", precision=precision)))
    with pytest.raises(
        UserError, match=r"^1 of 3 latents are .* it is the denoiser .*; lower training.learning_rate"
    ) as told:
        asks(sound(latents), latents, sound)
    assert ("set model.precision to fp32" in str(told.value)) == (precision != "fp32")
    assert "vae_precision" not in str(told.value)


def test_latents_that_ran_away_are_the_denoisers() -> None:
    """They are finite, and too large for a VAE that decodes others."""

    def overflowing(latents: Tensor) -> Tensor:
        return sound(latents).where(latents[:, :3].abs() < 1e4, INFINITE)

    latents = noise() * 1e6
    with pytest.raises(
        UserError, match=r"of latents up to .*e\+06, while the VAE decodes others; it is the denoiser: lower"
    ):
        check()(overflowing(latents), latents, overflowing)


# ---- one flat color


def flat(color: tuple[float, float, float]) -> Callable[[Tensor], Tensor]:
    def decoder(latents: Tensor) -> Tensor:
        return torch.tensor(color)[None, :, None, None].expand(len(latents), 3, 16, 16)

    return decoder


@pytest.mark.parametrize(
    ("color", "said"),
    [
        ((0.0, 0.0, 0.0), "black"),
        ((-3.0, -0.1, -9.0), "black"),
        ((0.001, 0.001, 0.001), "black"),  # in 8 bits
        ((1.0, 4.0, 1.0), "white"),
        ((0.5, 0.5, 0.5), r"of one flat color, rgb\(128, 128, 128\)"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_vae_that_makes_nothing_else_is_at_fault(color: Any, said: str, count: int) -> None:
    latents = noise(count)
    with pytest.raises(UserError, match=f"^model.vae_precision fp16: this VAE makes {said} pictures of everything"):
        check()(flat(color)(latents), latents, flat(color))


@pytest.mark.parametrize("which", [[0], [1, 2], [0, 1, 2]])
def test_a_prompt_may_ask_for_black(which: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    latents = noise()
    latents[which] = -9.0
    asked = check()
    for _ in range(3):
        asked(sound(latents), latents, sound)
    (line,) = caplog.messages  # once
    assert line.startswith(f"{len(which)} of 3 pictures are black all over; the VAE works, so either the prompt ")


def test_other_pictures_pass_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    latents = noise()
    dark = sound(latents) * 0.1
    almost = flat((0.0, 0.0, 0.0))(latents).clone()
    almost[:, 1, 0, 0] = 0.01
    for pictures in (sound(latents), dark, almost, sound(latents) + 4 * latents[:, :3]):
        check()(pictures, latents, flat((0.0, 0.0, 0.0)))
    assert caplog.messages == []


# ---- where it applies


def damaged(base: Path, folder: Path, value: float, part: str = "vae") -> Path:
    """A base whose VAE's (or other part's) last layers hold one value."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        hit = [key for key in tensors if key.startswith("decoder.") or part != "vae"]
        return tensors | {key: torch.full_like(tensors[key], value) for key in hit}

    return changed(base, folder, part, change)


@pytest.mark.parametrize("name", [*FAMILIES, "shapes"])
def test_every_familys_vae_is_looked_at(name: str, bases: Bases, tmp_path: Path) -> None:
    for value, said in ((NAN, "its weights are damaged"), (0.0, "pictures of everything, even of noise")):
        (tmp_path / str(value)).mkdir()
        folder = damaged(bases(name), tmp_path / str(value), value)
        model = load_model(ModelConfig(path=str(folder), width=32, height=32))
        with pytest.raises(UserError, match=f"^model.vae_precision fp32: .*{said}"):
            model.decode(fixed_noise(model, range(2), 0))


def training(folder: Path, reward: str, prompts: Path, **model: Any) -> Any:
    prompts.write_text('a sign that says "cat"\n')
    values = {
        "model": {"path": str(folder), "width": 32, "height": 32, "precision": "fp32", **model},
        "lora": {"rank": 2},
        "prompts": {"train": str(prompts)},
        "rewards": reward,
        "rollout": {"steps": 2},
        "algorithm": {"name": "dgpo", "timesteps": 1, "noisiest_steps": 1},
        "evaluation": {"images": 2, "steps": 2},
        "training": {"prompts_per_iteration": 1, "group_size": 2},
    }
    return parse_config(values, "test")


@pytest.mark.parametrize("reward", ["ocr", "jpeg-size", "color-entropy", "brightness"])
def test_training_and_evaluation_stop_whatever_the_reward(reward: str, bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    folder = damaged(bases("sd15"), tmp_path / "base", NAN)
    trainer = build_trainer(training(folder, reward, tmp_path / "prompts.txt"))
    for step in (lambda: trainer.iterate(0), trainer.held_out_reward):
        with pytest.raises(UserError, match="^model.vae_precision fp32: its weights are damaged"):
            step()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("unet", "latents are NaN or infinite before the VAE sees them, so it is the denoiser"),
        (
            "text_encoder",
            "model.precision fp32: the text encoders' output is NaN or infinite; their weights are damaged",
        ),
        ("vae", "model.vae_precision fp32: its weights are damaged"),
    ],
)
def test_the_part_at_fault_is_named(part: str, said: str, bases: Bases, tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(damaged(bases("sd15"), tmp_path, NAN, part)), width=32, height=32))
    with pytest.raises(UserError, match=said):
        generate(model, ["a cat", "a dog"], fixed_noise(model, range(2), 0), 2, 2.0)


def test_dgpo_sample_writes_no_such_picture(bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    folder = damaged(bases("sd15"), tmp_path / "base", 0.0)
    asked = ["sample", str(folder), "--prompt", "a cat", "--output", str(tmp_path / "cat.png"), "--steps", "2"]
    told = CliRunner().invoke(main, [*asked, "--count", "1"])
    assert told.exit_code == 2
    assert told.stderr.startswith("error: model.vae_precision fp32: this VAE makes ")
    assert told.stderr.count("\n") == 1
    assert not (tmp_path / "cat.png").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_has_no_numbers_to_look_at(precision: str) -> None:
    plan = make_plan(parse_config(REQUIRED | {"model": {"path": "shapes", "vae_precision": precision}}, "test"))
    assert plan.phases["decoding"] > 0


# ---- in ComfyUI


class FakeVAE:
    """ComfyUI's: latents (N, 4, h, w) to pictures (N, h, w, 3), with frames if it is a video's."""

    def __init__(self, value: float | None, *, video: bool) -> None:
        self.value, self.video = value, video

    def decode(self, latents: Tensor) -> Tensor:
        images = sound(latents).movedim(1, -1).clamp(0, 1)
        images = images if self.value is None else torch.full_like(images, self.value)
        return images[:, None] if self.video else images


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (NAN, "Compare adapter: this VAE overflows .*--fp32-vae"),
        (0.0, "Compare adapter: this VAE makes black pictures of everything.*--fp32-vae"),
    ],
)
def test_the_node_compare_adapter_refuses_them(video: bool, value: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        decode(FakeVAE(value, video=video), noise(), PictureCheck(BLAME))
    assert torch.equal(
        decode(FakeVAE(None, video=video), noise(), PictureCheck(BLAME)), sound(noise()).movedim(1, -1).clamp(0, 1)
    )


def test_the_scoring_nodes_refuse_what_is_not_finite() -> None:
    images = sound(noise()).movedim(1, -1)
    refuse_broken(images, "Score images")
    refuse_broken(torch.zeros(2, 4, 4, 3), "Score images")  # black may be scored
    with pytest.raises(UserError, match="^Score images: 1 of 3 pictures are NaN or infinite, .*--fp32-vae"):
        refuse_broken(with_value(images, NAN), "Score images")
