"""Windows and macOS, imitated on whatever runs this: nothing that only POSIX or only Linux has is on a user's path.

Neither system was at hand: what is taken away here is what they lack.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dgpo_plugin.commands import comfy_install as comfy
from dgpo_plugin.common.errors import UserError
from tests.bench.test_compare import small_preset
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("dgpo_plugin", "bench", "comfy_nodes") for path in (ROOT / folder).rglob("*.py"))
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_OS = {
    *("chown", "fork", "forkpty", "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "killpg", "mkfifo", "nice"),
    *("pread", "pwrite", "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait"),
}
POSIX_SIGNALS = {"SIGALRM", "SIGBUS", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "pause", "setitimer"}


def posix_only(tree: ast.AST) -> Iterator[str]:
    """Imports outside of a ``try``, and attributes of os and signal."""
    tried = {inner for outer in ast.walk(tree) if isinstance(outer, ast.Try) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in tried:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name in POSIX_MODULES)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            taken = {"os": POSIX_OS, "signal": POSIX_SIGNALS}.get(node.value.id, set())
            if node.attr in taken or (node.value.id == "os" and node.attr.startswith("EX_")):
                yield f"{node.value.id}.{node.attr}"


def without_encoding(tree: ast.AST) -> Iterator[str]:
    """Texts that Windows would read or write in a code page of its own."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = node.func.value.id if isinstance(getattr(node.func, "value", None), ast.Name) else ""  # type: ignore[attr-defined]
        modes = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
        plain = name == "open" and owner not in ("os", "Image") and not any("b" in mode for mode in modes[-1:])
        is_paths = isinstance(node.func, ast.Attribute)  # common.files has a read_text whose encoding is UTF-8
        if (name in ("read_text", "write_text") and is_paths) or plain:
            yield f"{name} in line {node.lineno}"


@pytest.mark.fast
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_names_nothing_of_posix_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(posix_only(tree)) == []
    assert list(without_encoding(tree)) == []


TAKEN_AWAY = """
import os, sys
from click.testing import CliRunner
# Other packages have ways of their own on Windows; they are here before anything is taken away.
import accelerate, diffusers, peft, psutil, scipy, torch, transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel
torch.set_num_threads(1)

def refuse(*arguments, **options):
    raise OSError(22, "A required privilege is not held by the client")

sys.modules["resource"] = None
for name in ("sysconf", "fork", "getuid", "geteuid", "killpg", "uname", "sched_getaffinity"):
    delattr(os, name)
os.symlink = refuse
psutil.Process.memory_info = lambda self: type("Info", (), {"peak_wset": 2**30})

from dgpo_bench.commands import main as bench
from dgpo_plugin.commands.main import main as dgpo

for command in COMMANDS:
    program, *arguments = command
    done = CliRunner().invoke({"dgpo": dgpo, "dgpo-bench": bench}[program], arguments)
    print(command[:2], done.exit_code, done.output.strip().splitlines()[-1:], done.exception, flush=True)
    if done.exit_code not in (0, 2):
        import traceback
        traceback.print_exception(done.exception)
"""


@pytest.mark.slow
def test_users_paths_without_resource_sysconf_and_symlinks(tmp_path: Path) -> None:
    changes = [part for change in SMALL for part in ("--set", change)]
    (tmp_path / "ComfyUI" / "comfy_api" / "latest").mkdir(parents=True)
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir()
    (tmp_path / "ComfyUI" / "main.py").touch()
    run, picture = tmp_path / "run", tmp_path / "grid.png"
    draw = ["sample", "shapes", "--adapter", run / "adapter.safetensors", "--prompt", "a red circle", "--count", 1]
    preset = small_preset(tmp_path)
    options = ["--algorithms", "dgpo", "--seeds", 1, "--threads", 1, "--evaluations", 1500]
    commands: list[list[object]] = [
        ["dgpo", "list"],
        ["dgpo", "plan", "shapes"],
        ["dgpo", "train", "shapes", "--output", run, *changes],
        ["dgpo", "resume", run],
        ["dgpo", "inspect", run / "adapter.safetensors"],
        ["dgpo", *draw, "--steps", 1, "--output", picture],
        ["dgpo", "score", picture, "--reward", "brightness,sharpness", "--prompt", "a red circle"],
        ["dgpo-bench", "throughput", "shapes", "--iterations", 1, *changes],
        ["dgpo-bench", "compare", preset, "--output", tmp_path / "out", *options],
        ["dgpo", "comfy", "install", tmp_path / "ComfyUI"],
    ]
    script = f"COMMANDS = {[[str(part) for part in command] for command in commands]!r}\n" + TAKEN_AWAY
    guarded = f'if __name__ == "__main__":\n    exec({script!r}, globals())\n'  # a comparison's workers import it
    (tmp_path / "main.py").write_text(guarded)
    done = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=800)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(commands), done.stdout
    for line in lines[:-1]:
        assert "] 0 [" in line, done.stdout + done.stderr
    assert "] 2 [" in lines[-1]
    assert "cannot be linked (A required privilege is not held by the client); clone the repository there" in lines[-1]


@pytest.mark.fast
def test_without_symlinks_at_all_the_pack_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("os.symlink() not available on this system")

    monkeypatch.setattr(Path, "symlink_to", missing)
    with pytest.raises(UserError, match=r"cannot be linked \(os.symlink\(\) not available .*\); clone the repository"):
        comfy.link_pack(tmp_path / "dgpo-plugin")


@pytest.mark.fast
def test_on_windows_the_pack_is_a_junction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes no rights, as a symbolic link does there. Windows' call is imitated by a symbolic link."""

    class WindowsCalls:
        @staticmethod
        def CreateJunction(target: str, place: str) -> None:
            Path(place).symlink_to(target)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "_winapi", WindowsCalls)
    place = tmp_path / "dgpo-plugin"
    assert comfy.link_pack(place) == f"{place} -> {comfy.ROOT}"
    assert comfy.link_pack(place) == f"{place}, there already"


@pytest.mark.fast
def test_a_torch_without_its_distributed_part_does() -> None:
    """Some builds for Windows have none; one process needs none."""
    script = """
import importlib, pkgutil, sys
import accelerate, diffusers, peft, torch, transformers
sys.modules["torch.distributed.fsdp"] = sys.modules["torch.distributed.device_mesh"] = None
import dgpo_plugin.training.trainer, dgpo_plugin.training.run, dgpo_plugin.models.families.sd3
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.fast
def test_the_memory_of_this_computer_is_known() -> None:
    from dgpo_plugin.distributed.device import device_memory

    name, size = device_memory()
    assert size > 2**28
    assert torch.cuda.is_available() or name == "this computer's memory"
