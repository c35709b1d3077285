"""What a result was made with and when: written into adapters, checkpoints and comparisons."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dgpo-plugin", "torch", "diffusers", "peft", "transformers", "safetensors")


def creation_date() -> str:
    """Now in UTC, ISO 8601; ``SOURCE_DATE_EPOCH`` if it is set, so that the same run gives the same file."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(given), timezone.utc) if given else datetime.now(timezone.utc)
    return now.isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Installed versions, by name, of the packages that decide a result's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that was never installed
            continue
    return found
