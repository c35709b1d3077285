"""The loop: prompt groups -> rollout -> rewards -> advantages -> gradient -> optimizer -> weight copies.

``Trainer.iterations()`` is a generator, so whoever drives it decides when to stop, log, evaluate or save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dgpo_plugin.algorithms.base import Algorithm, Judged, Random
from dgpo_plugin.algorithms.diffusion_dpo import ACCURACY, pair_signs
from dgpo_plugin.algorithms.rollout import Batch, Layout, Rollout, join, micro_batches
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed, seeded_globals
from dgpo_plugin.config.fields import RunConfig, TrainingConfig
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.base import Model
from dgpo_plugin.models.copies import move_towards
from dgpo_plugin.models.policy import Evaluations, Policy
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training.control import controlled
from dgpo_plugin.training.evaluation import HeldOut, gather_scores
from dgpo_plugin.training.guard import COPY, Guard
from dgpo_plugin.training.preferred_pairs import HeldOutPairs, PreferredPairs, as_rollout
from dgpo_plugin.training.prompt_groups import PromptGroups
from dgpo_plugin.training.unscored import HeldOutMean, refuse_too_many, reward_record


@dataclass
class Clock:
    """Seconds by part of the loop; CUDA work is waited for, so that a part is charged what it started."""

    parts: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0

    def start(self) -> None:
        """Begin anew."""
        self.parts = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Charge the time since the last lap to a part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now


@dataclass(eq=False)
class Trainer:
    """One training run; :func:`dgpo_plugin.training.build.build_trainer` makes it from a configuration.

    Attributes:
        config: the run's, its precision settled.
        policy: the model with its adapter.
        groups: what it is trained on.
        held_out: what it is measured on.
        pairs: preferred ones that it is trained on, instead of rollouts and rewards; None where it is not.
        held_out_pairs: those that it is measured on besides; None for none.
        guard: its alarm for reward hacking; None for none.
        features: pictures (N, 3, H, W) in [0, 1] to what its algorithm makes advantages with, (N, D); None for nothing.
        evaluation_weights: the averaged copy of the adapter; what is evaluated and exported is :meth:`average_now`.
        iteration: iterations done.
        steps: optimizer steps done.
    """

    config: RunConfig
    policy: Policy
    algorithm: Algorithm[Any, Any]
    scorer: Scorer
    groups: PromptGroups
    held_out: HeldOut
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    processes: Processes
    pairs: PreferredPairs | None = None
    held_out_pairs: HeldOutPairs | None = None
    guard: Guard | None = None
    features: Callable[[Tensor], Tensor] | None = None
    iteration: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        training, rollout = self.config.training, self.config.rollout
        self.evaluation_weights = self.policy.copy_weights()
        self._layout = Layout(training.prompts_per_iteration, training.group_size)
        self._sigmas = self.policy.model.sigmas(rollout.steps, rollout.shift, self.config.schedule)

    @property
    def model(self) -> Model:
        """The frozen base."""
        return self.policy.model

    @property
    def stopped(self) -> bool:
        """Whether an alarm has ended the run: what it leaves is the best of the guard's looks."""
        return self.guard is not None and self.guard.stopped

    @property
    def exported_steps(self) -> int:
        """Optimizer steps that the weights of :meth:`average_now` have had."""
        return self.guard.state.best_steps if self.guard is not None and self.guard.stopped else self.steps

    def iterations(self, share_done: Callable[[], float] | None = None) -> Iterator[dict[str, float]]:
        """Train on from where the run is, yielding one record an iteration (the line of ``metrics.jsonl``).

        Args:
            share_done: how much of the run is done, in [0, 1], if something else than its number of iterations says so:
                the learning rate follows it, and at 1 the run ends.
        """
        training, guard = self.config.training, self.guard

        def by_iterations() -> float:
            return self.iteration / training.iterations

        done = share_done or by_iterations
        if guard is not None:
            guard.measure_base()
        while done() < 1 and not self.stopped:
            for group in self.optimizer.param_groups:
                group["lr"] = training.rate_at(done())
            # Whatever draws from the global generators (a reward, dropout) draws the same in a resumed run.
            with seeded_globals(derive_seed(training.seed, self.iteration, "global") % 2**32):
                record = self.iterate(self.iteration)
            self.iteration += 1
            if self.held_out_pairs is not None and (self._draws_samples or done() >= 1):
                record |= self.held_out_pairs.measure(self.average_now())
            if guard is not None and guard.is_due(self.iteration):
                record |= guard.look(self.iteration, self.steps, self.average_now())
            yield record

    @property
    def _draws_samples(self) -> bool:
        """Whether there is a grid of sample pictures after the last iteration."""
        every = self.config.logging.sample_every
        return bool(every) and self.iteration % every == 0

    @property
    def quality(self) -> str:
        """The key of a record by which checkpoints are told apart: the higher, the better."""
        return "reward" if self.pairs is None else ACCURACY

    def iterate(self, iteration: int) -> dict[str, float]:
        """Do one iteration, numbered from 0, and return its record."""
        training, clock = self.config.training, Clock()
        clock.start()
        random = Random(training.seed, iteration)
        if self.groups.encode(iteration):
            clock.lap("encoding_seconds")
        with self.policy.counting() as every:
            with self.policy.counting() as sampling:
                if self.pairs is None:
                    rollout, advantages, judged, rewards = self._judged(iteration, random, clock)
                else:
                    rollout, advantages = self._preferred(self.pairs, iteration, clock)
                    judged, rewards = {}, {}
            logged = self._update(rollout, advantages, random)
            self.algorithm.after_iteration(iteration, self.steps)
        counts = self._summed(sampling, every)
        clock.lap("training_seconds")
        return {
            "iteration": iteration + 1,
            "optimizer_steps": self.steps,
            **judged,
            **logged,
            **{name: round(seconds, 4) for name, seconds in clock.parts.items()},
            **rewards,
            "seconds": round(sum(clock.parts.values()), 4),
            **counts,
        }

    def _judged(
        self, iteration: int, random: Random, clock: Clock
    ) -> tuple[Rollout, Tensor, dict[str, float], dict[str, float]]:
        """An iteration's rollout, the advantages (P, G) of all processes' samples, and what to log of its rewards."""
        training, layout, device = self.config.training, self._layout, self.accelerator.device
        rollout, futures, seen = self._sample(self.groups.draw(iteration), random, clock)
        scores = gather_scores(self.scorer, futures, rollout.sample_ids, layout.samples, self.processes, device)
        refuse_too_many(scores, self.scorer, iteration + 1, self.config.scoring.max_skipped, self.processes)
        scores = scores.view(layout.groups, layout.group_size, -1)
        features = None
        if seen is not None:
            seen = self.processes.assemble(seen, rollout.sample_ids, layout.samples)
            features = seen.view(layout.groups, layout.group_size, -1)
        clock.lap("reward_wait_seconds")
        weights = self.scorer.rewards.weights.to(scores)
        advantages = self.algorithm.advantages(Judged(scores, weights, self.config.scoring.aggregate, features))
        advantages = controlled(advantages, training.control, training.seed, iteration)
        seconds = {"reward_seconds": round(sum(future.result()[1] for future in futures), 4)}
        return rollout, advantages, reward_record(scores, self.scorer.rewards), seconds

    def _preferred(self, pairs: PreferredPairs, iteration: int, clock: Clock) -> tuple[Rollout, Tensor]:
        """An iteration's pairs in the place of a rollout, and which of each was chosen, (P, 2)."""
        drawn = [pairs.train[row] for row in self.groups.rows(iteration)]
        updates = self.config.training.updates_per_iteration
        rollout = as_rollout(drawn, self.model, self.groups, self.processes, self._sigmas, updates)
        clock.lap("picture_seconds")
        return rollout, pair_signs(len(drawn), self.accelerator.device)

    def _sample(
        self, prompts: list[Prompt], random: Random, clock: Clock
    ) -> tuple[Rollout, list[Future[tuple[Tensor, float]]], Tensor | None]:
        """This process's samples of an iteration, their scores to come, and their pictures' features, (N, D)."""
        layout, size = self._layout, self.config.training.micro_batch_size
        conditioning = self.groups.encoded[[prompt.text for prompt in prompts]].on(self.accelerator.device)
        sampled, futures, seen = list[Rollout](), [], list[Tensor]()
        share = layout.share(self.processes, self.config.training.updates_per_iteration)
        for sample_ids in micro_batches(share, size):
            group = layout.groups_of(sample_ids)
            batch = Batch(sample_ids, layout, conditioning[group], self._sigmas)
            sampled.append(self.algorithm.sample(batch, random))
            clock.lap("rollout_seconds")
            pictures = self.model.decode(sampled[-1].latents).cpu()
            futures.append(self.scorer.submit(pictures, [prompts[p] for p in group.tolist()]))
            clock.lap("decode_seconds")
            if self.features is not None:
                seen.append(self.features(pictures))
                clock.lap("features_seconds")
        return join(sampled), futures, torch.cat(seen) if seen else None

    def _update(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        """The iteration's optimizer steps; what the algorithm logs, a mean over the updates that logged it."""
        logs: dict[str, list[float]] = {}
        for epoch in range(self.config.training.inner_epochs):
            fresh = replace(random, epoch=epoch)
            for groups, samples in rollout.per_update(self.config.training.updates_per_iteration, epoch):
                with self.policy.updating():
                    logged = self.algorithm.gradient(samples, advantages[groups], fresh)
                logged["grad_norm"] = self.optimizer_step()
                for name, value in logged.items():
                    logs.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in logs.items()}

    def _summed(self, sampling: Evaluations, every: Evaluations) -> dict[str, float]:
        """All processes' denoiser evaluations."""
        counts = [sampling.total, every.kept, every.differentiated, every.total]
        counted = torch.tensor(counts, device=self.accelerator.device)
        names = ("rollout_evaluations", "kept_evaluations", "differentiated_evaluations", "denoiser_evaluations")
        return dict(zip(names, self.processes.sum(counted).tolist(), strict=True))

    def optimizer_step(self) -> float:
        """Clip the gradient, step, and refresh the weight copies; a gradient that is nothing at all is no step.

        Returns:
            The gradient's norm before it was clipped.

        Raises:
            UserError: the gradient is not finite.
        """
        parameters = list(self.policy.parameters.values())
        if self.processes.count > 1:
            self._sum_gradients()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # The largest entry of all of them, read once: a question to each parameter would wait for the device each time.
        if not grads or not bool(torch.nn.utils.get_total_norm(grads, float("inf"))):
            self.optimizer.zero_grad(set_to_none=True)
            return 0.0
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.training.max_grad_norm))
        finite = norm < float("inf")
        # In fp16 a scale that was too large is halved and the step left out, until there is nothing left to halve.
        if not finite and (scaler is None or scaler.get_scale() < 1):
            raise UserError(
                f"optimizer step {self.steps}: the gradient is not finite; lower training.learning_rate "
                f"or use model.precision fp32"
            )
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            return 0.0
        self.algorithm.after_step(self.steps)
        self.steps += 1
        kept = average_kept(self.config.training, self.steps)
        if kept < 1:
            move_towards(self.evaluation_weights, self.policy.parameters, kept)
        return norm

    def _sum_gradients(self) -> None:
        """Each process has the gradient of its samples' share of the global mean: the sum is the whole."""
        parameters = list(self.policy.parameters.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.processes.sum(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()

    def average_now(self) -> dict[str, Tensor]:
        """The evaluation weights as if a refresh were due now: what is evaluated and exported.

        It is a copy, which the run's state never sees. Without it a run of fewer steps than ``training.ema_every``
        would end as it began. Of a run that an alarm has ended they are those of the guard's best look.
        """
        if self.guard is not None and self.guard.stopped:
            return {name: tensor.clone() for name, tensor in self.guard.best.items()}
        average = {name: tensor.clone() for name, tensor in self.evaluation_weights.items()}
        if average_kept(self.config.training, self.steps) == 1 and self.steps:
            move_towards(average, self.policy.parameters, refresh_kept(self.config.training, self.steps))
        return average

    @property
    def is_judged(self) -> bool:
        """Whether there are rewards that judge the run's pictures; one that learns from pairs may have none."""
        return bool(self.scorer.rewards.members)

    def held_out_reward(self) -> HeldOutMean:
        """Mean reward of the evaluation's pictures under the evaluation weights, up to date.

        Raises:
            UserError: a reward failed, or there is none.
        """
        if not self.is_judged:
            raise UserError("no reward judges this run's pictures; name some under evaluation.rewards")
        return self.held_out.mean(self.average_now())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that changes in training: copies of the adapter and the optimizer's moments, by its parameters."""
        parameters = self.policy.parameters
        states = {name: self.optimizer.state.get(p, {}) for name, p in parameters.items()}
        moments = {
            f"optimizer.{moment}": {
                name: states[name].get(moment, torch.zeros(()) if moment == "step" else torch.zeros_like(p))
                for name, p in parameters.items()
            }
            for moment in ("step", "exp_avg", "exp_avg_sq")
        }
        weights = {name: p.detach() for name, p in parameters.items()}
        kept = {} if self.guard is None else self.guard.tensors()
        return {"policy": weights, "evaluation": self.evaluation_weights, **self.algorithm.state(), **moments, **kept}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Mapping[str, Tensor]], iteration: int, steps: int) -> None:
        """Become the run that ``state()`` was taken from."""
        for copy, tensors in self.state().items():
            if copy.startswith("optimizer.") or copy == COPY:  # the guard's is restored with what it remembers
                continue
            for name, tensor in tensors.items():
                tensor.copy_(state[copy][name])
        moments = {key.removeprefix("optimizer."): state[key] for key in state if key.startswith("optimizer.")}
        for name, parameter in self.policy.parameters.items():
            # A parameter without a step yet has no entry: AdamW makes one on the first.
            if moments["step"][name] > 0:
                self.optimizer.state[parameter] = {
                    moment: saved[name].clone().to(saved[name].device if moment == "step" else parameter.device)
                    for moment, saved in moments.items()
                }
        self.iteration, self.steps = iteration, steps
        self.algorithm.resume(steps)


def average_kept(training: TrainingConfig, steps: int) -> float:
    """The share of the evaluation weights' average that stays after optimizer step number ``steps`` (from 1)."""
    return 1.0 if (steps + 1) % training.ema_every else refresh_kept(training, steps)


def refresh_kept(training: TrainingConfig, steps: int) -> float:
    """The share of that average that a refresh after optimizer step number ``steps`` keeps."""
    # Warm-up: early averages must not be ruled by the untrained start.
    return min(training.ema_decay, (1 + steps) / (10 + steps)) ** training.ema_repeats
