"""What a result was made with and when: written into adapters, checkpoints and comparisons."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from dgpo_plugin.common.errors import UserError

PACKAGES = ("dgpo-plugin", "torch", "diffusers", "peft", "transformers", "safetensors")


def creation_date() -> str:
    """Now in UTC, ISO 8601; ``SOURCE_DATE_EPOCH`` if it is set, so that the same run gives the same file.

    Raises:
        UserError: that is no number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = datetime.fromtimestamp(int(given), timezone.utc) if given else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(
            f"SOURCE_DATE_EPOCH={given}: no number of seconds since 1970 that is a date; set it to one, or unset it"
        ) from error
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
