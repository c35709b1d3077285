"""accelerate's environment variables: none changes a run's numbers without a word."""

from __future__ import annotations

import pytest

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.training.build import build_trainer, refuse_environment
from tests.conftest import shapes_run

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ""),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "1"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    ],
)
def test_what_would_change_a_run_is_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}.*unset it"):
        build_trainer(shapes_run())


def test_what_accelerate_launch_sets_by_itself_is_none_of_it() -> None:
    usual = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}
    refuse_environment({**usual, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, "fp32")
    refuse_environment({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16")
    refuse_environment({"ACCELERATE_MIXED_PRECISION": "bf16"}, "auto")
