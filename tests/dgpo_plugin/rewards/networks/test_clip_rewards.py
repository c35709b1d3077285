"""CLIP's rewards against transformers' own processor and forward pass, on tiny models in the published file formats."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards import load_reward
from dgpo_plugin.rewards.networks.aesthetic import Aesthetic
from dgpo_plugin.rewards.networks.base import NeuralReward
from dgpo_plugin.rewards.networks.clip import ClipScore, PickScore
from dgpo_plugin.rewards.networks.pixels import longest_to, middle_square, resized, shortest_to
from tests.conftest import needs_bf16
from tests.dgpo_plugin.families import clip_tokenizer

pytestmark = pytest.mark.fast

SIZES = [(64, 64), (50, 80), (81, 47), (224, 224), (32, 32)]
TEXTS = ["a red circle", "two blue squares and a green circle " * 5, ""]
PROMPTS = [Prompt(text) for text in TEXTS]


def pictures(height: int, width: int, count: int = 3) -> Tensor:
    """Smooth ones with noise, 8-bit."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    smooth = interpolate(torch.rand(count, 3, 6, 6, generator=generator), (height, width), mode="bicubic")
    noisy = smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)
    return (noisy.clamp(0, 1) * 255).round() / 255


def pil(images: Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model and its tokenizer, as the hub has them."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 600, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=20
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path, images: Tensor, texts: list[str]) -> Tensor:
    """What transformers says of each picture and its own text."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = clip_tokenizer()(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(pil(images), return_tensors="pt").pixel_values
        return model(**tokens, pixel_values=pixels).logits_per_image.diagonal()


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_is_transformers_logit(tiny: Path, size: tuple[int, int]) -> None:
    images = pictures(*size)
    ours = PickScore(weights=str(tiny), tokenizer=str(tiny))(images, PROMPTS)
    torch.testing.assert_close(ours, logits(tiny, images, TEXTS), rtol=1e-5, atol=1e-5)


def test_clipscore_is_the_cosine_and_the_training_scale_is_a_26th(tiny: Path) -> None:
    images = pictures(50, 80)
    scale = transformers.CLIPModel.from_pretrained(tiny).logit_scale.exp().item()
    whole = logits(tiny, images, TEXTS)
    torch.testing.assert_close(ClipScore(weights=str(tiny))(images, PROMPTS), whole / scale, rtol=1e-5, atol=1e-6)
    term = RewardTerm(options={"weights": str(tiny), "tokenizer": str(tiny), "divisor": 26})
    torch.testing.assert_close(load_reward("pickscore", term)(images, PROMPTS), whole / 26, rtol=1e-5, atol=1e-6)


def test_neither_batch_size_nor_neighbours_change_a_score(tiny: Path) -> None:
    images = pictures(40, 40)
    whole = ClipScore(weights=str(tiny))(images, PROMPTS)
    one = ClipScore(ScoringConfig(batch_size=1, offload=True), weights=str(tiny))(images, PROMPTS)
    torch.testing.assert_close(one, whole, rtol=0, atol=1e-6)


@needs_bf16
def test_bf16_weights_give_nearly_the_same(tiny: Path) -> None:
    images = pictures(40, 40)
    half = ClipScore(ScoringConfig(precision="bf16"), weights=str(tiny))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    values = half(images, PROMPTS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, ClipScore(weights=str(tiny))(images, PROMPTS), rtol=0, atol=0.03)


@pytest.mark.parametrize("reward", ["clipscore", "pickscore", "aesthetic"])
def test_a_gradient_reaches_the_pixels(tiny: Path, published_head: Path, reward: str) -> None:
    made: NeuralReward
    if reward == "aesthetic":
        made = Aesthetic(weights=str(published_head), clip=str(tiny))
    else:
        made = {"clipscore": ClipScore, "pickscore": PickScore}[reward](weights=str(tiny), tokenizer=str(tiny))
    images = pictures(40, 40).requires_grad_()
    before = made.score(images, PROMPTS)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    with torch.no_grad():
        # Over the 8-bit rounding that a smaller step would fall under.
        after = made.score((images + 0.1 * gradient / gradient.abs().max()).clamp(0, 1), PROMPTS)
    assert (after > before).all()


# ---- the aesthetic predictor


@pytest.fixture(scope="module")
def published_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch file in the published format, of the tiny model's width."""
    generator = torch.Generator().manual_seed(1)
    widths = [20, 1024, 128, 64, 16, 1]
    saved = {}
    for place, (before, after) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        saved[f"layers.{place}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        saved[f"layers.{place}.bias"] = torch.randn(after, generator=generator)
    path = tmp_path_factory.mktemp("aesthetic") / "aesthetic-model.pth"
    torch.save(saved, path)
    return path


def test_the_aesthetic_predictor_is_one_affine_map_of_the_direction(tiny: Path, published_head: Path) -> None:
    """In float64, from the published description: five affine layers and nothing between them."""
    images = pictures(50, 80)
    model = transformers.CLIPModel.from_pretrained(tiny).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        embedded = model.get_image_features(processor(pil(images), return_tensors="pt").pixel_values).pooler_output
    values = embedded.double().numpy()
    values /= np.sqrt((values**2).sum(1, keepdims=True))
    saved = torch.load(published_head, weights_only=True)
    for place in (0, 2, 4, 6, 7):
        weight, bias = (saved[f"layers.{place}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        values = values @ weight.T + bias
    ours = Aesthetic(weights=str(published_head), clip=str(tiny))(images, PROMPTS)
    np.testing.assert_allclose(ours.numpy(), values[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("layers.4.bias"), "lacks 1 of 10 tensors (first: layers.4.bias)"),
        (lambda saved: saved.update(more=torch.zeros(1)), "has no place for 1 of 10 tensors (first: more)"),
        (
            lambda saved: saved.update({"layers.7.bias": torch.zeros(3)}),
            "has another shape for 1 of 10 tensors (first: layers.7.bias)",
        ),
        (lambda saved: saved.update(note="text"), "holds no table of tensors"),
    ],
)
def test_another_checkpoint_is_refused(
    tiny: Path, published_head: Path, tmp_path: Path, change: object, message: str
) -> None:
    saved = torch.load(published_head, weights_only=True)
    change(saved)  # type: ignore[operator]
    torch.save(saved, tmp_path / "other.pth")
    with pytest.raises(UserError) as raised:
        Aesthetic(weights=str(tmp_path / "other.pth"), clip=str(tiny))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("saved", "of"),
    [
        ({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, "CLIP ViT-L/14's 768"),
        ({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, "CLIP ViT-B/32 or ViT-B/16's 512"),
        ({"state_dict": {"linear.weight": torch.zeros(1, 768), "linear.bias": torch.zeros(1)}}, "CLIP ViT-L/14's 768"),
        ({"weight": torch.zeros(1, 1024)}, "an embedding's 1024"),
    ],
)
def test_laions_first_predictor_is_named(tmp_path: Path, saved: dict[str, Tensor], of: str) -> None:
    """Before CLIP is loaded, which is not there."""
    path = tmp_path / "sa_0_4_vit_l_14_linear.pth"
    torch.save(saved, path)
    with pytest.raises(UserError) as raised:
        Aesthetic(weights=str(path), clip="nowhere")
    assert str(raised.value) == (
        f"{path} is LAION's first aesthetic predictor, one linear layer on {of} numbers; aesthetic is the "
        "improved one, sac+logos+ava1-l14-linearMSE.pth: give that, or leave weights out"
    )


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (32, 35), (67, 32)])
def test_aesthetic_crops_as_transformers_does_and_not_as_torchvision(
    tiny: Path, published_head: Path, size: tuple[int, int]
) -> None:
    """Half a pixel of offset goes down: ``int(rest / 2.0)``; in torchvision's CenterCrop ``int(round(rest / 2.0))``.

    transformers: ``image_processing_backends.py``, ``TorchvisionBackend.center_crop``; torchvision:
    ``transforms/functional.py``, ``center_crop``. The two differ at all sizes here.
    """
    images, reward = pictures(*size), Aesthetic(weights=str(published_head), clip=str(tiny))
    tall, wide = (32 * side // min(size) for side in size)

    def cropped(offset: Callable[[float], int]) -> Tensor:
        top, left = offset((tall - 32) / 2.0), offset((wide - 32) / 2.0)
        return resized(images, tall, wide)[:, :, top : top + 32, left : left + 32]

    ours = reward(images, PROMPTS)
    torch.testing.assert_close(ours, reward(cropped(int), PROMPTS), rtol=0, atol=1e-6)
    assert (ours - reward(cropped(round), PROMPTS)).abs().max() > 1e-4


def test_a_checkpoint_that_would_run_code_is_refused(tiny: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": Path("x")}, tmp_path / "pickle.pth")
    with pytest.raises(UserError, match="cannot be read"):
        Aesthetic(weights=str(tmp_path / "pickle.pth"), clip=str(tiny))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is no checkpoint: a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "is no checkpoint: a Git LFS pointer"),
        (b'{"error": "Unauthorized"}', "is no checkpoint: JSON, such as a server's error"),
        (b"", "is no checkpoint: empty"),
        (b"PK\x03\x04" + bytes(500), "cannot be read"),
    ],
    ids=range(5),
)
def test_what_was_fetched_instead_of_weights_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(UserError) as raised:
        Aesthetic(weights=str(tmp_path / "head.pth"), clip="nowhere")
    assert told in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^no file nowhere.pth; check the path"):
        Aesthetic(weights="nowhere.pth")
    with pytest.raises(
        UserError, match=r"^openai/.* \(option weights\): cannot be loaded .*give its place in that option"
    ) as raised:
        ClipScore()  # the hub is not reached in tests
    assert "\n" not in str(raised.value)


