"""How every cell is measured: the same prompts and noise every time, so that only the weights differ.

Several processes deal the prompts out. Noise is by picture, so that they draw what one would, but for the last bits,
which depend on how many pictures share a matrix product; all of them get every row, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import seeded_noise
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.generate import BATCH_SIZE, fixed_noise, generate, sample_latents
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.text_cache import EncodedTexts

from .kept import keep
from .measures import Measure
from .pictures import Pictures, join
from .prompt_sets import TEST, TEST_SEED, VALIDATION, SampledSet, counted_tags
from .records import BASE, NO_SEED

DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3)
DRIFT_IMAGES = 32
GALLERY_PROMPTS = 8
GALLERY_SEED = 7
"""Seed of the noise that the report's pictures start from."""


@dataclass(frozen=True)
class Subject:
    """Whose pictures are measured: the columns of their rows that say so."""

    entry: str = BASE
    seed: int = NO_SEED
    checkpoint: int = 0


@dataclass(frozen=True)
class Evaluator:
    """The fixed prompts, noises and drift inputs of a comparison.

    Attributes:
        steps: of the sampler.
        encoded: the prompts' texts, encoded once.
        batch_size: images through the denoiser at once.
        drift_inputs: (sigma, noised latents, the base's velocity there) of its own pictures.
        drift_conditioning: for all of those.
        kept: the folder that every measured picture is kept in; None to keep none.
        processes: that measure together; each calls the same methods in the same order.
    """

    steps: int
    sets: Mapping[str, SampledSet]
    measures: Mapping[str, Measure]
    encoded: EncodedTexts
    batch_size: int
    drift_inputs: list[tuple[float, Tensor, Tensor]]
    drift_conditioning: Conditioning
    kept: Path | None = None
    processes: Processes = field(default_factory=Processes)

    def measure(
        self,
        policy: Policy,
        subject: Subject,
        name: str,
        guidance: float,
        *,
        prompts: Iterable[int] | None = None,
        images: Sequence[int] | None = None,
    ) -> Pictures:
        """A row a picture of one set's prompts, drawn with the weights that are in place.

        Args:
            prompts: which of the set's; None for all.
            images: which of each prompt's; None for as many as the set says.
        """
        chosen = self.sets[name]
        images = list(range(chosen.images)) if images is None else images
        numbers = list(range(len(chosen.prompts)) if prompts is None else prompts)
        own, count = self.processes.even_share(len(numbers))
        at_once = max(1, self.batch_size // max(1, len(images)))
        parts, problem = list[Pictures](), None
        for start in range(0, len(own), at_once):
            each = [numbers[place] for place in own[start : start + at_once]]
            try:
                rows = self._rows(policy, subject, chosen, guidance, each, images, own=max(0, count - start))
                parts.append(rows)
            except UserError as error:
                problem = problem or str(error)
                if not self.processes.lockstep:  # a sharded base is run to the end on all, whatever went wrong on one
                    break
        self.processes.fail_together(problem)
        rows = join(parts)
        return rows if self.processes.count == 1 else self._everyones(rows, own[:count], numbers, images)

    def curve(self, policy: Policy, subject: Subject, guidance: float) -> Pictures:
        """The test and out-of-domain pictures of one checkpoint."""
        tested = [each for each in self.sets.values() if each.role != "validation"]
        return join(self.measure(policy, subject, each.name, guidance, prompts=each.curve) for each in tested)

    def best_guidance(
        self,
        policy: Policy,
        subject: Subject,
        guidances: Sequence[float],
        metric: str,
        least: int,
        seen: Pictures | None = None,
        images: int | None = None,
    ) -> tuple[float, Pictures]:
        """The guidance whose validation pictures have the highest headline, of equal ones the lowest; and the pictures.

        Args:
            least: prompts of a kind from which on it counts.
            seen: what was measured before, the subject's validation pictures at a guidance perhaps, which are then not
                drawn again, nor returned.
            images: of each prompt; None for as many as the set says.
        """
        numbers = None if images is None else range(images)
        before = empty() if seen is None else seen.of(subject.entry, subject.seed, VALIDATION)
        before = before.where(before.checkpoint == subject.checkpoint)
        drawn = [each for each in guidances if each not in before.guidance]
        rows = {each: self.measure(policy, subject, VALIDATION, each, images=numbers) for each in drawn}
        found = join([before, *rows.values()])
        values = {each: self._on_validation(found.where(found.guidance == each), metric, least) for each in guidances}
        return max(guidances, key=lambda each: (values[each], -each)), join(rows.values()) if rows else empty()

    def best_checkpoint(self, pictures: Pictures, guidance: float, metric: str, least: int) -> int | None:
        """The checkpoint of a cell's whose validation pictures have the highest headline, of equal ones the earliest.

        Nothing is read of the pictures of any other set, nor of the untrained base's.

        Args:
            guidance: that the pictures were drawn with.
            least: prompts of a kind from which on it counts.

        Returns:
            None where no checkpoint has such pictures.
        """
        rows = pictures.where(
            (pictures.set == VALIDATION) & (pictures.guidance == guidance) & (pictures.checkpoint > 0)
        )
        values = {
            each: self._on_validation(rows.where(rows.checkpoint == each), metric, least)
            for each in np.unique(rows.checkpoint).tolist()
        }
        return max(values, key=lambda each: (values[each], -each), default=None)

    def finished(self, policy: Policy, subject: Subject, guidance: float, seen: float | None) -> Pictures:
        """All test and out-of-domain pictures at a guidance.

        Args:
            seen: the guidance of the curve, whose prompts are measured there already; None for none.
        """
        parts = []
        for each in self.sets.values():
            if each.role != "validation":
                there = set(each.curve) if seen == guidance else set()
                left = [n for n in range(len(each.prompts)) if n not in there]
                parts += [self.measure(policy, subject, each.name, guidance, prompts=left)] if left else []
        return join(parts) if parts else empty()

    @torch.no_grad()
    def drift(self, policy: Policy) -> float:
        """The mean of (v_policy - v_base)^2 over the base's own pictures, noised; weights in place are the policy's."""
        errors = [
            (policy.model.velocity(noisy, sigma, self.drift_conditioning).float() - base.float()).square().mean().item()
            for sigma, noisy, base in self.drift_inputs
        ]
        return float(np.mean(errors))

    @property
    def gallery_prompts(self) -> list[Prompt]:
        """At most eight prompts for the report: test ones of every kind first, and out-of-domain ones."""
        test = self.sets[TEST]
        kinds = [test.prompts[test.tags.index(tag)] for tag in dict.fromkeys(test.tags)]
        outside = [each.prompts[0] for each in self.sets.values() if each.role == "out_of_domain"]
        unique = {prompt.text: prompt for prompt in [*kinds[:5], *outside[:2], *reversed(test.prompts)]}
        return list(unique.values())[:GALLERY_PROMPTS]

    def gallery(self, policy: Policy, guidance: float) -> Tensor:
        """The report's prompts drawn from fixed noise with the weights that are in place, (N, 3, H, W)."""
        texts = [prompt.text for prompt in self.gallery_prompts]
        noise = fixed_noise(policy.model, range(len(texts)), GALLERY_SEED)
        return generate(policy.model, texts, noise, self.steps, guidance, self.batch_size, self.encoded)

    def _on_validation(self, rows: Pictures, metric: str, least: int) -> float:
        """The headline of some validation pictures, turned so that more is better."""
        sign = 1 if self.measures[metric].record.better == "higher" else -1
        return sign * headline(rows, self.sets[VALIDATION], metric, least)

    def _rows(
        self,
        policy: Policy,
        subject: Subject,
        chosen: SampledSet,
        guidance: float,
        numbers: Sequence[int],
        images: Sequence[int],
        own: int,
    ) -> Pictures:
        """Some prompts' pictures, measured; of the first ``own`` of these prompts they are kept, if any are."""
        each_prompt = [number for number in numbers for _ in images]
        prompts = [chosen.prompts[number] for number in each_prompt]
        noises = [noise for number in numbers for noise in chosen.noise_numbers(number, images)]
        noise, texts = fixed_noise(policy.model, noises, chosen.seed), [prompt.text for prompt in prompts]
        pictures = generate(policy.model, texts, noise, self.steps, guidance, self.batch_size, self.encoded)
        count = len(prompts)
        present = [name for name in chosen.metrics if not self.measures[name].record.missing]
        rows = Pictures(
            entry=np.full(count, subject.entry),
            seed=np.full(count, subject.seed, dtype=np.int64),
            checkpoint=np.full(count, subject.checkpoint, dtype=np.int64),
            guidance=np.full(count, guidance, dtype=np.float64),
            set=np.full(count, chosen.name),
            prompt=np.array(each_prompt, dtype=np.int64),
            image=np.array([image for _ in numbers for image in images], dtype=np.int64),
            metrics={name: self.measures[name].compute(pictures, prompts) for name in present},
        )
        if self.kept is None:
            return rows
        mine = min(own, len(numbers)) * len(images)
        hashes = keep(rows.where(np.arange(mine)), pictures[:mine], self.kept).sha256
        return replace(rows, sha256=np.concatenate([hashes, np.full(count - mine, "")]))

    def _everyones(self, rows: Pictures, own: Sequence[int], numbers: Sequence[int], images: Sequence[int]) -> Pictures:
        """All processes' rows, in the order in which one would have them; metrics exactly as they were computed.

        Args:
            rows: this process's, of its own prompts first.
            own: places of those in ``numbers``.
            numbers: everyone's prompts.
        """
        count, device = len(numbers) * len(images), self.drift_inputs[0][1].device
        places = [place * len(images) + image for place in own for image in range(len(images))]

        def of_all(column: NDArray[np.float64]) -> NDArray[np.float64]:
            values = torch.from_numpy(column[: len(places)].astype(np.float64)).to(device)
            return self.processes.assemble(values, torch.tensor(places, dtype=torch.int64), count).cpu().numpy()

        hashes = None
        if rows.sha256 is not None:
            digests = [list(bytes.fromhex(each)) for each in rows.sha256[: len(places)]]
            found = of_all(np.array(digests, dtype=np.float64).reshape(-1, 32)).astype(np.uint8)
            hashes = np.array([bytes(each).hex() for each in found], dtype=np.str_)
        return Pictures(
            entry=np.repeat(rows.entry[:1], count),
            seed=np.repeat(rows.seed[:1], count),
            checkpoint=np.repeat(rows.checkpoint[:1], count),
            guidance=np.repeat(rows.guidance[:1], count),
            set=np.repeat(rows.set[:1], count),
            prompt=np.repeat(np.array(numbers, dtype=np.int64), len(images)),
            image=np.tile(np.array(images, dtype=np.int64), len(numbers)),
            metrics={name: of_all(column) for name, column in rows.metrics.items()},
            sha256=hashes,
        )


def make_evaluator(
    policy: Policy,
    sets: Mapping[str, SampledSet],
    measures: Mapping[str, Measure],
    *,
    steps: int,
    guidance: float,
    batch_size: int = BATCH_SIZE,
    processes: Processes | None = None,
) -> Evaluator:
    """Fix the inputs; runs the base once for the pictures that drift is measured on.

    Args:
        sets: the validation set among them, whose prompts those pictures are of.
        guidance: that they are drawn with.
        processes: that measure together; None for this one alone.
    """
    model, processes = policy.model, processes or Processes()
    encoded = EncodedTexts(model, ["", *(prompt.text for each in sets.values() for prompt in each.prompts)])
    prompts = sets[VALIDATION].prompts
    texts = [prompt.text for prompt in prompts[:: max(1, len(prompts) // DRIFT_IMAGES)]][:DRIFT_IMAGES]
    conditioning = encoded[texts].on(model.device)
    own, kept = processes.even_share(len(texts))
    noise, drawn_here = fixed_noise(model, own, TEST_SEED), [texts[place] for place in own]
    with policy.as_reference():
        latents = sample_latents(model, drawn_here, noise, steps, guidance, batch_size, encoded)
        latents = processes.assemble(latents[:kept], torch.tensor(own[:kept]), len(texts))
        inputs = []
        with torch.no_grad():
            for sigma in DRIFT_SIGMAS:
                drawn = seeded_noise(latents.shape, TEST_SEED, "drift", str(sigma)).to(latents)
                noisy = (1 - sigma) * latents + sigma * drawn
                inputs.append((sigma, noisy, model.velocity(noisy, sigma, conditioning)))
    return Evaluator(steps, sets, measures, encoded, batch_size, inputs, conditioning, processes=processes)


def headline(pictures: Pictures, of: SampledSet, metric: str, least: int) -> float:
    """The mean of a metric over the prompts of kinds with at least ``least`` of them, each prompt's mean first."""
    tags = counted_tags(of.tags, least)
    values, prompts = pictures.metrics[metric], pictures.prompt
    means = [values[prompts == number].mean() for number in np.unique(prompts) if of.tags[number] in tags]
    return float(np.mean(means))


def empty() -> Pictures:
    """No picture at all."""
    none = np.empty(0)
    text, count = none.astype(np.str_), none.astype(np.int64)
    return Pictures(text, count, count, none, text, count, count, {})
