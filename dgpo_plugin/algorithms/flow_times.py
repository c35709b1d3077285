"""The flow times that the forward-process algorithms train on: how each draws them, and which samples are there.

A rule is a function of the rollout's grid and of :class:`~dgpo_plugin.algorithms.base.Random`, so that neither the
number of processes nor the micro-batches have a say. Draws are one set an iteration, one a prompt group, or one an
image; whoever shares a flow time goes through the denoiser together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_plugin.algorithms.base import Random
from dgpo_plugin.algorithms.rollout import Layout


@dataclass(frozen=True)
class FlowTime:
    """A flow time and the samples that are trained on it.

    Attributes:
        number: what its noise is drawn by.
        sigma: in (0, 1].
        rows: of this process's samples, (n,), int64, on the CPU, rising; None for all of them.
        counts: 1 for each of those that is trained, 0 for one that only goes along, (n,); None if all are.
    """

    number: int
    sigma: float
    rows: Tensor | None = None
    counts: Tensor | None = None


def noisiest_steps(sigmas: Sequence[float], count: int, among: int, random: Random) -> list[FlowTime]:
    """``count`` of the ``among`` noisiest sampler steps, without replacement, one set an iteration."""
    return [FlowTime(step, sigmas[step]) for step in random.choose(count, among, "timesteps")]


def uniform_times(first: float, last: float, count: int, random: Random) -> list[FlowTime]:
    """``count`` times uniform between two, ``last`` the less noisy, one set an iteration."""
    drawn = random.uniform(count, "timesteps")
    return [FlowTime(number, first - u * (first - last)) for number, u in enumerate(drawn)]


def strata(first: int, last: int, count: int) -> list[range]:
    """The sampler steps from ``first`` to ``last``, both included, cut into ``count`` runs as even as can be.

    Run i goes from floor(i n / count) to floor((i + 1) n / count) of the n steps, as in AWM's released code: 1 to 11 in
    six is {1} {2, 3} {4, 5} {6, 7} {8, 9} {10, 11}.
    """
    steps = last - first + 1
    edges = [first + i * steps // count for i in range(count + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges)]


def one_of_each(sigmas: Sequence[float], runs: Sequence[range], random: Random) -> list[FlowTime]:
    """One sampler step of each run, one set an iteration."""
    steps = [run[random.choose(1, len(run), "timesteps", number)[0]] for number, run in enumerate(runs)]
    return [FlowTime(step, sigmas[step]) for step in steps]


def stratified_steps(sigmas: Sequence[float], count: int, among: int, random: Random) -> list[FlowTime]:
    """``count`` of the ``among`` noisiest sampler steps, one of each ``count``-th; if they are few, some come twice."""
    drawn = random.uniform(count, "timesteps")
    steps = [min(int((number + u) * among / count), among - 1) for number, u in enumerate(drawn)]
    return [FlowTime(number, sigmas[step]) for number, step in enumerate(steps)]


def own_steps(
    sigmas: Sequence[float], sample_ids: Tensor, layout: Layout, count: int, random: Random
) -> list[FlowTime]:
    """``count`` of the sampler's steps for each image by itself, without replacement."""
    steps = len(sigmas) - 1
    kept = [set(random.choose(count, steps, "timesteps", *index)) for index in layout.indices_of(sample_ids)]
    at = [[row for row, own in enumerate(kept) if step in own] for step in range(steps)]
    return [FlowTime(step, sigmas[step], torch.tensor(rows, dtype=torch.int64)) for step, rows in enumerate(at)]


def rounds_of(times: Sequence[FlowTime]) -> list[list[FlowTime]]:
    """Flow times of one number, which are those of a sample's pass each, together; numbers follow each other."""
    return [list(run) for _, run in itertools.groupby(times, key=lambda time: time.number)]


def everywhere(time: FlowTime, samples: int) -> FlowTime:
    """The same with all samples going along, for processes that have to run the denoiser equally often."""
    assert time.rows is not None
    return FlowTime(time.number, time.sigma, None, torch.zeros(samples).index_fill(0, time.rows, 1.0))


def noisy_times(sample_ids: Tensor, layout: Layout, count: int, random: Random) -> list[FlowTime]:
    """``count`` times with the density 2 s on (0, 1] for each prompt group: square roots of uniform numbers.

    One of each group after the other.
    """
    groups = layout.groups_of(sample_ids).tolist()
    rows = {group: torch.tensor([n for n, own in enumerate(groups) if own == group]) for group in sorted(set(groups))}
    drawn = {group: random.uniform(count, "timesteps", group) for group in rows}
    return [
        FlowTime(number, math.sqrt(1 - drawn[group][number]), its)
        for number in range(count)
        for group, its in rows.items()
    ]


def drawn_levels(
    levels: Sequence[float], layout: Layout, sample_ids: Tensor, count: int, random: Random, *, logit_normal: bool
) -> list[FlowTime]:
    """``count`` of a base's noise levels for each prompt group, drawn with replacement, the groups one after the other.

    Which level, of falling ones, is a number u in [0, 1): the sigmoid of a standard normal one, as Stable Diffusion 3
    was trained (arXiv 2403.03206, section 3.1) and diffusers' ``compute_density_for_timestep_sampling`` draws it, or
    uniform. All groups of the layout have theirs, with rows or without: processes then agree on how many there are.
    """
    groups = layout.groups_of(sample_ids).tolist()
    rows: dict[int, list[int]] = {group: [] for group in range(layout.groups)}
    for row, group in enumerate(groups):
        rows[group].append(row)

    def level(number: int, group: int) -> float:
        if logit_normal:
            u = float(torch.sigmoid(random.noise((), "timesteps", number, group).double()))
        else:
            (u,) = random.uniform(1, "timesteps", number, group)
        return levels[min(int(u * len(levels)), len(levels) - 1)]

    return [
        FlowTime(number, level(number, group), torch.tensor(rows[group], dtype=torch.int64))
        for number in range(count)
        for group in range(layout.groups)
    ]
