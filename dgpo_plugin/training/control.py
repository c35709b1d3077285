"""Runs that are told something else than the reward: what a comparison needs beside its methods."""

from __future__ import annotations

import torch
from torch import Tensor

from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.config.fields import Control


def controlled(advantages: Tensor, control: Control | None, seed: int, iteration: int) -> Tensor:
    """Advantages (P, G) as an algorithm gets them under a control; None leaves them as they are.

    ``zero`` makes all of them 0, so that only what an algorithm adds to the reward (a KL term) trains. ``shuffled``
    deals each group's advantages out to its pictures by a permutation of the run's seed and the iteration: as large,
    and of nothing. ``best`` gives the first of each group's highest 1 and all others 0: DGPO then lowers the matching
    error of that picture alone, weighted by its sigmoid (with ``beta`` near 0 by a half: plain fine-tuning on the
    best), and a policy gradient raises the likelihood of how it was sampled. A group without a preference stays
    without one.
    """
    if control is None:
        return advantages
    if control == "zero":
        return torch.zeros_like(advantages)
    if control == "best":
        chosen = torch.zeros_like(advantages).scatter(1, advantages.argmax(1, keepdim=True), 1.0)
        return torch.where((advantages == 0).all(1, keepdim=True), torch.zeros_like(advantages), chosen)
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, "control"))
    drawn = torch.rand(advantages.shape, generator=generator, dtype=torch.float64).argsort(1)
    return advantages.gather(1, drawn.to(advantages.device))
