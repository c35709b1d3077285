"""Small configurations, batches and rollouts of every algorithm, for the tests of several modules."""

from __future__ import annotations

import atexit
import functools
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgpo_plugin.algorithms import Algorithm, Batch, Layout, Random, Rollout, algorithm_of
from dgpo_plugin.algorithms.advantages import normalize
from dgpo_plugin.common.pictures import to_image
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.base import Sigma
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.worlds.shapes.render import render
from dgpo_plugin.worlds.shapes.scenes import train_prompts
from tests.conftest import SMALL

FORWARD = ["dgpo", "nft", "elbo", "awm", "ram", "crd"]
TRAJECTORY = ["flow-grpo", "flow-grpo-fast", "flow-grpo-guard", "flow-grpo-gardo", "flow-dppo"]
ALGORITHMS = [*FORWARD, "online-dpo", *TRAJECTORY]
"""All that learn from rewards."""
PLAIN = [override for override in SMALL if not override.startswith("algorithm.")]


ON_PAIRS = (
    "rewards={}",
    "prompts.train=null",
    "rollout={}",
    "training.group_size=2",
    "algorithm={name: diffusion-dpo, beta: 100, timesteps: 2}",
)
"""What makes of a preset with rewards one with pairs."""


@functools.cache
def pairs_folder(count: int = 4) -> str:
    """A folder with a table of so many preferred pairs: pictures of their prompts, the next one's as the worse."""
    folder = Path(tempfile.mkdtemp(prefix="pairs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    every, rng, rows = train_prompts(), np.random.default_rng(0), ["prompt,chosen,rejected"]
    prompts = every[:: len(every) // count][:count]
    for number, prompt in enumerate(prompts):
        for name, shown in (("chosen", prompt), ("rejected", prompts[(number + 1) % count])):
            picture = torch.from_numpy(render(dict(shown.metadata), rng))
            to_image(picture).save(folder / f"{number}-{name}.png")
        rows.append(f'"{prompt.text}",{number}-chosen.png,{number}-rejected.png')
    (folder / "pairs.csv").write_text("\n".join(rows))
    return str(folder)


@functools.cache
def features_network(kind: str = "dinov3") -> str:
    """A folder with a tiny vision transformer of the published class and file format."""
    from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

    folder = tempfile.mkdtemp(prefix="features-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "dinov3":
            network: Any = DINOv3ViTModel(DINOv3ViTConfig(**size, intermediate_size=32, patch_size=32))
        else:
            network = Dinov2Model(Dinov2Config(**size, mlp_ratio=2, image_size=56, patch_size=28))
    network.save_pretrained(folder)
    return folder


def config_for(algorithm: str, *overrides: str) -> RunConfig:
    own = {
        "dgpo": ["algorithm.timesteps=2", "algorithm.noisiest_steps=3"],
        "nft": ["algorithm.name=nft", "algorithm.timesteps=3"],
        "elbo": ["algorithm.name=elbo", "algorithm.timesteps=2"],
        "awm": ["algorithm.name=awm", "algorithm.timesteps=2", "algorithm.last_step=3"],
        "ram": ["algorithm.name=ram", "algorithm.timesteps=2", "algorithm.rollout_guidance=1"],
        "crd": ["algorithm.name=crd", "algorithm.timesteps=2", "algorithm.noisiest_steps=3"],
        "online-dpo": ["algorithm={name: online-dpo, beta: 100, timesteps: 2}"],
        "flow-grpo": ["algorithm.name=flow-grpo", "algorithm.guidance=1", "algorithm.kl_weight=0.04"],
        "flow-grpo-guard": ["algorithm.name=flow-grpo-guard", "algorithm.guidance=1"],
        "flow-grpo-gardo": [
            "algorithm={name: flow-grpo-gardo, guidance: 1, features: null, renew_after: 2}",
            "rewards.sharpness={weight: 0}",
        ],
        "flow-dppo": ["algorithm.name=flow-dppo", "algorithm.window_range=3", "algorithm.kl_weight=0.01"],
        "flow-grpo-fast": ["algorithm.name=flow-grpo-fast", "algorithm.window_range=3"],
    }
    if algorithm == "diffusion-dpo":
        return load_config("shapes", [*PLAIN, *ON_PAIRS, f"pairs.train={pairs_folder()}", *overrides])
    return load_config("shapes", [*PLAIN, *own.get(algorithm, [f"algorithm.name={algorithm}"]), *overrides])


def make_algorithm(config: RunConfig, policy: Policy, processes: Processes | None = None) -> Algorithm[Any, Any]:
    """The configuration's algorithm, alone in its process unless said otherwise."""
    kind = algorithm_of(config.algorithm)
    return kind(config.algorithm, policy, processes or Processes(), config.training.micro_batch_size)


def whole_batch(config: RunConfig, policy: Policy, texts: Sequence[str], group_size: int) -> Batch:
    """All samples of an iteration at once."""
    layout = Layout(len(texts), group_size)
    ids = torch.arange(layout.samples)
    sigmas = policy.model.sigmas(config.rollout.steps, config.rollout.shift, config.schedule)
    return Batch(ids, layout, policy.model.encode(texts)[layout.groups_of(ids)], sigmas)


def in_float64(policy: Policy) -> None:
    """Run the denoiser in float64, so that the order of summation cannot hide or explain a difference."""
    policy.model.denoiser.double()

    def double_velocity(latents: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        model: Any = policy.model
        tensors = conditioning.tensors
        return model.denoiser(
            hidden_states=latents.double(),
            encoder_hidden_states=tensors["context"].double(),
            pooled_projections=tensors["pooled"].double(),
            timestep=model.timesteps(sigma, latents.float()).double(),
            return_dict=False,
        )[0]

    policy.model.velocity = double_velocity  # type: ignore[method-assign]


def rollout_and_advantages(config: RunConfig, policy: Policy) -> tuple[Rollout, Tensor]:
    batch = whole_batch(config, policy, ["a red circle", "two blue squares"], 4)
    rollout = make_algorithm(config, policy).sample(batch, Random(0, 0))
    rewards = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).double()
    return rollout, normalize(rewards, config.algorithm.advantage_std)


def mean_and_std(kind: str, x: Tensor, v: Tensor, sigmas: list[float], step: int, a: float) -> tuple[Tensor, float]:
    """The Gaussian of a stochastic step, written from docs/architecture.md, section 4."""
    s, after = sigmas[step], sigmas[step + 1]
    if kind == "cps":
        k = after * math.sin(a * math.pi / 2)
        return (1 - after) * (x - s * v) + math.sqrt(after**2 - k**2) * (x + (1 - s) * v), k
    dt = after - s
    sd = a * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
    return x * (1 + sd**2 / (2 * s) * dt) + v * (1 + sd**2 * (1 - s) / (2 * s)) * dt, sd * math.sqrt(-dt)
