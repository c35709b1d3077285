"""How far each algorithm's copies trail the policy after an iteration, in the papers' own numbers."""

from __future__ import annotations

import pytest
import torch

from dgpo_plugin.models.policy import Policy
from tests.dgpo_plugin.algorithm_cases import config_for, make_algorithm

pytestmark = pytest.mark.fast

OCR = ("algorithm.old_after=75", "algorithm.old_rate=0.0075", "algorithm.old_limit=0.999")


@pytest.mark.parametrize(
    ("name", "settings", "copy", "iteration", "steps", "kept"),
    [
        ("nft", (), "old", 0, 1, 0.001),
        ("nft", (), "old", 99, 100, 0.1),
        ("nft", (), "old", 899, 900, 0.5),
        ("nft", OCR, "old", 36, 74, 0.0),
        ("nft", OCR, "old", 37, 76, 0.0075),
        ("nft", OCR, "old", 499, 1000, 0.999),
        ("awm", (), "old", 0, 1, 0.001),
        ("awm", (), "old", 899, 900, 0.3),
        ("ram", (), "old", 0, 5, 0.01),
        ("ram", (), "old", 19, 5, 0.2),
        ("ram", (), "old", 899, 5, 0.9),
        ("crd", (), "old", 0, 2, 0.26),
        ("crd", (), "old", 499, 1000, 0.999),
        ("crd", (), "sampler", 36, 74, 0.0),
        ("crd", (), "sampler", 37, 76, 0.0075),
        ("crd", (), "sampler", 499, 1000, 0.999),
        ("elbo", (), "old", 899, 900, 0.0),
    ],
)
def test_a_copy_keeps_its_papers_share_of_itself(
    policy: Policy, name: str, settings: tuple[str, ...], copy: str, iteration: int, steps: int, kept: float
) -> None:
    """Copies that are 1 everywhere and a policy that is 0: what is left is the share."""
    algorithm = make_algorithm(config_for(name, *settings), policy)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.zero_()
    for tensor in algorithm.state()[copy].values():
        tensor.fill_(1.0)
    for step in range(steps - 2, steps):
        algorithm.after_step(step)
    algorithm.after_iteration(iteration, steps)
    for tensor in algorithm.state()[copy].values():
        assert torch.allclose(tensor, torch.full_like(tensor, kept), atol=1e-6)
