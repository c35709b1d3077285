"""Every kind of update that ComfyUI itself applies, and those that it would leave out without a word."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfy_nodes import environment
from tests.comfy_nodes.conftest import NOT_TESTED

pytestmark = pytest.mark.slow

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    try:
        environment.ensure()
    except environment.Unreachable as error:
        pytest.skip(f"{NOT_TESTED} ({error})")
    command = [environment.PYTHON, Path(__file__).with_name("kinds_of_update.py"), tmp_path_factory.mktemp("kinds")]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results: Found = json.loads(done.stdout)
    return results


PLAIN: dict[str, dict[str, int]] = {
    "lora": {},
    "lora_old_names": {},
    "lora_older_names": {},
    "lora_default": {},
    "lora_native": {},
    "lora_alpha": {},
    "lora_of_a_section": {},
    "three_parts": {},
    "dora": {"DoRA": 1},
    "dora_of_columns": {"DoRA": 1},
    "dora_of_a_section": {"DoRA": 1},
    "dora_of_lokr": {"LoKr": 2, "DoRA": 1},
    "diff": {"weight difference": 1},
    "diff_b": {"bias difference": 1},
    "lora_and_diff_b": {"bias difference": 1},
    "lora_and_diff_b_elsewhere": {"bias difference": 1},
    "bias_by_its_own_name": {"weight difference": 1},
    "set_weight": {"weight difference": 1},
    "loha": {"LoHa": 4},
    "loha_alpha": {"LoHa": 4},
    "lokr": {"LoKr": 2},
    "lokr_low_rank": {"LoKr": 3},
    "lokr_low_rank_both": {"LoKr": 4},
    "oft": {"OFT": 1},
    "boft": {"OFT": 1},
    "glora": {"GLoRA": 4},
    "lora_and_loha": {"LoHa": 4},
    "lora_and_lokr": {"LoKr": 2},
    "control": {"bias difference": 2, "weight difference": 2},
}
"""What is applied as ComfyUI does, with what of it is told to be no LoRA."""


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_applied_as_comfyui_does(found: Found, name: str) -> None:
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["same"]
    assert result["changed"]
    assert result["matched"] == result["total"]
    assert result["kinds"] == PLAIN[name]
    assert result["logged"] == []


def test_text_encoder_keys_are_left_out_and_counted(found: Found) -> None:
    result = found["lora_and_text"]
    assert (result["matched"], result["total"], result["for_text"]) == (2, 4, 2)
    assert result["same"]


def close(one: list[float], other: list[float]) -> bool:
    return one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("name", ["three_parts", "three_parts_last"])
def test_scale_and_shift_are_turned_where_diffusers_has_them_turned(found: Found, name: str) -> None:
    """ComfyUI takes as many layers as heads to be there; the embedded model has more."""
    (update,) = found[name]["update"].values()
    expected: Any = found["expected"][name]
    half = len(expected) // 2
    assert close(update, expected[half:] + expected[:half])
    assert not close(update, expected)


def test_a_layer_that_is_not_the_last_is_left_as_it_is(found: Found) -> None:
    (update,) = found["inner_context"]["update"].values()
    assert close(update, found["expected"]["inner_context"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lora_and_diff_on_one", "has LoRA and weight difference, of which ComfyUI applies only one"),
        ("lora_and_lokr_on_one", "has LoKr and LoRA, of which ComfyUI applies only one"),
        ("two_names_for_one", "is for a weight that another of its keys changes too"),
        ("bias_of_a_section", "has a bias difference, which ComfyUI puts on whole layers only"),
        ("bias_of_three_parts", "has a bias difference, which ComfyUI puts on whole layers only"),
        ("bias_of_peft", "ComfyUI applies none of the others to it: 1 bias difference (first: "),
        ("boft_without_alpha", "BOFT has no alpha"),
        ("vera", "none of the others to it: 1 VeRA (first: "),
        ("ia3", "none of the others to it: 1 (IA)^3 (first: "),
        ("oft_of_peft", "none of the others to it: 1 OFT (first: "),
        ("dora_of_peft", "none of the others to it: 1 DoRA (first: "),
        ("dora_in_a_list", "is (128,), and ComfyUI needs (128, 1) for that layer"),
        ("dora_of_another_size", "is (64, 1), and ComfyUI needs (128, 1) for that layer"),
        ("no_known_kind", "none of the others to it: 1 of no known kind (first: "),
        ("half", "lacks 'transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight'"),
        ("other_half", "to_out.0.lora_A.weight has no other half"),
        ("half_a_loha", "hada_w1_b'; fetch or export the file again"),
        ("half_a_lokr", "the adapter's lokr for diffusion_model.joint_blocks.0.x_block.attn.proj.weight"),
        ("lora_of_another_size", "is (128, 128) in this model (Tiny), but the adapter's update is (128, 64)"),
        ("loha_of_another_size", "the adapter's update is (128, 64)"),
        ("lokr_of_another_size", "the adapter's update is (128, 64)"),
        ("oft_of_another_size", "the adapter's oft for"),
        ("diff_of_another_size", "the adapter's update is (128, 64)"),
        ("text_alone", "all of its 2 keys are for a text encoder"),
    ],
)
def test_what_comfyui_would_leave_out_is_one_line_that_names_it(found: Found, name: str, told: str) -> None:
    said = found[name]["error"]
    assert told in said
    assert "\n" not in said
    assert "another size" not in said or "of_another_size" in name
    assert "it was made for" not in said or "of_another_size" in name
