"""What the adapters of a comparison change, and how much of that is guidance: `python tools/adapter_change.py FOLDER`.

On the base's own pictures at a guidance of 3, noised to five levels, v is the velocity with the prompt and u that
without it. A line an adapter has the mean square of what it changes v by, of what it changes the velocity at a guidance
of 3 by, the cosine of its change of v with v - u (the direction of guidance), the guidance that this amounts to, and
the cosine of its changes of v and of u.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from dgpo_bench.claim import plan_of
from dgpo_bench.prompt_sets import TEST, sampled_sets
from dgpo_plugin.adapters.load import apply_adapter
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.models import Model, load_model
from dgpo_plugin.models.generate import fixed_noise, sample_latents
from dgpo_plugin.models.text_cache import EncodedTexts

GUIDANCE = 3.0
LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)
PROMPTS = 96
SEED = 7


def velocities(model: Model, texts: list[str], clean: Tensor) -> tuple[Tensor, Tensor]:
    """Of clean latents (N, ...) at each of L noise levels, with the prompts and without: both (L, N, ...)."""
    encoded = EncodedTexts(model, ["", *texts])
    prompted, empty = encoded[texts].on(model.device), encoded[[""] * len(texts)].on(model.device)
    noise = torch.randn(len(LEVELS), *clean.shape, generator=torch.Generator().manual_seed(SEED))
    noised = [(level, (1 - level) * clean + level * each) for level, each in zip(LEVELS, noise, strict=True)]
    with torch.no_grad():
        both = [[model.velocity(x, level, given).float() for level, x in noised] for given in (prompted, empty)]
    return torch.stack(both[0]), torch.stack(both[1])


def cosine(a: Tensor, b: Tensor) -> float:
    """Between two changes as a whole."""
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def main(folder: Path) -> None:
    """Print a line for each adapter of a comparison's folder."""
    plan = plan_of(folder)
    if plan is None:
        raise UserError(f"{folder}: holds no comparison")
    config: ModelConfig = plan.base_config().model.model_copy(update={"precision": "fp32"})
    texts = [prompt.text for prompt in sampled_sets(plan.task, plan.size)[TEST].prompts][:PROMPTS]
    base = load_model(config)
    clean = sample_latents(base, texts, fixed_noise(base, range(len(texts)), SEED), plan.task.sampling.steps, GUIDANCE)
    v, u = velocities(base, texts, clean)
    guided = u + GUIDANCE * (v - u)
    for file in sorted(folder.glob("runs/*/adapter.safetensors")):
        model = load_model(config)
        apply_adapter(model, file)
        new_v, new_u = velocities(model, texts, clean)
        change = new_v - v
        at_guidance = new_u + GUIDANCE * (new_v - new_u) - guided
        along = 1 + float((change * (v - u)).sum() / (v - u).square().sum())
        print(
            f"{file.parent.name}: v {change.square().mean():.4f}, at {GUIDANCE:g} {at_guidance.square().mean():.4f}, "
            f"with guidance {cosine(change, v - u):+.3f} (as {along:.3f}), with u's {cosine(change, new_u - u):.2f}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
