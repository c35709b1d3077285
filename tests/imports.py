"""What a process imports, of the modules that take seconds."""

from __future__ import annotations

import subprocess
import sys

SLOW = ("diffusers", "transformers", "peft")


def imported_by(code: str, *arguments: str) -> tuple[str, list[str]]:
    """What a process that runs some code printed, and which of the slow modules it imported."""
    told = f"import sys\n{code}\nprint(*(module for module in {SLOW!r} if module in sys.modules))"
    done = subprocess.run([sys.executable, "-c", told, *arguments], capture_output=True, text=True, check=True)
    *printed, modules = done.stdout.splitlines()
    return "\n".join(printed), modules.split()
