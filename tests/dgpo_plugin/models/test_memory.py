"""Memory: what saves it never changes the result, and `dgpo plan` knows it beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from dgpo_plugin.adapters.load import apply_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter
from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig, RunConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.memory import on_device
from dgpo_plugin.models.policy import Policy, adapted_layers
from dgpo_plugin.models.speed import contiguous_tokens
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.plan import BYTES_PER_WEIGHT, GRAPHS, MemoryCount, make_plan, rows
from tests.conftest import SMALL, needs_bf16, one_reward


def weights_after(*changes: str) -> dict[str, Tensor]:
    trainer = build_trainer(load_config("shapes", [*SMALL, *changes]))
    for _ in trainer.iterations():
        pass
    return trainer.policy.copy_weights()


@pytest.mark.fast
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("saving", ["training.gradient_checkpointing=true", "model.offload=true"])
def test_what_saves_memory_changes_no_bit(saving: str, precision: str) -> None:
    plain, smaller = (weights_after(f"model.precision={precision}", *more) for more in ([], [saving]))
    assert plain.keys() == smaller.keys()
    for name, weights in plain.items():
        assert torch.equal(weights, smaller[name])


@pytest.mark.fast
def test_tiled_decoding_of_a_small_picture_is_plain_decoding() -> None:
    """The shapes VAE's tile is its whole picture; slices alone remain, and they are exact up to summation."""
    latents = torch.randn(
        3, *load_model(ModelConfig(path="shapes")).latent_shape, generator=torch.Generator().manual_seed(0)
    )
    plain = load_model(ModelConfig(path="shapes")).decode(latents)
    model = load_model(ModelConfig(path="shapes", tiled_decode=True))
    assert model.vae.use_tiling
    assert model.vae.use_slicing
    assert torch.allclose(model.decode(latents), plain, atol=1e-5)


