"""The loop: prompt groups -> rollout -> rewards -> advantages -> gradient -> optimizer -> weight copies.

``Trainer.iterations()`` is a generator, so whoever drives it decides when to stop, log, evaluate or save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from dgpo_plugin.algorithms import Draw, make_algorithm
from dgpo_plugin.algorithms.advantages import aggregate
from dgpo_plugin.algorithms.rollout import join, micro_batches
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.config.fields import RunConfig, TrainingConfig
from dgpo_plugin.distributed.device import runs_on_cpu
from dgpo_plugin.distributed.processes import Processes, join_processes
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import Model, refuse_seams
from dgpo_plugin.models.generate import decode_in_batches, fixed_noise, sample_latents
from dgpo_plugin.models.load import settled_model
from dgpo_plugin.models.memory import shard
from dgpo_plugin.models.policy import Policy, move_towards
from dgpo_plugin.models.speed import compile_blocks
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.prompts.order import draw_prompt_groups
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards import RewardSet, load_rewards
from dgpo_plugin.rewards.scorer import Scorer

TEXTS_AT_ONCE = 1024
"""Encoded texts in main memory (gigabytes with a T5 encoder); larger sets are encoded as the run comes to them."""


@dataclass
class Clock:
    """Seconds by part of the loop; CUDA work is waited for, so that a part is charged what it started."""

    parts: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0

    def start(self) -> None:
        self.parts = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now


class Trainer:
    """One training run.

    Attributes:
        config: the run's, its precision settled.
        policy: the model with its adapter.
        evaluation_weights: the averaged copy of the adapter that is evaluated and exported.
        iteration: iterations done.
        steps: optimizer steps done.
        rewards: what is to be raised.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        rewards: RewardSet | None = None,
        model: Model | None = None,
        failures: Path | None = None,
    ) -> None:
        training = config.training
        self.processes = replace(join_processes(), lockstep=config.model.shard)
        _check_layout(config, self.processes.count)
        half = config.model.precision == "fp16"
        if half and runs_on_cpu():
            raise UserError("model.precision fp16: needs a GPU; set it to bf16 or fp32")
        self.accelerator = Accelerator(mixed_precision="fp16" if half else "no", cpu=runs_on_cpu())
        self.prompts = load_prompts(config.prompts.train)
        self.held_out = load_prompts(config.prompts.held_out) if config.prompts.held_out else self.prompts
        self.rewards = load_rewards(config.rewards, config.scoring) if rewards is None else rewards
        self.scorer = Scorer(self.rewards, failures)
        self.config = config = settle_precision(config, self.accelerator.device, self.processes)
        self.model = model or load_model(config.model, self.accelerator.device, place=False)
        refuse_seams(self.model, config.model)
        # Before the denoiser takes its place: the text encoders may need all of the memory there is.
        self._encode_first()
        self.policy = Policy(self.model, config.lora, training.seed, self._encoded[[""]])
        if config.model.shard:
            shard(self.model.denoiser, self.policy.parameters, self.accelerator.device)
        else:
            self.model.place()
        if config.model.compile:
            compile_blocks(self.model.denoiser)
        self.algorithm = make_algorithm(config, self.policy)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.evaluation_weights = self.policy.copy_weights()
        self.iteration = 0
        self.steps = 0
        if training.gradient_checkpointing:
            self.model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def iterations(self, share_done: Callable[[], float] | None = None) -> Iterator[dict[str, float]]:
        """Train on from where the run is, yielding one record an iteration (the line of ``metrics.jsonl``).

        Args:
            share_done: how far the run is, in [0, 1], for the learning rate's decay; None counts iterations.
        """
        training = self.config.training
        while self.iteration < training.iterations:
            done = self.iteration / training.iterations if share_done is None else share_done()
            for group in self.optimizer.param_groups:
                group["lr"] = training.rate_at(done)
            record = self._iterate(self.iteration)
            self.iteration += 1
            yield record

    def _iterate(self, iteration: int) -> dict[str, float]:
        training, clock = self.config.training, Clock()
        clock.start()
        evaluations_before, differentiated_before = self.policy.denoiser_evaluations, self.policy.differentiated
        draw = Draw(training.seed, iteration)
        # Whatever draws from the global generators (a reward, dropout) draws the same in a resumed run.
        set_seed(derive_seed(training.seed, iteration, "global") % 2**32)
        groups, size = training.prompts_per_iteration, training.group_size
        rows = self._drawn(iteration)
        if self._encode_stretch(iteration):
            clock.lap("encoding_seconds")
        conditioning = self._encoded[[self.prompts[row].text for row in rows]].on(self.accelerator.device)
        sampled, futures = [], []
        for images in micro_batches(self.processes.share(training.images), training.micro_batch_size):
            part = self.algorithm.sample(self.policy, conditioning[images // size], images, size, draw)
            sampled.append(part)
            clock.lap("rollout_seconds")
            pictures = self.model.decode(part.latents).cpu()
            futures.append(self.scorer.submit(pictures, [self.prompts[rows[n // size]] for n in images.tolist()]))
            clock.lap("decode_seconds")
        rollout = join(sampled)
        rollout_evaluations = self.policy.denoiser_evaluations - evaluations_before
        parts = self._gather_rewards(futures, rollout.images, training.images).view(groups, size, -1)
        clock.lap("reward_wait_seconds")
        weights = self.rewards.weights.to(parts.device)
        advantages = aggregate(parts, weights, self.algorithm.advantage_std, self.config.scoring.aggregate)
        logs: dict[str, list[float]] = {}
        for chosen, part in rollout.split(groups, size, training.updates_per_iteration):
            logged = self.algorithm.accumulate_gradient(
                self.policy, part, advantages[chosen], draw, self.accelerator.backward, self.processes
            )
            logged["grad_norm"] = self._step()
            for name, value in logged.items():
                logs.setdefault(name, []).append(value)
        # A mean over the updates that logged it.
        record = {name: sum(values) / len(values) for name, values in logs.items()}
        evaluations = self.policy.denoiser_evaluations - evaluations_before
        counted = [rollout_evaluations, self.policy.differentiated - differentiated_before, evaluations]
        counts = self.processes.sum(torch.tensor(counted, device=parts.device)).tolist()
        clock.lap("training_seconds")
        return {
            "iteration": iteration + 1,
            "optimizer_steps": self.steps,
            **self._reward_record(parts),
            **record,
            **{name: round(seconds, 4) for name, seconds in clock.parts.items()},
            "reward_seconds": round(sum(future.result()[1] for future in futures), 4),
            "seconds": round(sum(clock.parts.values()), 4),
            "rollout_evaluations": counts[0],
            "differentiated_evaluations": counts[1],
            "denoiser_evaluations": counts[2],
        }

    def _drawn(self, iteration: int) -> list[int]:
        """Which prompts an iteration's groups are of, (P,)."""
        training = self.config.training
        return draw_prompt_groups(len(self.prompts), training.prompts_per_iteration, iteration, training.seed)

    def _encode_first(self) -> None:
        """Encode all texts of the run if they are few, else those that it evaluates on."""
        config = self.config
        shown = self.held_out[: max(config.evaluation.images, config.logging.sample_images)]
        self._always = ["", *(prompt.text for prompt in shown)]
        every = {"", *(prompt.text for prompt in (*self.prompts, *self.held_out))}
        self._stretch = None if len(every) <= TEXTS_AT_ONCE else -1
        self._encoded = EncodedTexts(self.model, self._always if self._stretch else sorted(every))

    def _encode_stretch(self, iteration: int) -> bool:
        """Encode what the iteration's stretch of the run draws, unless that is done.

        Stretches begin at fixed iterations, so that a resumed run encodes the same texts together, to the same bits.
        """
        if self._stretch is None:
            return False
        length = max(1, TEXTS_AT_ONCE // self.config.training.prompts_per_iteration)
        if iteration // length == self._stretch:
            return False
        self._stretch = iteration // length
        rows = {row for n in range(length) for row in self._drawn(self._stretch * length + n)}
        self._encoded = EncodedTexts(self.model, [*self._always, *(self.prompts[row].text for row in rows)])
        return True

    def _reward_record(self, parts: Tensor) -> dict[str, float]:
        """What to log of an iteration's rewards (P, G, K): their weighted sum, and each of several by itself."""
        columns = {"": self.rewards.total(parts)}
        if len(self.rewards.names) > 1:
            columns |= {f"/{name}": part for name, part in zip(self.rewards.names, parts.unbind(2), strict=True)}
        record: dict[str, float] = {}
        for name, rewards in columns.items():
            record[f"reward{name}"] = rewards.mean().item()
            record[f"reward_group_std{name}"] = rewards.std(1, correction=0).mean().item()
            record[f"constant_groups{name}"] = (rewards == rewards[:, :1]).all(1).float().mean().item()
        return record

    def _gather_rewards(self, futures: Sequence[Future[tuple[Tensor, float]]], places: Tensor, total: int) -> Tensor:
        """(total, K), every process's at their places; a reward that failed anywhere ends them all."""
        problem: str | None = None
        values = torch.zeros(len(places), len(self.rewards.names))
        try:
            if futures:
                values = torch.cat([future.result()[0] for future in futures])
        except UserError as error:
            problem = str(error)
        self.processes.fail_together(problem)
        return self.processes.assemble(values.to(self.accelerator.device), places, total)

    def _step(self) -> float:
        """Clip, step, and refresh the weight copies; an update whose gradient is nothing at all is no step."""
        parameters = self.policy.parameters
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
        self.algorithm.after_step(self.policy, self.steps)
        self.steps += 1
        kept = average_kept(self.config.training, self.steps)
        if kept < 1:
            move_towards(self.evaluation_weights, self.policy.parameters, kept)
        return norm

    def _sum_gradients(self) -> None:
        """Each process has the gradient of its images' share of the global mean: the sum is the whole."""
        parameters = self.policy.parameters
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.processes.sum(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def sample(self, prompts: Sequence[Prompt], seed: int) -> Tensor:
        """Pictures under the evaluation weights, from fixed noises, (N, 3, H, W) in [0, 1], on every process."""
        pictures, places = self._sample_share(prompts, seed)
        if self.processes.count == 1:
            return pictures
        return self.processes.assemble(pictures.to(self.accelerator.device), places, len(prompts)).cpu()

    def _sample_share(self, prompts: Sequence[Prompt], seed: int) -> tuple[Tensor, Tensor]:
        """This process's pictures of them, on the CPU, and which they are."""
        evaluation = self.config.evaluation
        # Shares of equal size, because a sharded base needs every process in every forward; what is beyond the last
        # prompt repeats it and is thrown away.
        share = self.processes.share(-(-len(prompts) // self.processes.count) * self.processes.count)
        texts = [prompts[min(n, len(prompts) - 1)].text for n in share.tolist()]
        noise = fixed_noise(self.model, share.tolist(), seed)
        size = self.config.training.micro_batch_size or 256
        with self.policy.with_weights(self.evaluation_weights):
            latents = sample_latents(
                self.model, texts, noise, evaluation.steps, evaluation.guidance, size, self._encoded
            )
        pictures = decode_in_batches(self.model.decode, latents, size)
        own = share < len(prompts)
        return pictures[own], share[own]

    def held_out_reward(self) -> float:
        """Mean reward of ``evaluation.images`` pictures of the held-out prompts under the evaluation weights."""
        count = self.config.evaluation.images
        prompts = [self.held_out[index % len(self.held_out)] for index in range(count)]
        pictures, places = self._sample_share(prompts, seed=0)
        asked = [prompts[n] for n in places.tolist()]
        futures = [self.scorer.submit(pictures, asked)] if asked else []
        parts = self._gather_rewards(futures, places, count)
        return self.rewards.total(parts).mean().item()

    def state(self) -> dict[str, list[Tensor]]:
        """Everything that changes in training, by name, each a tensor a parameter of the adapter."""
        parameters = self.policy.parameters
        states = [self.optimizer.state.get(p, {}) for p in parameters]
        moments = {
            f"optimizer.{name}": [
                state.get(name, torch.zeros(()) if name == "step" else torch.zeros_like(p))
                for state, p in zip(states, parameters, strict=True)
            ]
            for name in ("step", "exp_avg", "exp_avg_sq")
        }
        weights = [p.detach() for p in parameters]
        return {"policy": weights, "evaluation": self.evaluation_weights, **self.algorithm.state(), **moments}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Sequence[Tensor]], iteration: int, steps: int) -> None:
        """Become the run that ``state()`` was taken from."""
        for name, tensors in self.state().items():
            if name.startswith("optimizer."):
                continue
            for ours, saved in zip(tensors, state[name], strict=True):
                ours.copy_(saved)
        moments = {name.removeprefix("optimizer."): state[name] for name in state if name.startswith("optimizer.")}
        for index, parameter in enumerate(self.policy.parameters):
            # A parameter without a step yet has no entry: AdamW makes one on the first.
            if moments["step"][index] > 0:
                self.optimizer.state[parameter] = {
                    name: tensors[index].clone().to(tensors[index].device if name == "step" else parameter.device)
                    for name, tensors in moments.items()
                }
        self.iteration, self.steps = iteration, steps
        self.algorithm.resume(steps)


def settle_precision(
    config: RunConfig, device: torch.device, processes: Processes, threads: int | None = None
) -> RunConfig:
    """With the precision that ``auto`` stands for here, decided on the first process, and found to work on all.

    Args:
        threads: that will compute; None for this process's.

    Raises:
        UserError: bf16 by name, where it does not work.
    """
    share = -(-config.training.images // processes.count)
    images = min(config.training.micro_batch_size or share, share)
    model = processes.decided_by_main(lambda: settled_model(config.model, device, images, threads))
    problem: str | None = None
    try:
        settled_model(model, device, images, threads)
    except UserError as error:
        problem = str(error)
    processes.fail_together(problem)
    return config.model_copy(update={"model": model})


def average_kept(training: TrainingConfig, steps: int) -> float:
    """The share of the evaluation weights' average that stays after optimizer step number ``steps`` (from 1)."""
    if (steps + 1) % training.ema_every:
        return 1.0
    # Warm-up: early averages must not be ruled by the untrained start.
    return min(training.ema_decay, (1 + steps) / (10 + steps)) ** training.ema_repeats


def _check_layout(config: RunConfig, processes: int) -> None:
    """Refuse what cannot be split, rather than adjust it."""
    training = config.training
    if processes > training.images:
        raise UserError(
            f"{processes} processes for {training.prompts_per_iteration} x {training.group_size} images an iteration; "
            f"start at most {training.images} or raise training.prompts_per_iteration"
        )
    if not config.model.shard:
        return
    if config.model.quantization is not None:
        raise UserError("model.shard: cannot split a quantized base; set model.quantization to null")
    if training.group_size % processes:
        raise UserError(
            f"model.shard: training.group_size {training.group_size} must be a multiple of the {processes} processes, "
            f"which have to run the denoiser in step"
        )
