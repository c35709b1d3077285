"""How every run is measured: the same prompts and noise every time, so that differences come from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dgpo_plugin.adapters.load import apply_adapter
from dgpo_plugin.algorithms.forward import matching_error
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import seeded_noise
from dgpo_plugin.distributed.device import best_device
from dgpo_plugin.models import load_model
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.generate import BATCH_SIZE, fixed_noise, generate, sample_latents
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.prompts.registry import load_prompts

from .metrics import mean, picture_metrics, task_types
from .preset import EvaluationPlan, Preset, Size
from .results import Guided

DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3)
DRIFT_IMAGES = 32
NOISE_SEED = 1_000_003
"""Seed of the evaluation pictures' noise; no training seed draws from it."""


@dataclass(frozen=True)
class Evaluator:
    """The fixed prompts, noise and drift inputs of a comparison.

    Attributes:
        held_out, out_of_domain: a prompt for each picture.
        noise: where the sampler starts, a row per picture.
        encoded: the prompts' texts, encoded once.
        batch_size: images through the denoiser at once.
        drift_inputs: (sigma, noised latents, the base's velocity there) of its own pictures.
        drift_conditioning: for all of those.
    """

    plan: EvaluationPlan
    held_out: list[Prompt]
    out_of_domain: list[Prompt]
    noise: Tensor
    encoded: EncodedTexts
    batch_size: int
    drift_inputs: list[tuple[float, Tensor, Tensor]]
    drift_conditioning: Conditioning

    @property
    def tasks(self) -> list[str]:
        """Task types of the held-out prompts."""
        return task_types(self.held_out)

    def evaluations(self, guidance: float) -> int:
        """Denoiser evaluations of one measurement."""
        pictures = len(self.held_out) + len(self.out_of_domain)
        drift = sum(len(noisy) for _, noisy, _ in self.drift_inputs)
        return pictures * self.plan.steps * (1 if guidance == 1 else 2) + drift

    def measure(self, policy: Policy, weights: Mapping[str, Tensor], guidance: float | None = None) -> dict[str, float]:
        """All metrics of one copy of the adapter, sampled with ``guidance``; None for the plan's."""
        prompts = self.held_out + self.out_of_domain
        guidance = self.plan.guidance if guidance is None else guidance
        with policy.with_weights(weights):
            texts = [prompt.text for prompt in prompts]
            pictures = generate(
                policy.model, texts, self.noise, self.plan.steps, guidance, self.batch_size, self.encoded
            )
            drift = self._drift(policy)
        images = pictures.numpy()
        metrics = picture_metrics(images, self.held_out, self.out_of_domain, self.plan.images_per_prompt)
        return {**metrics, "drift": drift}

    def measure_guided(
        self,
        policy: Policy,
        weights: Mapping[str, Tensor],
        guidances: Iterable[float],
        known: Mapping[float, dict[str, float]],
    ) -> list[Guided]:
        """All metrics at each guidance, in the order given.

        Args:
            known: metrics that were measured already, by guidance.
        """
        return [
            Guided(
                guidance=guidance,
                metrics=known[guidance] if guidance in known else self.measure(policy, weights, guidance),
            )
            for guidance in guidances
        ]

    def _drift(self, policy: Policy) -> float:
        """The mean of (v_policy - v_base)^2 over the base's own pictures, noised; weights in place are the policy's."""
        errors = [
            matching_error(policy.model.velocity(noisy, sigma, self.drift_conditioning), base).mean().item()
            for sigma, noisy, base in self.drift_inputs
        ]
        return mean(errors)


def make_evaluator(plan: EvaluationPlan, size: Size, policy: Policy, batch_size: int = BATCH_SIZE) -> Evaluator:
    """Fix the inputs; runs the base once for the pictures that drift is measured on.

    Raises:
        UserError: a prompt set that is not there.
    """
    held_out = _slots(load_prompts(plan.held_out), size.prompts_per_task, plan.images_per_prompt)
    out_of_domain = _slots(load_prompts(plan.out_of_domain), size.out_of_domain_prompts, plan.images_per_prompt)
    model = policy.model
    encoded = EncodedTexts(model, ["", *(prompt.text for prompt in (*held_out, *out_of_domain))])
    noise = fixed_noise(model, range(len(held_out) + len(out_of_domain)), NOISE_SEED)
    texts = [prompt.text for prompt in held_out[:: max(1, len(held_out) // DRIFT_IMAGES)]][:DRIFT_IMAGES]
    conditioning = encoded[texts].on(model.device)
    with policy.as_reference():
        latents = sample_latents(model, texts, noise[: len(texts)], plan.steps, plan.guidance, batch_size, encoded)
        inputs = []
        for sigma in DRIFT_SIGMAS:
            drawn = seeded_noise(latents.shape, NOISE_SEED, "drift", str(sigma)).to(latents)
            noisy = (1 - sigma) * latents + sigma * drawn
            inputs.append((sigma, noisy, model.velocity(noisy, sigma, conditioning)))
    return Evaluator(plan, held_out, out_of_domain, noise, encoded, batch_size, inputs, conditioning)


def _slots(prompts: list[Prompt], per_task: int, images: int) -> list[Prompt]:
    """Choose for each task type ``per_task`` prompts spread over the set, each ``images`` times in a row."""
    slots = []
    for task in task_types(prompts):
        members = [prompt for prompt in prompts if prompt.metadata["task"] == task]
        spread = len(members) > per_task
        for slot in range(per_task):
            index = slot * len(members) // per_task if spread else slot % len(members)
            slots += [members[index]] * images
    return slots


def gallery_prompts(evaluator: Evaluator) -> list[Prompt]:
    """At most eight prompts for the report: held-out ones of every task type, and out-of-domain ones."""
    per_task = len(evaluator.held_out) // len(evaluator.tasks)
    firsts = evaluator.held_out[::per_task]
    seconds = evaluator.held_out[per_task - 1 :: per_task]
    outside = evaluator.out_of_domain[:: max(1, len(evaluator.out_of_domain) // 2)]
    unique = {prompt.text: prompt for prompt in [*firsts, *outside[:2], *reversed(seconds)]}
    return list(unique.values())[:8]


def evaluate_adapter(preset: Preset, adapter: Path | None, size: str, guidance: float | None) -> dict[str, float]:
    """All metrics of an adapter file on a preset's base, or of the base alone.

    Args:
        size: the preset's size whose prompts are taken.
        guidance: of the sampler; None for the preset's.

    Raises:
        UserError: no such size, or an adapter that is not one of this base.
    """
    chosen, config = preset.sized(size), preset.run_config(next(iter(preset.algorithms)), 0)
    # Not in half precision unless asked for: the same numbers on every processor.
    precise = config.model.model_copy(update={"precision": "fp32"} if config.model.precision == "auto" else {})
    base = Policy(load_model(precise, best_device()), config.lora, 0)
    evaluator = make_evaluator(preset.evaluation, chosen, base)
    policy = base
    if adapter is not None:
        model = load_model(precise, best_device())
        apply_adapter(model, adapter)
        # An untrained LoRA on top changes nothing.
        policy = Policy(model, config.lora, 0)
    return evaluator.measure(policy, policy.copy_weights(), guidance)
