"""An alarm for reward hacking: the adapter held against its base on validation prompts while a run goes on.

One look draws the same prompts from the same noise as the base did, compares reward, sharpness, diversity and metrics
that are not trained on, and raises the alarm where one of these has fallen at two looks in a row, the reward being up.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed, seeded_globals
from dgpo_plugin.config.fields import GuardConfig
from dgpo_plugin.models.generate import fixed_noise, generate
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.rewards.image_statistics import group_diversity, sharpness
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training.evaluation import HeldOut, gather_scores, trained_on
from dgpo_plugin.training.paired import Difference, paired_difference

GUARD_SEED = 100
"""Of the pictures' noise: what is chosen on validation prompts has seeds from 100 on."""
LEAST_PROMPTS = 8
"""That a mean must be over: with fewer, three standard errors come by chance."""
REWARD = "reward"
COPY = "guard"
"""What the copy of the adapter from the best look is called in a checkpoint."""


class Alarm(BaseModel):
    """Something that had fallen at two looks in a row while the reward was up.

    Attributes:
        iteration, since: of the second look, and of the first.
        name: what fell.
        told: by how much, and the reward's rise, for people.
        best: the iteration of the best look until then; 0 for the base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iteration: int
    since: int
    name: str
    told: str
    best: int

    def __str__(self) -> str:
        return f"after iteration {self.iteration}: {self.told}, and both after iteration {self.since} too"


class GuardState(BaseModel):
    """What a guard remembers from look to look, saved with a checkpoint.

    Attributes:
        look: the iteration of the last one.
        fallen: what had fallen then while the reward was up.
        best, best_steps: iteration and optimizer steps of the best look; 0 for the base.
        best_gain: its mean reward above the base's.
        alarms: all that were raised, each name once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    look: int = 0
    fallen: tuple[str, ...] = ()
    best: int = 0
    best_steps: int = 0
    best_gain: float = 0.0
    alarms: tuple[Alarm, ...] = ()


def after_look(
    state: GuardState, iteration: int, steps: int, reward: Difference, others: Mapping[str, Difference]
) -> GuardState:
    """What is remembered after a look; an alarm is raised for what had fallen at the one before too.

    Args:
        iteration, steps: done by then.
        reward: of what is trained on.
        others: of everything that is watched, by name, higher being better.
    """
    all_fallen = [name for name, difference in others.items() if difference.fell]
    fallen = tuple(all_fallen) if reward.rose else ()
    told = {alarm.name for alarm in state.alarms}
    best = (state.best, state.best_steps, state.best_gain)
    if not all_fallen and reward.mean > state.best_gain:
        best = (iteration, steps, reward.mean)
    alarms = tuple(
        Alarm(
            iteration=iteration,
            since=state.look,
            name=name,
            told=f"{name} fell by {-others[name].mean:.3g} ({others[name].in_errors}) while {REWARD} rose by "
            f"{reward.mean:.3g} ({reward.in_errors})",
            best=best[0],
        )
        for name in fallen
        if name in state.fallen and name not in told
    )
    return GuardState(
        look=iteration,
        fallen=fallen,
        best=best[0],
        best_steps=best[1],
        best_gain=best[2],
        alarms=(*state.alarms, *alarms),
    )


