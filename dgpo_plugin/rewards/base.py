"""What a reward is, several with their weights, and the check that every reward's output passes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from dgpo_plugin.common.errors import MOST_PROBLEMS, UserError, first_few, in_one_line, prefixed
from dgpo_plugin.common.others_code import others_code
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import is_from_file, told
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.config.short_forms import weighted_labels

USUAL_SCORING = ScoringConfig()
NOT_FINITE = "values are not finite"


class Reward:
    """Scores pictures; loaded once, called with whole batches. A subclass says how; what else it says is optional.

    Attributes:
        title: what it calls itself on the cards of adapters; empty for the name that it is loaded by.
        network: all its weights, for whoever manages a GPU's memory; None if it has none in this process.
        device: where the network runs; the next call brings it there.
    """

    title: str = ""
    network: nn.Module | None = None
    device: torch.device = torch.device("cpu")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores of pictures.

        Args:
            images: float32 (N, 3, H, W) in [0, 1].
            prompts: N.

        Returns:
            (N,), higher is better.
        """
        raise NotImplementedError

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """What keeps it from judging some of the prompts, a line for each; none if it can judge them all."""
        return []


def problems(prompts: Sequence[Prompt], read: Callable[[Prompt], object]) -> list[str]:
    """What a function says of the prompts that it refuses with a :class:`UserError`, for :meth:`Reward.check`."""
    found = []
    for prompt in prompts:
        try:
            read(prompt)
        except UserError as error:
            found.append(str(error))
        except Exception as error:  # of metadata that nobody thought of
            found.append(f"prompt {prompt.text!r} has metadata that cannot be read ({in_one_line(error)})")
    return found


class FunctionReward(Reward):
    """A plain function of (images, prompts), or another object that is called so, as a reward."""

    def __init__(self, function: Callable[[Tensor, Sequence[Prompt]], Any]) -> None:
        self.function = function

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        return self.function(images, prompts)


class WrappedReward(Reward):
    """A reward around another one, which answers everything that a subclass does not answer itself."""

    def __init__(self, inner: Reward) -> None:
        self.inner = inner
        self.title = inner.title
        self.network = inner.network

    @property
    def device(self) -> torch.device:
        """Where the inner reward's network runs."""
        return self.inner.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.inner.device = device

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.inner(images, prompts)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return self.inner.check(prompts)


def as_reward(reward: Reward | Callable[[Tensor, Sequence[Prompt]], Any]) -> Reward:
    """A plain function as a reward; what is one already stays what it is."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward)


def is_ours(reward: Reward) -> bool:
    """Whether a reward is this package's code, whatever is wrapped round it, and not a user's or another package's."""
    while isinstance(reward, WrappedReward):
        reward = reward.inner
    code = reward.function if isinstance(reward, FunctionReward) else reward
    return str(code.__module__).startswith("dgpo_plugin.")


@dataclass(frozen=True)
class WeightedReward:
    """A loaded reward of a run.

    Attributes:
        weight: what its scores are multiplied by in the sum.
        scoring: how it is computed.
        name: the registered one (or the file's), where the label is another; empty where it is the same.
    """

    reward: Reward
    weight: float = 1.0
    scoring: ScoringConfig = USUAL_SCORING
    name: str = ""


class RewardSet:
    """Several rewards with their weights.

    Args:
        members: by label, in their order.
        sha256: of the files of users' own rewards, as they were when they were loaded; empty if there are none.

    Attributes:
        names: the K labels.
        weights: float32 (K,).
    """

    def __init__(self, members: Mapping[str, WeightedReward], sha256: str = "") -> None:
        self.members = dict(members)
        self.sha256 = sha256
        self.names = tuple(self.members)
        self.weights = torch.tensor([member.weight for member in self.members.values()])

    @property
    def title(self) -> str:
        """For adapters' cards: what each reward calls itself, or is called, with the weights if there are several."""
        return weighted_labels((_title(label, member), member.weight) for label, member in self.members.items())

    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Every reward of every picture, without the weights.

        Args:
            pictures: float32 (N, 3, H, W) in [0, 1]; each reward gets a copy of its own.
            prompts: N.

        Returns:
            float32 (N, K) on the CPU, finite.

        Raises:
            UserError: a reward refuses, or gives what :func:`checked_rewards` refuses.
        """
        columns = [checked_rewards(m.reward, pictures, prompts, label) for label, m in self.members.items()]
        return torch.stack(columns, dim=1)

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum of scores (..., K), float32 (...)."""
        return (scores * self.weights.to(scores.device)).sum(-1)

    def check(self, prompts: Sequence[Prompt] | Mapping[str, Sequence[Prompt]]) -> None:
        """Ask every reward whether it can judge the prompts, before any picture is drawn.

        Args:
            prompts: of one set, or of several by their names, as in ``prompts.held_out``.

        Raises:
            UserError: names the prompts of all sets that any reward cannot judge, where they are written, and why.
        """
        sets = prompts if isinstance(prompts, Mapping) else {"": prompts}
        found = []
        for label, member in self.members.items():
            for name, each in sets.items():
                with prefixed(f"reward {label}"):
                    problems, count, others = _refused(member.reward, each)
                if problems:
                    of = f", {name} ({count} of {len(each)})" if name else ""
                    found.append(f"reward {label}{of}: {first_few(problems, 'prompts', count, others)}")
        if found:
            raise UserError("; ".join(found))