def test_a_clip_model_that_lacks_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    text = transformers.CLIPTextModel.from_pretrained(tiny)
    text.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks \d+ of its weights"):
        ClipScore(weights=str(tmp_path), tokenizer=str(tiny))


# ---- pixels


@pytest.mark.parametrize("size", [*SIZES, (51, 97)])
def test_the_square_is_cut_where_transformers_cuts_it(size: tuple[int, int]) -> None:
    images = pictures(*size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    )
    theirs = processor(pil(images), return_tensors="pt").pixel_values
    torch.testing.assert_close(shortest_to(images, 32), theirs, rtol=0, atol=1e-6)


def test_every_square_begins_where_torchvision_and_transformers_begin_it() -> None:
    """All sizes to 600 pixels: the published rules, in whole numbers here.

    torchvision (``_compute_resized_output_size``, ``center_crop``) and transformers cut the longer side off to whole
    pixels; half a pixel of offset goes to the even neighbour in torchvision and down in transformers.
    """
    different = 0
    for short in range(1, 601):
        for long in range(short, 601):
            rest = 224 * long // short - 224
            down = rest // 2
            even = down + 1 if rest % 2 and down % 2 else down
            different += even != down
            assert middle_square(short, long, 224, nearest=True) == (224, 224 + rest, 0, even)
            assert middle_square(long, short, 224, nearest=True) == (224 + rest, 224, even, 0)
            assert middle_square(short, long, 224, nearest=False) == (224, 224 + rest, 0, down)
    assert different > 20_000, "a test that tells nothing apart"


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_picture_is_kept_and_the_rest_is_black(size: tuple[int, int]) -> None:
    square = longest_to(torch.ones(1, 3, *size), 32)
    assert square.shape == (1, 3, 32, 32)
    share = min(size) / max(size)
    assert square.mean().item() == pytest.approx(share, abs=1 / 32)
    assert square[0, :, 15:17, 15:17].min().item() == pytest.approx(1)
    assert ((square - square.flip(2)).abs() < 0.1).float().mean() > 0.9  # in the middle, to a pixel


def test_values_are_pillows_and_the_gradient_is_the_filters() -> None:
    images = pictures(50, 80).requires_grad_()
    small = resized(images, 20, 32)
    expected = np.stack([np.asarray(p.resize((32, 20), Image.Resampling.BICUBIC)) for p in pil(images.detach())])
    np.testing.assert_allclose(small.detach().permute(0, 2, 3, 1).numpy() * 255, expected, atol=1e-3)
    upstream = torch.randn_like(small)
    (ours,) = torch.autograd.grad((small * upstream).sum(), images)
    again = images.detach().clone().requires_grad_()
    smooth = interpolate(again, (20, 32), mode="bicubic", antialias=True)
    # The filters agree but for Pillow's rounding and clipping, once along each side.
    assert (smooth.clamp(0, 1) - small).abs().mean() < 0.5 / 255
    (theirs,) = torch.autograd.grad((smooth * upstream).sum(), again)
    torch.testing.assert_close(ours, theirs)