class Part(torch.nn.Linear):
    """Notes where it is sent; this machine has no second device to really go to."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.sent: list[str] = []

    def to(self, device: torch.device) -> Part:  # type: ignore[override]
        self.sent.append(device.type)
        return self


@pytest.mark.fast
def test_parts_that_are_offloaded_go_home_even_after_an_error() -> None:
    part, broken = Part(), ValueError("broken")
    with pytest.raises(ValueError, match="broken"), on_device([part], torch.device("meta")):
        raise broken
    assert part.sent == ["meta", "cpu"]
    with on_device([part], torch.device("cpu")):
        pass
    assert part.sent == ["meta", "cpu"]  # it was there already


@pytest.mark.fast
def test_a_groups_images_share_their_prompts_memory() -> None:
    table = Conditioning({"context": torch.randn(2, 3, 4), "pooled": torch.randn(2, 5)})
    images = table[torch.arange(32) // 16]
    assert images.table is table.table
    assert len(images) == 32
    assert images.tensors["context"].shape == (32, 3, 4)
    part = images[torch.tensor([3, 20])]
    assert torch.equal(part.tensors["pooled"], table.tensors["pooled"])
    joined = Conditioning.concatenate([images[:16], images[16:]])
    assert joined.table is table.table
    assert torch.equal(joined.tensors["context"], images.tensors["context"])
    alone = images[torch.tensor([20, 21])].on(torch.device("cpu"))
    assert len(alone.table["pooled"]) == 1
    assert torch.equal(alone.tensors["pooled"], table.tensors["pooled"][[1, 1]])


@needs_bf16
@pytest.mark.fast
def test_a_quantized_base_trains_and_its_adapter_is_a_plain_one(tmp_path: Path) -> None:
    from rich.console import Console

    from dgpo_plugin.adapters.load import read_adapter
    from dgpo_plugin.training import run

    config = load_config("shapes", [*SMALL, "model.precision=bf16", "model.quantization=torchao-int8"])
    trainer = build_trainer(config)
    denoiser: Any = trainer.model.denoiser
    layer = denoiser.transformer_blocks[0].attn.to_q.base_layer
    assert type(layer.weight).__module__.startswith("torchao")
    whole: Any = load_model(ModelConfig(path="shapes", precision="bf16")).denoiser
    plain = whole.transformer_blocks[0].attn.to_q.weight
    assert torch.allclose(layer.weight.dequantize().float(), plain.float(), atol=float(plain.abs().max()) / 100)
    adapter = run.train(config, tmp_path / "run", Console(quiet=True))
    tensors = read_adapter(adapter).tensors
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    result = CliRunner().invoke(
        main,
        [
            "sample",
            "shapes",
            "--adapter",
            str(adapter),
            "--prompt",
            "a red circle",
            "--output",
            str(tmp_path / "g.png"),
        ],
    )
    assert result.exit_code == 0, result.output


class Packed(nn.Linear):
    """A linear layer of 8-bit weights, of a class of its own as those of bitsandbytes are."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, dtype=whole.weight.dtype)
        self.scale = float(whole.weight.abs().max()) / 127
        self.weight = nn.Parameter((whole.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@needs_bf16
@pytest.mark.fast
def test_an_adapter_on_packed_layers_is_trained_with_the_numbers_it_is_applied_with(tmp_path: Path) -> None:
    """On an H200 a nf4 base's trained velocity was .17 of its change away from the applied one's: other roundings."""

    def packed() -> Any:
        model: Any = load_model(ModelConfig(path="shapes", precision="bf16"))
        for name in adapted_layers(model, None):
            parent, _, last = name.rpartition(".")
            setattr(model.denoiser.get_submodule(parent), last, Packed(model.denoiser.get_submodule(name)))
        contiguous_tokens(model.denoiser)
        return model

    config = load_config("shapes", ["model.precision=bf16", "lora.rank=4"])
    policy = Policy(packed(), config.lora, 0)
    torch.manual_seed(0)
    for parameter in policy.parameters.values():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    file = tmp_path / "adapter.safetensors"
    export_adapter(policy, policy.copy_weights(), file, TrainingFacts(config, 0))
    other = packed()
    apply_adapter(other, file)
    latents, asked = torch.randn(4, *other.latent_shape), other.encode(["a red circle"])[[0] * 4]
    with torch.no_grad():
        trained, applied = policy.velocity(latents, 0.5, asked), other.velocity(latents, 0.5, asked)
        with policy.as_reference():
            assert not torch.equal(trained, policy.velocity(latents, 0.5, asked))
    assert torch.equal(trained, applied)


@pytest.mark.fast
def test_a_quantization_that_cannot_be_done_says_so() -> None:
    with pytest.raises(UserError, match=r"model.quantization bitsandbytes-nf4: .*; install it or set it to null"):
        load_model(ModelConfig(path="shapes", quantization="bitsandbytes-nf4"))


@pytest.mark.fast
def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="model.precision fp16: needs a GPU"):
        build_trainer(load_config("shapes", [*SMALL, "model.precision=fp16"]))


# ---- the plan


def plan_config(*changes: str) -> RunConfig:
    return load_config("shapes", ["model.precision=fp32", *changes])


@pytest.mark.fast
def test_the_plan_counts_what_is_there() -> None:
    config = plan_config()
    plan = make_plan(config)
    trainer = build_trainer(config)
    assert plan.trainable == sum(p.numel() for p in trainer.policy.parameters.values())
    assert plan.parameters == sum(p.numel() for p in trainer.model.denoiser.parameters()) - plan.trainable
    others = sum(p.numel() for part in [trainer.model.vae, *trainer.model.encoders] for p in part.parameters())
    assert plan.weights["VAE and text encoders"] == pytest.approx(4 * others, rel=0.01)
    assert plan.images == 64


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["algorithm.clip=0.01"],
        ["algorithm.rollout_guidance=3", "algorithm.reference_guidance=1"],
        ["training.micro_batch_size=16"],
        ["algorithm.name=flow-grpo", "algorithm.guidance=2"],
        ["algorithm.name=flow-grpo", "algorithm.guidance=1", "algorithm.reference_guidance=2"],
        ["algorithm.name=flow-grpo-fast", "algorithm.window_range=3"],
        ["algorithm.name=flow-grpo", "algorithm.guidance=2", "algorithm.keep_graphs=true"],
    ],
)
def test_the_planned_evaluations_are_those_of_an_iteration(changes: list[str]) -> None:
    """Of the third one: in the first two the old policy is the policy, and its pass is skipped."""
    small = [c for c in SMALL if not c.startswith("algorithm.") or not any("name" in change for change in changes)]
    config = load_config("shapes", [*small, "algorithm.kl_weight=0.1", "training.iterations=3", *changes])
    rising = iter(range(10**6))

    def reward(images: Tensor, prompts: object) -> Tensor:
        return torch.tensor([float(next(rising) % 5) for _ in images])  # no image is exactly its group's mean

    records = list(build_trainer(config, rewards=one_reward(reward)).iterations())
    trained = records[2]["denoiser_evaluations"]
    assert make_plan(config).denoiser_evaluations == trained


