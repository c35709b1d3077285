"""The original packages in an environment of their own, ``.venv-parity`` in the repository.

What they need would break ours.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.locks import locked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".venv-parity"
PYTHON = FOLDER / "bin" / "python"
REQUIREMENTS = HERE / "requirements.txt"


class IndexUnreachable(Exception):
    """No package index, so no environment."""


def build() -> Path:
    """Its Python; made if it is not there, or was made of other requirements or for another Python (20 s).

    torch, transformers and the rest are the main environment's, found through PYTHONPATH.

    Raises:
        IndexUnreachable: the packages cannot be downloaded.
    """
    stamp, wanted = FOLDER / "installed", _key()
    with locked("parity"):
        if not stamp.is_file() or stamp.read_text() != wanted:
            _install()
            stamp.write_text(wanted)
    return PYTHON


def _install() -> None:
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
    # What PYTHONPATH shows here would count as installed there.
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--requirement", REQUIREMENTS],
        capture_output=True,
        text=True,
        check=False,
        env=plain,
    )
    if done.returncode:
        output = done.stdout + done.stderr
        if any(sign in output for sign in ("Failed to establish a new connection", "ConnectTimeout", "ProxyError")):
            raise IndexUnreachable(output.strip().splitlines()[-1])
        raise RuntimeError(f"the parity environment could not be installed:\n{output}")


def _key() -> str:
    return hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()


def run_originals(folder: Path, what: str, threads: int = 1) -> None:
    """``originals.py`` on a folder, in that environment.

    Raises:
        RuntimeError: it failed; with its output.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [build(), HERE / "originals.py", folder, what], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"the original packages failed:\n{done.stdout}\n{done.stderr}")
