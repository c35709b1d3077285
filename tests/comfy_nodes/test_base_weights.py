"""What the card says of the weights in ComfyUI: single files, casts and patches are the same base, others are not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.comfy_nodes import environment
from tests.comfy_nodes.conftest import WEIGHTS, make_adapters
from tests.comfy_nodes.server import Server

pytestmark = pytest.mark.slow

SAME, ROUNDED, OTHER = (
    "trained on cut; these very weights",
    "trained on cut; the same weights but rounded",
    "trained on cut; MISMATCH: this model has other weights",
)
HEADERS = {
    "{}": "trained on a base the file does not name; whether these are the same weights cannot be told",
    '{"ss_base_model_version": "sd3"}': "trained on sd3; whether these are the same weights cannot be told",
    '{"dgpo.base_model": "m", "dgpo.base_parts": "{"}': "trained on m; whether these are the same weights cannot be "
    "told",
    '{"dgpo.base_weights_hash": "00"}': "trained on a base the file does not name; whether these are the same weights "
    "cannot be told",
}
"""Headers of files that do not say what is needed."""


def trained(tensor: Tensor) -> Tensor:
    return tensor + 0.02 * tensor.float().std(correction=0).nan_to_num() * torch.randn(tensor.shape)


MODELS: list[tuple[str, Callable[[Tensor], Tensor], str, str]] = [
    ("same", lambda t: t, "", SAME),
    ("wider", Tensor.float, "", SAME),
    ("single", lambda t: t, ":single", SAME),
    ("single-fp16", Tensor.half, ":single", SAME),  # as the embedded weights are stored
    ("single-bf16", Tensor.bfloat16, ":single", ROUNDED),
    ("single-trained", trained, ":single", OTHER),
    ("patched", lambda t: t, ":patched", SAME),
    ("bf16", Tensor.bfloat16, "", ROUNDED),
    ("fp8", lambda t: t, ":fp8", ROUNDED),
    ("trained", trained, "", OTHER),
    ("trained-bf16", lambda t: trained(t).bfloat16(), "", OTHER),
    ("scaled", lambda t: t * 1.05, "", OTHER),
]


@pytest.fixture(scope="module")
def said(server: Server, cut_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The note on every model, by its name."""
    folder = tmp_path_factory.mktemp("weights")
    make_adapters(str(cut_pipeline), folder, "cut")
    weights = load_file(cut_pipeline / WEIGHTS)
    torch.manual_seed(0)
    for name, change, _, _ in MODELS:
        save_file({key: change(t).contiguous() for key, t in weights.items()}, folder / f"{name}.safetensors")
    notes = {name: f"{folder / name}.safetensors{how}" for name, _, how, _ in MODELS}
    notes |= {header: header for header in HEADERS}
    command = [environment.PYTHON, Path(__file__).with_name("base_weights.py"), folder / "cut.safetensors"]
    done = subprocess.run(
        [str(word) for word in [*command, *notes.values()]], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(notes, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    ("name", "expected"), [*((name, expected) for name, _, _, expected in MODELS), *HEADERS.items()]
)
def test_the_note_on_a_models_weights(said: dict[str, str], name: str, expected: str) -> None:
    assert said[name] == expected
