"""What the tests of models share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dgpo_plugin.models.load import world_pipeline
from tests.dgpo_plugin.broken_bases import Bases
from tests.dgpo_plugin.families import FAMILIES


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A tiny base by name, made once; not to be written into."""
    made: dict[str, Path] = {"shapes": world_pipeline("shapes")}

    def base(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            FAMILIES[name].build(made[name])
        return made[name]

    return base
