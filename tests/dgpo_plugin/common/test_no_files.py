"""What lies under a name and is no file: it is named at once, and neither waited for nor read without end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dgpo_bench.records import read_results
from dgpo_plugin.adapters import read_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.tensor_file import tensor_header
from dgpo_plugin.config.load import load_config
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.rewards.picture_files import read_picture
from dgpo_plugin.rewards.picture_prompts import read_rows
from dgpo_plugin.training.run_folder import last_logged

pytestmark = [pytest.mark.fast, pytest.mark.timeout(60)]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may be 100 bytes long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


READERS: dict[str, Callable[[Path], object]] = {
    "run.yaml": lambda path: load_config(str(path)),
    "prompts.txt": read_prompts,
    "prompts.jsonl": read_prompts,
    "prompts.csv": read_rows,
    "a.png": read_picture,
    "adapter.safetensors": read_adapter,
    "weights.safetensors": tensor_header,
    "results.json": read_results,
    "metrics.jsonl": last_logged,
}
KINDS = {"pipe": make_pipe, "folder": make_folder, "socket": make_socket, "device": make_device}


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices have names on POSIX systems")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_named(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[kind](path)
    with pytest.raises(UserError, match=str(path)) as refused:
        READERS[name](path)
    if (name, kind) != ("adapter.safetensors", "folder"):  # peft and diffusers save folders
        assert f"is a {kind}, not a file" in str(refused.value)


@pytest.mark.parametrize("name", [name for name in READERS if name != "metrics.jsonl"])
@pytest.mark.parametrize("stem", ["a\0b", "x" * 5000, "\ud800"], ids=["NUL", "long", "half"])
def test_what_cannot_be_a_name_is_a_line(name: str, stem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        READERS[name](tmp_path / f"{stem}{name}")


def test_lines_of_any_system_are_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a cat\r\na dog\ra bird\na fish")
    assert [prompt.text for prompt in read_prompts(tmp_path / "prompts.txt")] == ["a cat", "a dog", "a bird", "a fish"]
