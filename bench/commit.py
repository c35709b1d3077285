"""The commit that something was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_hash() -> str | None:
    """The checkout's commit, with ``+`` where it has changes; None where the package is not in a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")
