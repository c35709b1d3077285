"""`dgpo comfy install`, on a folder that looks like ComfyUI; the real one is in tests/comfy_nodes."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_plugin.cli import main
from dgpo_plugin.comfy import MOVED_BY_NOBODY, NEEDS, ROOT

pytestmark = pytest.mark.fast


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    for inner in ("custom_nodes", "comfy_api/latest"):
        (folder / inner).mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.29.1"\n')
    return folder


def install(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["comfy", "install", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_pack_is_linked_and_what_is_there_is_said(comfyui: Path) -> None:
    code, said = install(comfyui)
    assert code == 0, said
    link = comfyui / "custom_nodes" / "dgpo-plugin"
    assert link.resolve() == ROOT
    assert "0.29.1 in" in said
    assert "(tested with 0.30.0)" in said
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in said
    assert f"{len(NEEDS)} of {len(NEEDS)} as needed" in said
    code, said = install(comfyui)
    assert code == 0
    assert "there already" in said


def test_what_is_missing_is_named_with_the_command_that_mends_it(comfyui: Path) -> None:
    venv.create(comfyui / ".venv", with_pip=False)
    code, said = install(comfyui)
    assert code == 2
    assert "not installed: torch, transformers, numpy, accelerate" in said
    assert f"-m pip install --requirement {ROOT / 'requirements.txt'}" in said
    assert str(comfyui / ".venv" / "bin" / "python") in said


def test_a_folder_that_is_no_comfyui(tmp_path: Path) -> None:
    code, said = install(tmp_path)
    assert code == 2
    assert "no ComfyUI there" in said


def test_a_comfyui_without_the_v3_api(comfyui: Path) -> None:
    (comfyui / "comfy_api" / "latest").rmdir()
    code, said = install(comfyui)
    assert code == 2
    assert "no V3 node API" in said


def test_something_else_in_its_place_is_left_alone(comfyui: Path) -> None:
    (comfyui / "custom_nodes" / "dgpo-plugin").mkdir()
    code, said = install(comfyui)
    assert code == 2
    assert "is something else already" in said


def test_a_python_that_does_not_run(comfyui: Path) -> None:
    code, said = install(comfyui, "--python", comfyui / "main.py")
    assert code == 2
    assert "does not run as a python" in said


def test_the_requirements_move_nothing_of_comfyuis() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in lines}
    assert names <= set(NEEDS)
    assert not names & {*MOVED_BY_NOBODY, "torchvision", "torchaudio", "tokenizers", "safetensors", "huggingface-hub"}
    assert not [line for line in lines if "==" in line or "<" in line or "~" in line]


def test_outside_comfyui_the_root_is_an_empty_package(tmp_path: Path) -> None:
    """pytest, mypy or anyone else may import it."""
    link = tmp_path / "pack"
    link.symlink_to(ROOT)
    script = "import sys, pack; assert not hasattr(pack, 'comfy_entrypoint'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
