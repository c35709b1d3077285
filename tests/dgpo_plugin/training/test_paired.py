"""Paired differences: means over prompts, clustered standard errors, pictures that lack a value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dgpo_plugin.training.paired import Difference, paired_difference

pytestmark = pytest.mark.fast


def test_the_error_is_that_of_prompts_and_not_of_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(40, 1, generator=generator)
    base = torch.rand(40, 6, generator=generator)
    found = paired_difference(base, base + prompts)  # all pictures of a prompt differ alike
    values = prompts[:, 0].double().numpy()
    assert math.isclose(found.mean, values.mean(), rel_tol=1e-5)
    assert math.isclose(found.error, values.std(ddof=1) / 40**0.5, rel_tol=1e-5)
    assert found.prompts == 40


def test_pairing_takes_out_what_prompt_and_noise_give_both() -> None:
    generator = torch.Generator().manual_seed(1)
    base = 100 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    found = paired_difference(base, base - 0.1 + 0.01 * torch.randn(20, 4, generator=generator, dtype=torch.float64))
    assert found.mean < -3 * found.error
    assert abs(found.mean + 0.1) < 0.01


def test_a_pair_that_lacks_a_value_is_left_out_and_so_is_a_prompt_without_any() -> None:
    base = torch.tensor([[1.0, 2.0], [3.0, math.nan], [math.nan, math.nan]])
    other = torch.tensor([[2.0, math.nan], [3.5, 9.0], [1.0, 1.0]])
    found = paired_difference(base, other)
    assert (found.mean, found.prompts) == (0.75, 2)
    assert math.isclose(found.error, 0.25)


@pytest.mark.parametrize(
    ("mean", "error", "rose", "fell"),
    [
        (-0.31, 0.1, False, True),
        (-0.29, 0.1, False, False),
        (0.01, 0.1, True, False),
        (0.0, 0.0, False, False),  # the base itself: every pair is the same
        (-0.5, 0.0, False, True),
    ],
)
def test_three_standard_errors_are_a_fall(mean: float, error: float, rose: bool, fell: bool) -> None:
    found = Difference(mean, error, 20)
    assert (found.rose, found.fell) == (rose, fell)


@pytest.mark.parametrize(("mean", "fell"), [(-0.9, False), (-1.1, True)])
def test_a_sure_fall_of_less_than_half_the_bases_spread_is_none(mean: float, fell: bool) -> None:
    base = 5 + 2 * torch.tensor([[1.0, -1.0]] * 200 + [[math.nan, 1.0]])
    found = paired_difference(base, base + mean)
    assert math.isclose(found.spread, 2.0, rel_tol=1e-2)
    assert found.error < 1e-6
    assert found.fell is fell


def test_the_distance_is_told_in_errors() -> None:
    assert Difference(-0.42, 0.1, 20).in_errors == "4.2 standard errors"
    assert Difference(-1.0, 0.0, 20).in_errors == "the same on every prompt"


def test_the_error_covers_as_often_as_a_standard_error_should() -> None:
    """Of means of 32 prompts, drawn 2,000 times around no difference, about 68 % lie within one error of 0."""
    draws = torch.randn(2000, 32, 2, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(32, 2)
    within = np.mean([abs(found.mean) < found.error for found in (paired_difference(zero, each) for each in draws)])
    assert 0.64 < within < 0.71
