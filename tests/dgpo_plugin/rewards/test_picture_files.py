"""`dgpo score`: pictures as people see them, and rewards of one's own that go wrong."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards import RewardSet, WeightedReward, as_reward, load_reward
from dgpo_plugin.rewards.picture_files import read_picture, score
from dgpo_plugin.rewards.picture_folders import find_pictures, suffixes
from tests.conftest import one_reward

pytestmark = pytest.mark.fast


def test_sixteen_bit_grey_is_grey_and_not_white(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png")
    np.testing.assert_allclose(read.numpy(), np.broadcast_to(ramp / 65535, (3, 8, 8)), atol=1e-6)


def test_floating_point_pictures_are_their_numbers_or_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "good.tiff")
    np.testing.assert_allclose(read_picture(tmp_path / "good.tiff")[0].numpy(), values)
    for name, bad in {
        "large": values * 255,
        "below": values - 1,
        "nan": np.where(values > 0.5, np.nan, values),
    }.items():
        Image.fromarray(bad.astype(np.float32)).save(tmp_path / f"{name}.tiff")
        with pytest.raises(UserError, match="convert it to 8 bits"):
            read_picture(tmp_path / f"{name}.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """The color below it, here black, is nothing that anybody sees."""
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 2, 4))
    picture.convert(mode).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png")
    assert read[:, :, 2:].min() == 1
    assert read[1, :, :2].max() < 0.5


def test_a_camera_that_was_turned(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 2), "black")
    picture.paste((255, 255, 255), (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    read = read_picture(tmp_path / "a.png")
    assert read.shape == (3, 6, 2)
    assert read[:, :2].min() == 1
    assert read[:, 2:].max() == 0


def test_ordinary_pictures_are_as_they_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(read_picture(tmp_path / "a.png"), torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize(
    "suffix", ["png", "bmp", "gif", "tiff", "ppm", "tga", "pcx", "webp", "jp2", "avif", "jpg", "ico", "dds"]
)
def test_a_format_that_opens_is_read(tmp_path: Path, suffix: str) -> None:
    if f".{suffix}" not in suffixes():
        pytest.skip(f"this Pillow does not read {suffix}")
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix in ("avif", "jpg") else {}
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / f"a.{suffix}", **options)
    assert find_pictures([tmp_path]).pictures == [tmp_path / f"a.{suffix}"]
    read = read_picture(tmp_path / f"a.{suffix}")
    assert read.shape == (3, 16, 16)
    torch.testing.assert_close(read.mean((1, 2)), torch.tensor([1.0, 0, 0]), rtol=0, atol=0.02)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_what_moves_the_first_picture_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black", "red")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / f"a.{suffix}").min() > 0.98


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_white_is_white_in_every_mode(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "YCbCr" else "tiff"  # of which Pillow 10.1 cannot read its own TIFF
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / f"a.{suffix}")
    assert read_picture(tmp_path / f"a.{suffix}").min() > 0.99


def test_whole_numbers_of_32_bits_are_no_16_bit_grey(tmp_path: Path) -> None:
    """They would be almost black."""
    Image.fromarray(np.full((4, 4), 255, dtype=np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="have 32 bits; convert it to 8"):
        read_picture(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + b"\xff\xff\x00\x00")
    assert read_picture(tmp_path / "a.pgm")[0].tolist() == [[1, 0]]


def test_no_other_program_is_run_for_a_picture(tmp_path: Path) -> None:
    """PostScript by another name, which Pillow would hand to Ghostscript."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a picture that can be read"):
        read_picture(tmp_path / "a.png")


def declared(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 40_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_declares_to_be_huge_is_refused_before_it_is_read(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(declared(side, side))
    with pytest.raises(UserError, match="more than the 50,000,000"):
        read_picture(tmp_path / "a.png")


def test_a_text_chunk_that_unpacks_to_megabytes_is_one_line(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("a", "b" * 80_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match="not a picture that can be read"):
        read_picture(tmp_path / "a.png")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def raises(error: BaseException) -> Callable[..., Any]:
    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Any:
        raise error

    return reward


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises(ValueError("first\nsecond")), "reward mine: ValueError: first, at "),
        (raises(Mute()), "reward mine: Mute: its message cannot be read, at "),
        (raises(SystemExit(0)), "reward mine: SystemExit: 0, at "),
        (lambda images, prompts: None, "reward mine: "),
        (lambda images, prompts: ["x"] * len(images), "reward mine: "),
        (lambda images, prompts: torch.ones(len(images), 2), "must return one number for each image"),
        (lambda images, prompts: torch.full((len(images),), float("nan")), "not finite"),
    ],
)
def test_a_reward_that_goes_wrong_is_one_line_that_names_it(
    tmp_path: Path, reward: Callable[..., Any], message: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        score([tmp_path / "a.png"], [Prompt("x")], one_reward(reward), 4, lambda done: None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_that_line(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    own = tmp_path / "mine.py"
    own.write_text("def reward(images, prompts):\n    return prompts[0].nowhere\n")
    run = CliRunner().invoke(main, ["score", str(tmp_path / "a.png"), "--reward", f"{own}:reward", "--prompt", "x"])
    assert run.exit_code == 2
    assert run.output.splitlines()[-1].startswith(f"error: reward {own}:reward: AttributeError: ")


def test_a_reward_that_writes_into_its_pictures_does_not_change_the_next_ones(tmp_path: Path) -> None:
    """`brightness` once read 0.0 for .5, after one that blackened what it was given."""
    Image.new("RGB", (4, 4), (128, 128, 128)).save(tmp_path / "a.png")

    def blackens(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.zero_().flatten(1).mean(1)

    loaded = {"blackens": as_reward(blackens), "brightness": load_reward("brightness")}
    rewards = RewardSet({label: WeightedReward(reward) for label, reward in loaded.items()})
    (row,), _ = score([tmp_path / "a.png"], [Prompt("x")], rewards, 4, lambda done: None)
    assert row["brightness"] == pytest.approx(128 / 255)
