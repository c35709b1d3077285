"""What a worker imports before its first job: imported by one process, while a comparison reads what it is asked."""

from __future__ import annotations

from dgpo_plugin.commands.terminal import quieten

quieten()

from . import base, cell, forecast  # noqa: E402 - libraries are kept quiet before they are imported

__all__ = ["base", "cell", "forecast"]
