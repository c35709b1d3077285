"""When the server's environment cannot be made, and what that is called."""

from __future__ import annotations

import os
import venv
from pathlib import Path

import pytest

from tests.comfy_nodes import environment

pytestmark = pytest.mark.slow


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new virtual environment in the place of the server's."""
    venv.create(tmp_path, with_pip=True)
    monkeypatch.setattr(environment, "PYTHON", tmp_path / "bin" / "python")
    for name, value in {"CONFIG_FILE": os.devnull, "FIND_LINKS": "", "EXTRA_INDEX_URL": "", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return tmp_path


def test_an_index_that_does_not_answer(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(environment.Unreachable):
        environment.pip("install", "einops")


def test_an_index_without_the_package_is_no_reason_to_skip(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="No matching distribution"):
        environment.pip("install", "einops")


def test_the_recipe_is_pinned() -> None:
    """Every requirement has a version, here or in constraints.txt; the server itself also a hash."""

    def lines(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]

    constrained = {line.split("==")[0].lower() for line in lines(environment.ROOT / "constraints.txt") if "==" in line}
    for line in lines(environment.REQUIREMENTS):
        assert "==" in line or line.lower() in constrained, line
    assert all("==" in line for line in lines(environment.BARE))
    (server,) = lines(environment.SDIST)
    assert "--hash=sha256:" in server
