"""Preferred pairs in a run: drawn by iteration, as a rollout would be, and held-out ones measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgpo_plugin.algorithms.base import Random
from dgpo_plugin.algorithms.diffusion_dpo import DiffusionDPO, ranked_right
from dgpo_plugin.algorithms.rollout import Layout, Rollout
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.learned_from import PAIR
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.base import Model
from dgpo_plugin.training.checks import picture_size
from dgpo_plugin.training.pair_files import Pair, overlap, read_fitted, read_pairs, stacked
from dgpo_plugin.training.prompt_groups import PromptGroups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferredPairs:
    """A run's pairs.

    Attributes:
        train: what is trained on.
        held_out: what accuracy is measured on; empty for nothing.
        called: what those are called; held-out only if none of them is trained on.
    """

    train: list[Pair]
    held_out: list[Pair]
    called: str = "held-out pairs"

    @property
    def prompts(self) -> list[Prompt]:
        """Those of the pairs that are trained on, one each."""
        return [pair.prompt for pair in self.train]

    @property
    def evaluated(self) -> list[Prompt]:
        """Prompts to draw pictures of, each once: of the held-out pairs, if there are any."""
        return list({pair.prompt.text: pair.prompt for pair in self.held_out or self.train}.values())


def preferred_pairs(config: RunConfig, processes: Processes) -> PreferredPairs | None:
    """A run's pairs, read on the first process, which says what is to be said of them; None where it has rewards.

    Raises:
        UserError: as :func:`~dgpo_plugin.training.pair_files.read_pairs`, of both sets.
    """
    if config.pairs is None:
        return None
    (width, height), pairs = picture_size(config.model), config.pairs

    def read() -> tuple[dict[str, list[Pair]], list[str]]:
        named = {"pairs.train": pairs.train, "pairs.held_out": pairs.held_out}
        found, lines, problems = {}, list[str](), list[str]()
        for key, source in named.items():
            try:
                found[key], told = read_pairs(source, width, height) if source else ([], [])
                lines += [f"{key}: {line}" for line in told]
            except UserError as error:
                problems.append(f"{key}: {error}")
        if problems:
            raise UserError("; ".join(problems))
        return found, lines

    found, lines = processes.decided_by_main(read)
    train, held_out = found["pairs.train"], found["pairs.held_out"]
    seen = overlap(train, held_out)
    if seen:
        lines.append(
            f"pairs.held_out: {len(seen)} of {len(held_out)} pairs are in pairs.train too (first: "
            f"{seen[0].prompt.place}), so what is measured on them is not called held-out"
        )
    for line in lines if processes.is_main else ():
        log.warning(line)
    return PreferredPairs(
        train, held_out, f"{len(held_out)} pairs, {len(seen)} trained on" if seen else "held-out pairs"
    )


def as_rollout(
    pairs: Sequence[Pair],
    model: Model,
    groups: PromptGroups,
    processes: Processes,
    sigmas: list[float],
    updates: int = 1,
) -> Rollout:
    """This process's pictures of some pairs in the place of samples, the chosen one first in each group of two.

    Raises:
        UserError: a picture cannot be read any more, or is another; on all processes.
    """
    layout = Layout(len(pairs), PAIR)
    ids = layout.share(processes, updates)
    problem, pictures = None, list[Tensor]()
    try:
        for group, number in layout.indices_of(ids):
            pair = pairs[group]
            file, expected = pair.files[number], pair.hashes[number]
            pictures.append(read_fitted(file, expected, pair.prompt.place, model.width, model.height))
    except UserError as error:
        problem = str(error)
    processes.fail_together(problem)
    latents = model.encode_images(stacked(pictures, model.width, model.height))
    conditioning = groups.encoded[[pair.prompt.text for pair in pairs]].on(model.device)
    return Rollout(ids, conditioning[layout.groups_of(ids)], latents, sigmas, layout)


@dataclass
class HeldOutPairs:
    """The held-out pairs, measured with the same noise and at the same flow times every time.

    Attributes:
        pairs: at least one.
        called: what they are, for people.
    """

    pairs: list[Pair]
    algorithm: DiffusionDPO
    groups: PromptGroups
    called: str
    _encoded: Rollout | None = field(default=None, init=False)

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracy and margin under a copy of the adapter, by their keys in metrics.jsonl."""
        policy, processes = self.algorithm.policy, self.algorithm.processes
        if self._encoded is None:
            self._encoded = as_rollout(self.pairs, policy.model, self.groups, processes, [1.0, 0.0])
        with policy.with_weights(weights):
            scores = self.algorithm.scores(self._encoded, Random(0, -1))
        accuracy, margin = torch.stack([ranked_right(scores).mean(), -scores.mean()]).tolist()
        return {"held_out_accuracy": accuracy, "held_out_margin": margin}

    def line(self, weights: Mapping[str, Tensor]) -> str:
        """For people, how many are ranked right under a copy of the adapter."""
        return f"accuracy on {self.called}: 0.500 -> {self.measure(weights)['held_out_accuracy']:.3f}"


def held_out_pairs(pairs: PreferredPairs | None, algorithm: object, groups: PromptGroups) -> HeldOutPairs | None:
    """The held-out pairs of a run, to be measured; None if it has none, or its algorithm has no score for pairs."""
    if pairs is None or not isinstance(algorithm, DiffusionDPO):
        return None
    # Processes that have to run the denoiser in step need as many each.
    step = algorithm.processes.count if algorithm.processes.lockstep else 1
    kept = pairs.held_out[: len(pairs.held_out) // step * step]
    return HeldOutPairs(kept, algorithm, groups, pairs.called) if kept else None
