"""``dgpo comfy install``: link the node pack into an existing ComfyUI and check that it can load there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dgpo_plugin.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
"""The repository, which is the pack."""
PACK_NAME = "dgpo-plugin"
TESTED_COMFYUI = "0.30.0"
OLDEST_PYTHON = (3, 10)
COMFYUIS_OWN: tuple[str, ...] = (
    *("torch", "transformers", "numpy", "scipy", "pillow", "pyyaml", "pydantic", "safetensors", "psutil"),
    *("huggingface-hub", "tokenizers"),  # which transformers brings
)
"""What comes with ComfyUI: reported when too old, never named in ``requirements.txt``, which has the rest."""
HARNESS_ONLY = ("jinja2", "markupsafe", "matplotlib")
"""Dependencies that only ``dgpo-bench`` imports."""

_PROBE = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"python": list(sys.version_info[:3]), "found": found}))
"""


@dataclass(frozen=True)
class Report:
    """What was found and done: (label, value) rows, and what still stands in the way."""

    rows: list[tuple[str, str]]
    problems: list[str]


def install(comfyui: Path, python: Path | None = None) -> Report:
    """Link the repository into ``custom_nodes`` and look at what ComfyUI would load it with.

    Args:
        comfyui: ComfyUI's folder (the one with ``main.py``).
        python: its interpreter; None for the one in its virtual environment or beside it, else this one.

    Raises:
        UserError: no ComfyUI there, one without the V3 node API, or something else under the pack's name.
    """
    comfyui_version = _comfyui_version(comfyui)
    interpreter = python or _interpreter(comfyui)
    needed = oldest_versions()
    running, installed = probe(interpreter, list(needed))
    link = link_pack(comfyui / "custom_nodes" / PACK_NAME)
    tested = "" if comfyui_version == TESTED_COMFYUI else f" (tested with {TESTED_COMFYUI})"
    python_version = _text(running)
    too_old = [name for name, oldest in needed.items() if name in installed and _numbers(installed[name]) < oldest]
    missing = [name for name in needed if name not in installed]
    rows = [
        ("ComfyUI", f"{comfyui_version} in {comfyui}{tested}"),
        ("python", f"{python_version}, {interpreter}"),
        ("pack", link),
        ("packages", f"{len(needed) - len(missing) - len(too_old)} of {len(needed)} as needed"),
    ]
    problems = []
    if running < OLDEST_PYTHON:
        problems.append(f"python {python_version} is too old, the nodes need {_text(OLDEST_PYTHON)}")
    for name in too_old:
        whose = ", which is ComfyUI's own: upgrade it there" if name in COMFYUIS_OWN else ""
        problems.append(f"{name} {installed[name]} is older than {_text(needed[name])}{whose}")
    if missing:
        command = f"{interpreter} -m pip install --requirement {ROOT / 'requirements.txt'}"
        problems.append(f"not installed: {', '.join(missing)}; {command}")
    return Report(rows, problems)


def oldest_versions() -> dict[str, tuple[int, ...]]:
    """The distributions that the nodes import, each with its oldest version, from ``pyproject.toml``.

    Read from the text: the pack is always a clone, which may be newer than what was installed of it, and Python 3.10
    has no parser for the format.

    Raises:
        UserError: this is no clone.
    """
    try:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{ROOT}: holds no pyproject.toml; clone the repository, it is the pack") from error
    block = text.partition("\ndependencies = [\n")[2].partition("\n]\n")[0]
    bounds = dict(re.findall(r'^ *"([a-z0-9-]+)>=([0-9.]+)",$', block, re.MULTILINE))
    return {name: _numbers(oldest) for name, oldest in bounds.items() if name not in HARNESS_ONLY}


def _comfyui_version(folder: Path) -> str:
    """The version that a ComfyUI states, once it is found to be one that can load the pack."""
    if not (folder / "main.py").is_file() or not (folder / "custom_nodes").is_dir():
        raise UserError(f"{folder}: no ComfyUI there (no main.py or custom_nodes/); name its folder")
    if not (folder / "comfy_api" / "latest").is_dir():
        raise UserError(
            f"{folder}: this ComfyUI has no V3 node API (comfy_api/latest); update it to {TESTED_COMFYUI} or newer"
        )
    file = folder / "comfyui_version.py"
    stated = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return stated.group(1) if stated else "of unknown version"


def _interpreter(comfyui: Path) -> Path:
    """ComfyUI's own python where its usual installations keep it, else this one."""
    candidates = [
        folder / inner
        for folder in (comfyui / ".venv", comfyui / "venv")
        for inner in ("bin/python", "Scripts/python.exe")
    ]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")
    return next((python for python in candidates if python.is_file()), Path(sys.executable))


def probe(python: Path, distributions: list[str]) -> tuple[tuple[int, ...], dict[str, str]]:
    """An interpreter's own version, and those of the distributions that are installed for it.

    Raises:
        UserError: it does not run.
    """
    try:
        command = [str(python), "-c", _PROBE, *distributions]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{python}: does not run as a python ({error}); name ComfyUI's with --python") from error
    return tuple(answer["python"]), answer["found"]


def link_pack(link: Path) -> str:
    """Make a link to the repository, unless it is there; a line on what was done."""
    if not (ROOT / "comfy_nodes").is_dir():
        raise UserError(f"{ROOT}: holds no comfy_nodes/; clone the repository, the pack is not in the wheel")
    if link.is_symlink() or link.exists():
        if link.resolve() == ROOT:
            return f"{link}, there already"
        raise UserError(f"{link}: is something else already; remove or rename it first")
    try:
        if sys.platform == "win32":  # where a symbolic link takes rights that most people lack
            import _winapi

            _winapi.CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(ROOT, target_is_directory=True)
    except (OSError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{link}: cannot be linked ({reason}); clone the repository there instead") from error
    return f"{link} -> {ROOT}"


def _numbers(version: str) -> tuple[int, ...]:
    """(major, minor, ...), at most three, of the release alone."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
