"""What every run is judged by: the verifier on held-out and out-of-domain prompts, and the statistics that expose
reward hacking. The same prompts and noise every time, so that differences come from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dgpo_plugin.algorithms.dgpo import matching_error
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import seeded_noise
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.generate import decode_in_batches, fixed_noise, sample_latents
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards.image_statistics import brightness, color_entropy, diversity, jpeg_size, sharpness
from dgpo_plugin.worlds.shapes.render import BACKGROUND, PALETTE
from dgpo_plugin.worlds.shapes.verify import Verdict, verify

from .preset import EvaluationPlan, Size
from .results import Guided, Metric

PRIMARY = "accuracy"
DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3)
DRIFT_IMAGES = 32
NOISE_SEED = 1_000_003
"""Of the evaluation pictures; no training seed draws from it."""


def metric_definitions(tasks: Sequence[str]) -> dict[str, Metric]:
    """Every metric name of an evaluation, in the order of the report."""
    named = {
        "accuracy": Metric(
            label="Held-out accuracy",
            domain="in",
            better="higher",
            description="Strict verifier, prompts never trained on: exactly what was asked for; mean over task types.",
        ),
        "partial_credit": Metric(
            label="Held-out partial credit",
            domain="in",
            better="higher",
            description="The share of what was asked for, on the same pictures; with accuracy the training reward.",
        ),
    }
    for task in tasks:
        label = task.replace("_", " ")
        named[f"accuracy_{task}"] = Metric(
            label=f"Accuracy, {label}", domain="in", better="higher", description=f"Strict, task type {label} alone."
        )
    out: list[tuple[str, str, str, str]] = [
        ("ood_accuracy", "Out-of-domain accuracy", "higher", "Strict, on a whole task type that is never trained on."),
        ("ood_partial_credit", "Out-of-domain partial credit", "higher", "Partial credit on that task type."),
        ("palette_error", "Palette error", "lower", "Mean RGB distance of coloured pixels to the nearest pure colour."),
        (
            "diversity",
            "Diversity",
            "none",
            "Mean pixel RMS distance between pictures of one prompt; a fall is collapse.",
        ),
        ("sharpness", "Sharpness", "none", "Standard deviation of the Laplacian of the brightness; a fall is blur."),
        ("colour_entropy", "Colour entropy", "none", "Bits of an 8x8x8 RGB histogram; a fall is a poorer picture."),
        ("brightness", "Brightness", "none", "Mean of all channels; it should stay where the base has it."),
        ("jpeg_size", "JPEG size", "none", "Kilobytes as JPEG of quality 95; a fall is less detail, a rise is noise."),
        (
            "drift",
            "Drift from the base",
            "lower",
            "Mean squared velocity difference from the base on its own pictures.",
        ),
    ]
    for name, label, better, description in out:
        named[name] = Metric(label=label, domain="out", better=better, description=description)
    return named


@dataclass(frozen=True)
class Evaluator:
    """The fixed prompts, noise and drift inputs of a comparison.

    Attributes:
        encoded: the prompts' texts, encoded once.
        batch_size: images through the denoiser at once.
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
        return list(dict.fromkeys(prompt.metadata["task"] for prompt in self.held_out))

    def evaluations(self, guidance: float) -> int:
        """Denoiser evaluations of one measurement."""
        pictures = len(self.held_out) + len(self.out_of_domain)
        drift = sum(len(noisy) for _, noisy, _ in self.drift_inputs)
        return pictures * self.plan.steps * (1 if guidance == 1 else 2) + drift

    def measure(self, policy: Policy, weights: Sequence[Tensor], guidance: float | None = None) -> dict[str, float]:
        """All metrics of one copy of the adapter, sampled with ``guidance``; None for the plan's."""
        prompts = self.held_out + self.out_of_domain
        guidance = self.plan.guidance if guidance is None else guidance
        with policy.with_weights(weights):
            texts = [prompt.text for prompt in prompts]
            latents = sample_latents(
                policy.model, texts, self.noise, self.plan.steps, guidance, self.batch_size, self.encoded
            )
            drift = self._drift(policy)
        images = decode_in_batches(policy.model.decode, latents, self.batch_size).numpy()
        verdicts = verify(images, [dict(prompt.metadata) for prompt in prompts])
        split = len(self.held_out)
        by_task = {
            task: [v for v, p in zip(verdicts, self.held_out, strict=False) if p.metadata["task"] == task]
            for task in self.tasks
        }
        outside = verdicts[split:]
        return {
            "accuracy": _mean(_strict(group) for group in by_task.values()),
            "partial_credit": _mean(_mean(v.partial for v in group) for group in by_task.values()),
            **{f"accuracy_{task}": _strict(group) for task, group in by_task.items()},
            "ood_accuracy": _strict(outside),
            "ood_partial_credit": _mean(v.partial for v in outside),
            "palette_error": palette_error(images),
            "diversity": diversity(images.reshape(-1, self.plan.images_per_prompt, *images.shape[1:])),
            "sharpness": _mean(sharpness(images)),
            "colour_entropy": _mean(color_entropy(images)),
            "brightness": _mean(brightness(images)),
            "jpeg_size": _mean(jpeg_size(images)),
            "drift": drift,
        }

    def measure_guided(
        self,
        policy: Policy,
        weights: Sequence[Tensor],
        guidances: Iterable[float],
        known: Mapping[str, float] | None = None,
    ) -> list[Guided]:
        """All metrics at each guidance, rising.

        Args:
            known: those at the plan's own guidance, if they are at hand.
        """
        measured = []
        for guidance in guidances:
            at_hand = known is not None and guidance == self.plan.guidance
            metrics = dict(known or {}) if at_hand else self.measure(policy, weights, guidance)
            measured.append(Guided(guidance=guidance, metrics=metrics))
        return measured

    def _drift(self, policy: Policy) -> float:
        """mean (v_policy - v_base)^2 over the base's own pictures, noised; weights in place are the policy's."""
        errors = [
            matching_error(policy.model.velocity(noisy, sigma, self.drift_conditioning), base).mean().item()
            for sigma, noisy, base in self.drift_inputs
        ]
        return _mean(errors)


