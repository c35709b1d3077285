"""A mistake in a configuration is told before anything that takes seconds to import has been."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dgpo_plugin.config.load import preset_names

pytestmark = pytest.mark.fast

READ = """
import sys
from dgpo_plugin.config.load import load_config
for name in sys.argv[1:]:
    load_config(name)
print(*(module for module in ("diffusers", "transformers", "peft") if module in sys.modules))
"""


def test_reading_configurations_imports_neither_diffusers_nor_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", READ, *preset_names()], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
