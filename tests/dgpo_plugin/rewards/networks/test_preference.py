"""HPSv2 and ImageReward on tiny checkpoints of the published formats; tests/parity has the original packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.rewards import REWARDS, load_reward
from dgpo_plugin.rewards.networks.hpsv2 import clean
from dgpo_plugin.rewards.networks.pixels import eight_bit, longest_to, shortest_to
from tests.conftest import needs_bf16
from tests.parity.checkpoints import (
    BlipSize,
    ClipSize,
    bert_tokenizer,
    clip_tokenizer,
    hpsv2_checkpoint,
    imagereward_checkpoint,
)

pytestmark = pytest.mark.fast

NAMES = ["hpsv2", "hpsv2.1", "imagereward"]
PROMPTS = [Prompt(text) for text in ("a red circle", "two dogs", "x", "a photo of a house " * 30, "a sign")]
PICTURES = torch.rand(5, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    hpsv2_checkpoint(folder / "hpsv2.pt", ClipSize(side=28, vocabulary=515))
    imagereward_checkpoint(folder / "imagereward.pt", BlipSize(side=32, text_width=128))
    clip_tokenizer(folder / "clip", [("r", "e")])
    bert_tokenizer(folder / "bert")
    return folder


def options(folder: Path, name: str) -> dict[str, Any]:
    kind, tokenizer = ("imagereward", "bert") if name == "imagereward" else ("hpsv2", "clip")
    return {"weights": str(folder / f"{kind}.pt"), "tokenizer": str(folder / tokenizer)}


def loaded(folder: Path, name: str, *, changed: dict[str, Any] | None = None, **settings: Any) -> Any:
    return load_reward(name, RewardTerm(options=options(folder, name) | (changed or {}), **settings))


@pytest.mark.parametrize("name", NAMES)
def test_values_depend_on_picture_and_prompt_and_not_on_the_batch(folder: Path, name: str) -> None:
    together = loaded(folder, name, batch_size=16)(PICTURES, PROMPTS)
    assert together.shape == (5,)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    for size in (1, 2):
        assert torch.allclose(loaded(folder, name, batch_size=size)(PICTURES, PROMPTS), together, atol=1e-6)
    others = loaded(folder, name)(PICTURES.flip(0), PROMPTS)
    again = loaded(folder, name)(PICTURES, PROMPTS[::-1])
    assert (together - others).abs().max() > 1e-3
    assert (together - again).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_pictures(folder: Path, name: str) -> None:
    """And points uphill: a small step along it raises the score, in 8 bits too."""
    reward = loaded(folder, name)
    pictures = PICTURES.clone().requires_grad_()
    before = reward.score(pictures, PROMPTS)
    before.sum().backward()
    assert pictures.grad is not None
    assert (pictures.grad.abs().amax((1, 2, 3)) > 0).all()
    after = reward((PICTURES + 0.02 * pictures.grad.sign()).clamp(0, 1), PROMPTS)
    assert (after > before.detach()).all()
    assert torch.allclose(before.detach(), reward(PICTURES, PROMPTS), atol=1e-5)  # the same values with a gradient
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())


@needs_bf16
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near(folder: Path, name: str) -> None:
    exact = loaded(folder, name)(PICTURES, PROMPTS)
    half = loaded(folder, name, precision="bf16")(PICTURES, PROMPTS)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05


def test_the_limit_of_tokens_cuts_a_prompts_end(folder: Path) -> None:
    """75 words and the two marks, in HPSv2; 33, in ImageReward."""
    for name, limit in (("hpsv2", 75), ("imagereward", 33)):
        reward = loaded(folder, name)
        picture = PICTURES[:1]

        def value(text: str, reward: Any = reward, picture: Tensor = picture) -> float:
            return float(reward(picture, [Prompt(text)]))

        full = "a " * limit
        assert value(full + "x") == value(full + "y z")
        assert value("a " * (limit - 1) + "x") != value("a " * (limit - 1) + "y")


def test_prompts_are_cleaned_as_open_clip_does() -> None:
    assert clean("  The\n “CAT’s”\u00a0&amp;amp; dog \x1b[31m") == 'the "cat\'s" & dog'
    assert clean("caf\u00c3\u00a9") == "café"  # UTF-8 that was read as Latin-1


# ---- preprocessing, against the definitions


def test_hpsv2_pads_and_never_crops() -> None:
    """The longer side to 28 by the antialiased filter in floats, black above and below."""
    picture = PICTURES[:1]
    found = longest_to(picture, 28)
    wanted = interpolate((picture * 255).round() / 255, (20, 28), mode="bicubic", antialias=True)
    assert torch.equal(found[:, :, 4:24], wanted)
    assert (found[:, :, :4] == 0).all()
    assert (found[:, :, 24:] == 0).all()
    odd = longest_to(torch.ones(1, 3, 28, 15), 28)[0, 0, 0]
    assert odd.tolist() == [0] * 6 + [1] * 15 + [0] * 7  # the odd column right


def test_imagereward_crops_the_middle_and_never_pads() -> None:
    picture = PICTURES[:1]
    pixels = Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy())
    whole = np.asarray(pixels.resize((44, 32), Image.Resampling.BICUBIC))  # 32 · 56 / 40 = 44.8, cut off
    wanted = torch.from_numpy(whole[:, 6:38].copy()).permute(2, 0, 1) / 255
    assert torch.equal(shortest_to(picture, 32)[0], wanted)


def test_eight_bit_rounds_values_and_not_the_gradient() -> None:
    picture = PICTURES.clone().requires_grad_()
    rounded = eight_bit(picture)
    assert torch.allclose(rounded * 255, (PICTURES * 255).round(), atol=1e-4)
    rounded.sum().backward()
    assert picture.grad is not None
    assert torch.equal(picture.grad, torch.ones_like(picture))


# ---- what cannot be loaded


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def altered(folder: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    saved = torch.load(options(folder, name)["weights"], weights_only=True)
    path = tmp_path / "altered.pt"
    torch.save({"state_dict": change(saved.get("state_dict", saved))}, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("hpsv2.1", "visual.transformer.resblocks.1.attn.in_proj_bias"),
        ("hpsv2.1", "ln_final.weight"),
        ("imagereward", "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"),
        ("imagereward", "blip.visual_encoder.norm.bias"),
    ],
)
def test_every_tensor_is_accounted_for(folder: Path, tmp_path: Path, name: str, tensor: str) -> None:
    one_less = altered(folder, tmp_path, name, lambda saved: without(saved, tensor))
    with pytest.raises(UserError, match=rf"reward {name}: the checkpoint lacks [13] of \d+ tensors \(first: "):
        loaded(folder, name, changed={"weights": one_less})
    one_more = altered(folder, tmp_path, name, lambda saved: {**saved, "mlp.more.weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"has no place for 1 of \d+ tensors \(first: mlp.more.weight\)"):
        loaded(folder, name, changed={"weights": one_more})
    misshapen = altered(folder, tmp_path, name, lambda saved: {**saved, tensor: torch.ones(3)})
    with pytest.raises(UserError, match=r"has another shape for [13] of \d+ tensors"):
        loaded(folder, name, changed={"weights": misshapen})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("hpsv2", "visual.conv1.weight"), ("imagereward", "blip.visual_encoder.patch_embed.proj.weight")],
)
def test_a_checkpoint_of_something_else_is_told(folder: Path, tmp_path: Path, name: str, tensor: str) -> None:
    for change in (lambda saved: without(saved, tensor), lambda saved: {**saved, tensor: torch.ones(3)}):
        with pytest.raises(UserError, match=f"reward {name}: not a checkpoint of .*; give the published one"):
            loaded(folder, name, changed={"weights": altered(folder, tmp_path, name, change)})


def test_a_file_that_is_broken_or_absent_or_would_run_code(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "broken.pt").write_bytes(Path(options(folder, "hpsv2")["weights"]).read_bytes()[:5000])
    for name in NAMES:
        for weights, message in (
            ("evil.pt", "evil.pt cannot be read"),
            ("broken.pt", "broken.pt cannot be read"),
            ("absent.pt", "no file .*absent.pt; check the path"),
        ):
            with pytest.raises(UserError, match=f"reward {name}: .*{message}") as error:
                loaded(folder, name, changed={"weights": str(tmp_path / weights)})
            assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", NAMES)
def test_without_the_hub_one_line_says_what_to_fetch(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    published = {
        "hpsv2": ("xswu/HPSv2/HPS_v2_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        "hpsv2.1": ("xswu/HPSv2/HPS_v2.1_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        "imagereward": ("THUDM/ImageReward/ImageReward.pt", "google-bert/bert-base-uncased"),
    }
    for missing, place in zip(("weights", "tokenizer"), published[name], strict=True):
        given = {key: value for key, value in options(folder, name).items() if key != missing}
        message = f"{place}.*cannot be loaded .*; fetch it first and give its place in that option"
        with pytest.raises(UserError, match=message) as error:
            load_reward(name, RewardTerm(options=given))
        assert "\n" not in str(error.value)


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends texts with token 513, the checkpoint with 514; give CLIP's"):
        loaded(folder, "hpsv2", changed={"tokenizer": str(clip_tokenizer(tmp_path / "other", []))})
    larger = altered(folder, tmp_path, "imagereward", fewer_words)
    with pytest.raises(UserError, match=r"has \d+ words, the checkpoint 90"):
        loaded(folder, "imagereward", changed={"weights": larger})


def fewer_words(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "blip.text_encoder.embeddings.word_embeddings.weight"
    return {**tensors, name: tensors[name][:90]}


@pytest.mark.parametrize(("name", "package"), [("hpsv2.1", "hpsv2"), ("imagereward", "image-reward")])
def test_the_package_as_a_backend_must_be_there(folder: Path, name: str, package: str) -> None:
    with pytest.raises(UserError, match=f"reward {name}: backend package needs {package} .*backend: native"):
        load_reward(name, RewardTerm(options={"backend": "package"}))
    with pytest.raises(UserError, match="backend 'fast' is neither native nor package"):
        loaded(folder, name, changed={"backend": "fast"})


def test_hpsv2s_package_is_called_once_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads its weights anew in each call; the answers stay in the pictures' order."""
    calls = []

    def score(images: list[Image.Image], prompt: str, cp: str | None, hps_version: str) -> list[np.float32]:
        calls.append((prompt, len(images), cp, hps_version))
        return [np.float32(np.asarray(image).mean() / 255 + len(prompt)) for image in images]

    fake = ModuleType("hpsv2.img_score")
    fake.score = score  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hpsv2", ModuleType("hpsv2"))
    monkeypatch.setitem(sys.modules, "hpsv2.img_score", fake)
    reward = load_reward("hpsv2", RewardTerm(options={"backend": "package", "weights": "w.pt"}))
    pictures = torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None, None].expand(4, 3, 8, 8)
    values = reward(pictures, [Prompt("a"), Prompt("bcd"), Prompt("a"), Prompt("bcd")])
    assert torch.allclose(values, torch.tensor([1.2, 3.4, 1.6, 3.8]), atol=1e-6)
    assert calls == [("a", 2, "w.pt", "v2.0"), ("bcd", 2, "w.pt", "v2.0")]


def test_imagerewards_package_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    class Model:
        def score(self, prompt: str, image: Image.Image) -> float:
            return len(prompt) + np.asarray(image).mean() / 255

    def load(**options: str) -> Model:
        loads.append(options)
        return Model()

    fake = ModuleType("ImageReward")
    fake.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", fake)
    chosen = {"backend": "package", "weights": "models/i.pt"}
    reward = load_reward("imagereward", RewardTerm(options=chosen, batch_size=1))
    values = reward(torch.full((2, 3, 8, 8), 0.6), [Prompt("a"), Prompt("bc")])
    assert torch.allclose(values, torch.tensor([1.6, 2.6]), atol=1e-6)
    assert loads == [{"name": "models/i.pt", "med_config": "models/med_config.json"}]


def test_the_version_belongs_to_the_name() -> None:
    assert {name: dict(REWARDS.get(name).fixed) for name in NAMES[:2]} == {
        "hpsv2": {"version": "v2.0"},
        "hpsv2.1": {"version": "v2.1"},
    }
    with pytest.raises(UserError, match="hpsv2: has no option 'version'"):
        load_reward("hpsv2", RewardTerm(options={"version": "v2.1"}))