def make_evaluator(plan: EvaluationPlan, size: Size, policy: Policy, batch_size: int = 256) -> Evaluator:
    """Fix the inputs; runs the base once for the pictures that drift is measured on."""
    held_out = _slots(load_prompts(plan.held_out), size.prompts_per_task, plan.images_per_prompt)
    out_of_domain = _slots(load_prompts(plan.out_of_domain), size.out_of_domain_prompts, plan.images_per_prompt)
    model = policy.model
    encoded = EncodedTexts(model, ["", *(prompt.text for prompt in (*held_out, *out_of_domain))])
    noise = fixed_noise(model, range(len(held_out) + len(out_of_domain)), NOISE_SEED)
    step = max(1, len(held_out) // DRIFT_IMAGES)
    chosen = held_out[::step][:DRIFT_IMAGES]
    texts = [prompt.text for prompt in chosen]
    conditioning = encoded[texts].on(model.device)
    with policy.as_reference():
        latents = sample_latents(model, texts, noise[: len(chosen)], plan.steps, plan.guidance, batch_size, encoded)
        inputs = []
        for sigma in DRIFT_SIGMAS:
            fresh = seeded_noise(latents.shape, NOISE_SEED, "drift", str(sigma)).to(latents)
            noisy = (1 - sigma) * latents + sigma * fresh
            inputs.append((sigma, noisy, model.velocity(noisy, sigma, conditioning)))
    return Evaluator(plan, held_out, out_of_domain, noise, encoded, batch_size, inputs, conditioning)


def _slots(prompts: list[Prompt], per_task: int, images: int) -> list[Prompt]:
    """For each task type ``per_task`` prompts spread over the set, each ``images`` times in a row."""
    slots = []
    for task in dict.fromkeys(prompt.metadata["task"] for prompt in prompts):
        members = [prompt for prompt in prompts if prompt.metadata["task"] == task]
        spread = len(members) > per_task
        for slot in range(per_task):
            index = slot * len(members) // per_task if spread else slot % len(members)
            slots += [members[index]] * images
    return slots


def gallery_prompts(evaluator: Evaluator) -> list[Prompt]:
    """Eight prompts for the report: held-out ones of every task type, and out-of-domain ones."""
    per_task = len(evaluator.held_out) // len(evaluator.tasks)
    firsts = evaluator.held_out[::per_task]
    seconds = evaluator.held_out[per_task - 1 :: per_task]
    outside = evaluator.out_of_domain[:: max(1, len(evaluator.out_of_domain) // 2)]
    unique = {prompt.text: prompt for prompt in [*firsts, *outside[:2], *reversed(seconds)]}
    return list(unique.values())[:8]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _strict(verdicts: Sequence[Verdict]) -> float:
    return _mean(verdict.strict for verdict in verdicts)


def palette_error(images: NDArray[np.float32]) -> float:
    """Mean RGB distance of clearly coloured pixels to the nearest palette colour; 0 without any such pixel."""
    pixels = images.transpose(0, 2, 3, 1).reshape(-1, 3)
    pixels = pixels[np.linalg.norm(pixels - BACKGROUND, axis=1) > 0.4]
    if not len(pixels):
        return 0.0
    distances = [np.linalg.norm(pixels - colour, axis=1) for colour in PALETTE.values()]
    return float(np.min(distances, axis=0).mean())
