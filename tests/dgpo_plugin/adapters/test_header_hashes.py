"""The hashes in our headers are those that other people's programs compute, and theirs are no reason to cry."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from dgpo_plugin.adapters import AdapterCard, TrainingFacts, apply_adapter, export_adapter, read_adapter
from dgpo_plugin.commands.main import main
from dgpo_plugin.models.load import load_model
from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.adapters.adapter_files import CONFIG

pytestmark = pytest.mark.fast


def after_the_header(path: Path) -> str:
    """ModelSpec's reference, examples/python/example_no_reqs.py."""
    with path.open("rb") as stream:
        stream.read(int.from_bytes(stream.read(8), "little"))
        return f"0x{hashlib.sha256(stream.read()).hexdigest()}"


def kohyas(path: Path) -> tuple[str, str]:
    """sd-scripts' ``precalculate_safetensors_hashes``, ``addnet_hash_safetensors`` and ``addnet_hash_legacy``."""
    file = read_adapter(path)
    kept = {key: value for key, value in file.header.items() if key.startswith("ss_")}
    stream = BytesIO(safetensors.torch.save(dict(file.tensors), kept))
    stream.seek(8 + int.from_bytes(stream.read(8), "little"))
    model = hashlib.sha256(stream.read()).hexdigest()
    stream.seek(0x100000)
    return model, hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize("rank", [2, 256], ids=["smaller than a MiB", "larger"])
def test_our_header_states_modelspecs_hash_and_kohyas(rank: int, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"lora": CONFIG.lora.model_copy(update={"rank": rank})})
    model = load_model(config.model)
    policy = Policy(model, config.lora, seed=0, unconditional=model.blank_conditioning(1))
    path = tmp_path / "adapter.safetensors"
    weights = {name: torch.randn_like(parameter) for name, parameter in policy.parameters.items()}
    export_adapter(policy, weights, path, TrainingFacts(config, 1))
    assert (path.stat().st_size > 0x100000) == (rank == 256)
    header = read_adapter(path).header
    assert header["modelspec.hash_sha256"] == after_the_header(path)
    assert (header["sshs_model_hash"], header["sshs_legacy_hash"]) == kohyas(path)
    assert AdapterCard.of(read_adapter(path)).content_hash == f"{after_the_header(path)} (matches)"


def foreign(good: Path, folder: Path, **header: str) -> Path:
    """The same tensors in a file of another program's."""
    path = folder / "foreign.safetensors"
    save_file(dict(read_adapter(good).tensors), path, header)
    return path


def digits(good: Path) -> str:
    return after_the_header(good)[2:]


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        (lambda h: {"modelspec.hash_sha256": f"0x{h}"}, "(matches)"),
        (lambda h: {"modelspec.hash_sha256": h}, "(matches)"),
        (lambda h: {"modelspec.hash_sha256": f"0x{h}".upper()}, "(matches)"),
        (lambda h: {"sshs_model_hash": h}, "(matches)"),
        (lambda h: {"modelspec.hash_sha256": "0x" + "1" * 64, "sshs_model_hash": h}, "(matches)"),
        (lambda _: {"modelspec.hash_sha256": "0x" + "1" * 64}, "by another rule"),
        (lambda _: {"modelspec.hash_sha256": "a1b2c3d4e5"}, "by another rule"),
        (lambda _: {"sshs_model_hash": "1" * 64}, "by another rule"),
        (lambda _: {"modelspec.hash_sha256": ""}, "-"),
        (lambda _: {"modelspec.title": "none stated"}, "-"),
    ],
)
def test_a_sound_file_of_others_is_not_called_damaged(good: Path, tmp_path: Path, stated: Any, told: str) -> None:
    path = foreign(good, tmp_path, **stated(digits(good)))
    shown = CliRunner().invoke(main, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "DOES NOT MATCH" not in shown.output
    assert told in AdapterCard.of(read_adapter(path)).content_hash
    apply_adapter(load_model(CONFIG.model), path, any_base=True)


def test_tensors_in_another_order_keep_their_hash(good: Path, tmp_path: Path) -> None:
    """Other writers lay tensors out otherwise: the bytes as they lie in the file are what counts."""
    tensors = dict(read_adapter(good).tensors)
    first, second = sorted(tensors)[:2]
    tensors[first] = tensors[first].double()  # safetensors sorts by type first
    path = tmp_path / "ordered.safetensors"
    save_file(tensors, path)
    save_file(tensors, path, {"modelspec.hash_sha256": after_the_header(path)})
    assert AdapterCard.of(read_adapter(path)).content_hash.endswith("(matches)")
    assert second in read_adapter(path).tensors


def test_the_shipped_adapter_is_as_its_header_states() -> None:
    path = Path(__file__).parents[3] / "comfy_nodes" / "loras" / "dgpo-shapes.safetensors"
    header = read_adapter(path).header
    assert header["modelspec.hash_sha256"] == after_the_header(path)
    assert (header["sshs_model_hash"], header["sshs_legacy_hash"]) == kohyas(path)