def _title(label: str, member: WeightedReward) -> str:
    """What a member of a set is called on a card."""
    named = f"{label} ({member.name})" if member.name not in ("", label) and not is_from_file(label) else label
    return member.reward.title or named


MOST_PLACES = 1000
"""Prompts that cannot be judged whose places are looked for: each is found by asking again, over a wire perhaps."""


def _refused(reward: Reward, prompts: Sequence[Prompt]) -> tuple[list[str], int, list[str]]:
    """What a reward says of the first few prompts that it cannot judge, with their places; their number; where the
    others are."""
    problems = _asked(reward, prompts)
    placed = any(prompt.place for prompt in prompts)
    lines: dict[str, str] = {}
    for prompt, problem in itertools.islice(_each_refused(reward, prompts, problems), MOST_PLACES):
        lines[f"{prompt.place}: {problem}" if prompt.place else problem] = prompt.place
        if len(lines) == MOST_PROBLEMS and not placed:
            break
    unique = list(dict.fromkeys(problems))
    others = dict.fromkeys(place for place in [*lines.values()][MOST_PROBLEMS:] if place)
    return [*lines][:MOST_PROBLEMS] or unique, len(problems) if placed else len(unique), [*others]


def _each_refused(reward: Reward, prompts: Sequence[Prompt], problems: Sequence[str]) -> Iterator[tuple[Prompt, str]]:
    """Which prompts the problems are of, found by asking about ever smaller parts of those that have any."""
    if len(prompts) == 1:
        yield from ((prompts[0], problem) for problem in problems)
    elif problems:
        middle = len(prompts) // 2
        for part in (prompts[:middle], prompts[middle:]):
            yield from _each_refused(reward, part, _asked(reward, part))


def _asked(reward: Reward, prompts: Sequence[Prompt]) -> list[str]:
    """What a reward's check says of prompts, each problem on one line."""
    try:
        with others_code():
            problems = reward.check(list(prompts))
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a user's reward raises
        raise UserError(f"its check(prompts) failed with {told(error)}") from error
    if not isinstance(problems, list | tuple) or not all(isinstance(problem, str) for problem in problems):
        raise UserError(
            f"its check(prompts) must return a list of lines, empty if it can judge all; it returned {problems!r:.100}"
        )
    return [" ".join(problem.split()) for problem in problems]


def called(
    reward: Reward, images: Tensor, prompts: Sequence[Prompt], given_up: threading.Event | None = None
) -> Tensor:
    """One number a picture, (N,), float32, on the CPU, finite or not; what the call leaves behind is put back.

    Args:
        images: float32 (N, 3, H, W) in [0, 1]; the reward gets a copy, and one of the prompts.
        given_up: set by whoever no longer waits; then nothing is put back.

    Raises:
        UserError: the reward refuses, or returns anything else, or changes torch's default dtype or device.
    """
    # Ours change nothing; and a new seed, for a moment, is everybody's.
    with contextlib.nullcontext() if is_ours(reward) else others_code(new_seed=True, given_up=given_up):
        returned = reward(images.clone(), own_copies(prompts))
    return as_scores(returned, len(images))


def as_scores(returned: Any, count: int) -> Tensor:
    """What a reward returned for so many pictures as (N,), float32, on the CPU, finite or not.

    Raises:
        UserError: it is not one number a picture.
    """
    values = returned if isinstance(returned, Tensor) else _as_tensor(returned, count)
    if values.shape != (count,):
        raise UserError(
            f"returned shape {tuple(values.shape)} for {count} images; "
            f"it must return one number for each image, shape ({count},)"
        )
    if values.is_complex():
        raise UserError("returned complex numbers; it must return real ones")
    return values.detach().to("cpu", torch.float32)


def _as_tensor(returned: Any, count: int) -> Tensor:
    """What a reward returned that is no tensor."""
    try:
        return torch.as_tensor(returned)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = "nothing (None)" if returned is None else f"an object of class {type(returned).__name__}"
        if isinstance(returned, tuple):
            kind = f"{len(returned)} things, as in (scores, info)"
        elif isinstance(returned, list) and (others := [e for e in returned if not isinstance(e, SupportsFloat)]):
            kind = f"a list with {others[0]!r:.60} in it"
        raise UserError(
            f"returned {kind}; it must return one number for each image, a tensor or list of {count}"
        ) from error


def own_copies(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts again, for code that may write into their metadata."""
    return [replace(prompt, metadata=copy.deepcopy(prompt.metadata)) for prompt in prompts]


def checked_rewards(reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str) -> Tensor:
    """Call a reward and refuse what no training should go on with.

    Args:
        images: float32 (N, 3, H, W) in [0, 1].
        name: for messages.

    Returns:
        float32 (N,), finite, on the CPU.

    Raises:
        UserError: the reward refuses, or gives not one number a picture, or any that is not finite.
    """
    with prefixed(f"reward {name}"):
        values = called(reward, images, prompts)
        refuse_not_finite(values, prompts)
    return values


def refuse_not_finite(values: Tensor, prompts: Sequence[Prompt], advice: str = "mend the reward") -> None:
    """Refuse a reward's values (N,) if any is not a number that can be trained on.

    Args:
        advice: how the message ends.

    Raises:
        UserError: says how many, and the first.
    """
    broken = ~values.isfinite()
    if broken.any():
        first = int(broken.nonzero()[0])
        raise UserError(
            f"{int(broken.sum())} of {len(values)} {NOT_FINITE} "
            f"(first: {values[first].item()} for prompt {prompts[first].text!r}); {advice}"
        )
