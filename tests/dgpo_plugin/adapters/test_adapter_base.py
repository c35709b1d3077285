"""Whether a model is the base that an adapter was trained on: refused, told, or not known; never claimed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_plugin.adapters import apply_adapter, read_adapter
from dgpo_plugin.adapters.load import base_notes
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.load import load_model, world_pipeline
from tests.dgpo_plugin.adapters.adapter_files import CONFIG

pytestmark = pytest.mark.fast


def copy_of_shapes(folder: Path, part: str, change: Callable[[Tensor], Tensor]) -> Model:
    """The shapes model with all tensors of a part changed."""
    copy = shutil.copytree(world_pipeline("shapes"), folder / "copy")
    (file,) = (copy / part).glob("*.safetensors")
    save_file({name: change(t).contiguous() for name, t in load_file(file).items()}, file, {"format": "pt"})
    return load_model(CONFIG.model.model_copy(update={"path": str(copy)}))


def test_the_very_base_needs_no_word(model: Model, good: Path) -> None:
    assert base_notes(apply_adapter(load_model(CONFIG.model), good), model) == []


def test_a_rounded_base_is_taken_and_told(good: Path, tmp_path: Path) -> None:
    rounded = copy_of_shapes(tmp_path, "transformer", Tensor.bfloat16)
    (line,) = base_notes(apply_adapter(rounded, good), rounded)
    assert "its transformer is the same but rounded: not stored in the type of the one that adapter.safetensors" in line


def test_another_denoiser_is_refused(good: Path, tmp_path: Path) -> None:
    other = copy_of_shapes(tmp_path, "transformer", lambda tensor: tensor * 1.1)
    with pytest.raises(UserError, match="trained on shapes with another transformer than .*copy's; name that model"):
        apply_adapter(other, good)
    apply_adapter(other, good, any_base=True)


def test_another_vae_is_told(good: Path, tmp_path: Path) -> None:
    other = copy_of_shapes(tmp_path, "vae", lambda tensor: tensor * 1.1)
    (line,) = base_notes(apply_adapter(other, good), other)
    assert "its vae is not the one that adapter.safetensors was trained with" in line


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, "does not say what it was trained on; whether shapes has the same weights cannot be told"),
        ({"ss_base_model_version": "sd3"}, "was trained on sd3; whether shapes has the same weights cannot be told"),
        ({"dgpo.base_model": "mine"}, "was trained on mine; whether shapes has the same weights cannot be told"),
        ({"dgpo.base_parts": "{"}, "does not say what it was trained on; whether shapes has"),
        ({"dgpo.base_weights_hash": "0" * 64}, "does not say what it was trained on; whether shapes has"),
    ],
)
def test_a_file_that_does_not_say_is_not_said_to_be_of_other_weights(
    good: Path, tmp_path: Path, header: dict[str, str], said: str
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(dict(read_adapter(good).tensors), path, header or None)
    fresh = load_model(CONFIG.model)
    (line,) = base_notes(apply_adapter(fresh, path), fresh)
    assert said in line