@pytest.mark.fast
def test_the_plan_counts_the_rewards_networks() -> None:
    """By the published shapes, in the precision asked for; on the CPU they cost the GPU nothing."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    shapes = CLIPConfig(text_config=text, vision_config={**vision, "num_attention_heads": 16}, projection_dim=1024)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CLIPModel(shapes).parameters())
    pickscore = "rewards={pickscore: 1, brightness: 1}"
    assert make_plan(plan_config(pickscore)).weights["rewards"] == 4 * parameters
    assert make_plan(plan_config(pickscore, "scoring.precision=bf16")).weights["rewards"] == 2 * parameters
    assert "rewards" not in make_plan(plan_config(pickscore, "scoring.device=cpu")).weights


@pytest.mark.fast
def test_the_plans_memory_falls_with_what_saves_it() -> None:
    whole = make_plan(plan_config())
    split = make_plan(plan_config("training.micro_batch_size=8"))
    again = make_plan(plan_config("training.gradient_checkpointing=true"))
    assert split.phases["training"] == pytest.approx(whole.phases["training"] / 8, rel=0.1)
    assert again.phases["training"] < 0.6 * whole.phases["training"]
    away = make_plan(plan_config("model.offload=true"))
    assert "VAE and text encoders" not in away.weights
    assert away.phases["decoding"] > whole.phases["decoding"]
    quantized = make_plan(plan_config("model.quantization=bitsandbytes-nf4"))
    assert quantized.weights["denoiser"] < BYTES_PER_WEIGHT["bitsandbytes-nf4"] / 4 * 1.5 * whole.weights["denoiser"]
    shared = make_plan(plan_config("model.shard=true"), processes=2)
    assert shared.weights["denoiser"] == whole.weights["denoiser"] // 2
    # A larger group costs latents, and nothing else.
    larger = make_plan(plan_config("training.micro_batch_size=8", "training.group_size=64"))
    assert larger.phases == split.phases
    assert larger.peak - split.peak < 0.02 * whole.peak * 4


KEPT = ("algorithm.name=flow-grpo", "algorithm.guidance=1", "algorithm.keep_graphs=true")


@pytest.mark.fast
def test_the_plan_counts_kept_graphs_in_every_phase_and_says_what_to_do() -> None:
    plain, kept = make_plan(plan_config(*KEPT[:2])), make_plan(plan_config(*KEPT))
    assert GRAPHS not in plain.weights
    assert kept.peak - plain.peak == kept.weights[GRAPHS] > 9 * 0.5 * plain.phases["training"]
    assert kept.images == plain.images
    split = make_plan(plan_config(*KEPT, "training.micro_batch_size=16"))
    assert split.weights[GRAPHS] == pytest.approx(kept.weights[GRAPHS], rel=0.05)  # all of them at once, in any pieces
    again = make_plan(plan_config(*KEPT, "training.gradient_checkpointing=true"))
    assert again.weights[GRAPHS] < 0.5 * kept.weights[GRAPHS]
    shared = make_plan(plan_config(*KEPT), processes=2)
    assert shared.weights[GRAPHS] == pytest.approx(kept.weights[GRAPHS] / 2, rel=0.05)
    lines = dict(rows(kept, int(0.5 * kept.peak), "a small GPU"))
    assert GRAPHS in lines
    assert lines["try"].startswith("algorithm.keep_graphs=false")


@pytest.mark.fast
def test_the_plan_is_printed_with_a_verdict() -> None:
    enough = CliRunner().invoke(main, ["plan", "shapes", "--memory", "4"])
    assert enough.exit_code == 0
    assert "fits a GPU of 4 GiB" in enough.output
    short = CliRunner().invoke(main, ["plan", "shapes", "--memory", "0.05", "--set", "model.precision=fp32"])
    assert "does not fit a GPU of 0.05 GiB" in short.output
    assert "try" in short.output
    assert "training.micro_batch_size" in short.output


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from dgpo_plugin.commands.terminal import quieten
quieten()
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models.attention import checkpoint_blocks
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models import load_model
config = load_config("shapes", ["model.precision=fp32", *sys.argv[2:]])
policy = Policy(load_model(config.model), config.lora, 0)
if config.training.gradient_checkpointing:
    checkpoint_blocks(policy.model.denoiser)
size = int(sys.argv[1])
asked = policy.model.encode(["a red circle"])

def train(size):
    latents = torch.zeros(size, *policy.model.latent_shape)
    policy.velocity(latents, 0.5, asked[[0] * size]).square().mean().backward()

def resident(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))

train(4)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
train(size)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("size", "changes"), [(512, []), (1024, ["training.gradient_checkpointing=true"])])
def test_the_planned_memory_is_what_the_system_measures(size: int, changes: list[str]) -> None:
    """Resident memory of a real training step in a process of its own, against the estimate from shapes alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TOP_PAD_": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(size), *changes],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    measured = int(ran.stdout)
    geometry = [f"training.group_size={size}", "training.prompts_per_iteration=1"]
    planned = make_plan(plan_config(*geometry, *changes)).phases["training"]
    assert planned > 100 * 2**20
    assert measured == pytest.approx(planned, rel=0.15)


@pytest.mark.fast
def test_memory_is_counted_while_it_is_alive() -> None:
    with MemoryCount() as count:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2  # a view is no memory
        del b
    assert count.peak == 8000
    assert count.alive == 4000
    del c
    assert count.alive == 0


@pytest.mark.fast
def test_the_plan_counts_what_stays_while_texts_are_encoded() -> None:
    """The largest encoder alone comes; a quantized base leaves for it, unless it cannot be moved or is split."""
    model = load_model(ModelConfig(path="shapes"))
    largest = max(4 * sum(p.numel() for p in encoder.parameters()) for encoder in model.encoders)
    for changes, stays in (
        ([], False),
        (["model.quantization=bitsandbytes-nf4"], False),
        (["model.quantization=bitsandbytes-int8"], True),
        (["model.shard=true"], True),
    ):
        plan = make_plan(plan_config("model.offload=true", *changes))
        expected = largest + plan.weights["adapter and optimizer"] + (plan.weights["denoiser"] if stays else 0)
        assert plan.encoding == pytest.approx(expected, rel=0.01)
        assert plan.peak >= plan.encoding
    assert make_plan(plan_config()).encoding == 0