def guard_prompts(train: Sequence[Prompt], held_out: Sequence[Prompt], setting: GuardConfig) -> list[Prompt]:
    """The validation prompts that a guard looks at: none that is trained on, evenly spread over the others.

    Raises:
        UserError: too few.
    """
    seen = {id(prompt) for prompt in trained_on(train, held_out)}
    unseen = [prompt for prompt in held_out if id(prompt) not in seen]
    if len(unseen) < LEAST_PROMPTS:
        raise UserError(
            f"training.guard: {len(unseen)} of the {len(held_out)} prompts of prompts.held_out are not trained on, and "
            f"it needs {LEAST_PROMPTS} at least; name more, or leave the guard out"
        )
    count = min(setting.prompts, len(unseen))
    return [unseen[n * len(unseen) // count] for n in range(count)]


@dataclass(eq=False)
class Guard:
    """The alarm of one run; :func:`dgpo_plugin.training.build.build_trainer` makes it.

    Attributes:
        held_out: what the run is measured on, and how: policy, rewards, steps and guidance.
        metrics: scores what is not trained on.
        prompts: P, as :func:`guard_prompts` has chosen them.
        encoded: their texts and the empty one; encoded apart from the run's, whose bits they must not change.
        seed: the run's.
        state: what was seen so far.
        best: the adapter of the best look, kept where an alarm stops the run; else empty.
    """

    setting: GuardConfig
    held_out: HeldOut
    metrics: Scorer
    prompts: list[Prompt]
    encoded: EncodedTexts
    seed: int
    state: GuardState = field(default_factory=GuardState)
    best: dict[str, Tensor] = field(default_factory=dict)
    _base: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.setting.stop:
            self.best = self.held_out.policy.copy_weights()  # without a step yet: the base

    @property
    def stopped(self) -> bool:
        """Whether the run ends here."""
        return self.setting.stop and bool(self.state.alarms)

    def is_due(self, iteration: int) -> bool:
        """Whether to look after so many iterations."""
        return iteration % self.setting.every == 0

    @property
    def new_alarms(self) -> list[Alarm]:
        """Those of the last look."""
        return [alarm for alarm in self.state.alarms if alarm.iteration == self.state.look]

    @property
    def alarms_told(self) -> str:
        """All alarms that were raised, for people; empty for none."""
        return "; ".join(str(alarm) for alarm in self.state.alarms)

    @property
    def told(self) -> str:
        """What an adapter's header says of it: the alarms, and whether they ended the run; empty for none."""
        return stopped_line(self) if self.stopped else self.alarms_told

    def measure_base(self) -> None:
        """Draw and score the base's pictures, unless that is done or the run has ended.

        Raises:
            UserError: as :meth:`look`.
        """
        if not self._base and not self.stopped:
            self._base = self._measured(0, None)

    def look(self, iteration: int, steps: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Look at a copy of the adapter, and remember what was seen.

        Returns:
            What the iteration's line of ``metrics.jsonl`` gets besides.

        Raises:
            UserError: a metric failed, or could score the pictures of too few prompts.
        """
        started = time.perf_counter()
        self.measure_base()
        now = self._measured(iteration, weights)
        found = {name: paired_difference(self._base[name], now[name]) for name in self._base}
        self._refuse_too_few(found)
        others = {name: difference for name, difference in found.items() if name != REWARD}
        self.state = after_look(self.state, iteration, steps, found[REWARD], others)
        if self.best and self.state.best == iteration:
            self.best = {name: tensor.clone() for name, tensor in weights.items()}
        return {
            **{f"guard/{name}": difference.mean for name, difference in found.items()},
            **{f"guard_error/{name}": difference.error for name, difference in found.items()},
            "guard_alarm": float(bool(self.new_alarms)),
            "guard_seconds": round(time.perf_counter() - started, 4),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of it beside :attr:`state`."""
        return {COPY: self.best} if self.best else {}

    def restore(self, state: GuardState, best: Mapping[str, Tensor]) -> None:
        """Become the guard of a checkpoint; one that has no copy of the best look has only the base to go back to."""
        self.state = state
        if not self.best:
            return
        if best:
            self.best = {name: best[name].clone().to(tensor) for name, tensor in self.best.items()}
        else:
            self.state = state.model_copy(update={"best": 0, "best_steps": 0, "best_gain": 0.0})

    def _measured(self, iteration: int, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Everything that is watched, and the reward, of each picture, (P, I), or of each prompt, (P, 1).

        Args:
            weights: a copy of the adapter; None for the base.
        """
        count, images, device = len(self.prompts), self.setting.images, self.held_out.policy.device
        scorer, processes = self.held_out.scorer, self.held_out.processes
        # Whole prompts, between whose pictures diversity is.
        drawn, kept = processes.even_share(count)
        own = torch.tensor(drawn[:kept], dtype=torch.int64)
        positions = (own[:, None] * images + torch.arange(images)).flatten()
        # Whatever draws from the global generators (a metric) draws the same in a resumed run.
        with seeded_globals(derive_seed(self.seed, iteration, "guard") % 2**32):
            pictures = self._pictures(drawn, weights)[: len(positions)]
            reward = scorer.rewards.total(self._scores(scorer, pictures, positions))
            others = self._scores(self.metrics, pictures, positions) * self.metrics.rewards.weights.to(device)
        values = {REWARD: reward, **dict(zip(self.metrics.rewards.names, others.unbind(1), strict=True))}
        found = {name: column.view(count, images).cpu() for name, column in values.items()}
        trained = {member.name or label for label, member in scorer.rewards.members.items()}
        if "sharpness" not in trained:
            sharp = torch.from_numpy(sharpness(pictures.numpy())).float().to(device)
            found["sharpness"] = processes.assemble(sharp, positions, count * images).view(count, images).cpu()
        apart = group_diversity(pictures.reshape(-1, images, *pictures.shape[1:])).float().to(device)
        found["diversity"] = processes.assemble(apart, own, count)[:, None].cpu()
        return found

    def _pictures(self, prompts: Sequence[int], weights: Mapping[str, Tensor] | None) -> Tensor:
        """Pictures of the numbered prompts, those of one in a row, (n * I, 3, H, W) in [0, 1], on the CPU."""
        images, policy, setting = self.setting.images, self.held_out.policy, self.held_out.setting
        texts = [self.prompts[prompt].text for prompt in prompts for _ in range(images)]
        noise = fixed_noise(
            policy.model, [prompt * images + n for prompt in prompts for n in range(images)], GUARD_SEED
        )
        size = self.held_out.batch_size
        with policy.as_reference() if weights is None else policy.with_weights(weights):
            return generate(policy.model, texts, noise, setting.steps, setting.guidance, size, self.encoded)

    def _scores(self, scorer: Scorer, pictures: Tensor, positions: Tensor) -> Tensor:
        """All processes' scores, (P * I, K), NaN where a picture could not be scored."""
        total, device = len(self.prompts) * self.setting.images, self.held_out.policy.device
        if not scorer.rewards.names:
            return torch.zeros(total, 0, device=device)
        asked = [self.prompts[position // self.setting.images] for position in positions.tolist()]
        size = self.held_out.batch_size
        futures = [
            scorer.submit(pictures[start : start + size], asked[start : start + size])
            for start in range(0, len(asked), size)
        ]
        with prefixed("training.guard") if scorer is self.metrics else contextlib.nullcontext():
            scores = gather_scores(scorer, futures, positions, total, self.held_out.processes, device)
        scorer.say_unscored()  # or the next iteration would tell of them as its own
        return scores

    def _refuse_too_few(self, found: Mapping[str, Difference]) -> None:
        for name, difference in found.items():
            if difference.prompts < LEAST_PROMPTS or not math.isfinite(difference.mean):
                raise UserError(
                    f"training.guard: {name} could score the pictures of {difference.prompts} of {len(self.prompts)} "
                    f"prompts alone, and {LEAST_PROMPTS} are needed; mend it, or leave it out"
                )


def without_copy(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """A run's state without the guard's copy, which a run may do without."""
    return {copy: tensors for copy, tensors in state.items() if copy != COPY}


def guard_lines(guard: Guard | None, iteration: int) -> list[str]:
    """What is said of an iteration that a guard has looked at: a line for each alarm."""
    if guard is None or guard.state.look != iteration:
        return []
    return [f"  alarm, training.guard: {alarm}" for alarm in guard.new_alarms]


def stopped_line(guard: Guard) -> str:
    """What is said of a run that its guard has ended: when, why, and what its adapter is."""
    best = guard.state.best
    where = f"that of iteration {best}" if best else "iteration 0, the base itself, for no look was sound and above it"
    return f"stopped by training.guard {guard.alarms_told}; exported from the best checkpoint, {where}"
