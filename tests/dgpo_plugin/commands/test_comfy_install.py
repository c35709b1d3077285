"""`dgpo comfy install`, on a folder that looks like ComfyUI; the real one is in tests/comfy_nodes."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgpo_plugin.commands import comfy_install as comfy
from dgpo_plugin.commands.comfy_install import ROOT, oldest_versions
from dgpo_plugin.commands.main import main

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
    assert f"{len(oldest_versions())} of {len(oldest_versions())} as needed" in said
    code, said = install(comfyui)
    assert code == 0
    assert "there already" in said


def test_what_is_missing_is_named_with_the_command_that_mends_it(comfyui: Path) -> None:
    venv.create(comfyui / ".venv", with_pip=False)
    code, said = install(comfyui)
    assert code == 2
    assert f"not installed: {', '.join(oldest_versions())}" in said
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


def test_what_is_too_old_is_named_with_whose_it_is(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy, "oldest_versions", lambda: {"torch": (2, 9999), "click": (8, 0, 9999), "rich": (13,)})
    versions = {"torch": "2.13.0+cpu", "click": "8.0.9998", "rich": "13.0.1"}
    monkeypatch.setattr(comfy, "probe", lambda python, distributions: ((3, 11, 7), versions))
    code, said = install(comfyui)
    assert code == 2
    assert "torch 2.13.0+cpu is older than 2.9999, which is ComfyUI's own: upgrade it there" in said
    assert "click 8.0.9998 is older than 8.0.9999;" in said.replace("\n", ";")
    assert "1 of 3 as needed" in said


def test_a_pack_that_is_no_clone_says_so(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy, "ROOT", tmp_path)
    code, said = install(comfyui)
    assert code == 2
    assert "clone the repository" in said


def test_outside_comfyui_the_root_is_an_empty_package(tmp_path: Path) -> None:
    """pytest, mypy or anyone else may import it."""
    link = tmp_path / "pack"
    link.symlink_to(ROOT)
    script = "import sys, pack; assert not hasattr(pack, 'comfy_entrypoint'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
