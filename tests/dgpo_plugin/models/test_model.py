"""Our model against diffusers' own pipeline: conditioning, sampling, decoding, and the adapter in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from scipy import stats

from dgpo_plugin.adapters.card import AdapterCard
from dgpo_plugin.adapters.load import apply_adapter, read_adapter
from dgpo_plugin.adapters.save import TrainingFacts, export_adapter, folded_tensors
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import LoraConfig, ModelConfig, Schedule
from dgpo_plugin.config.load import parse_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.base import guided_velocity
from dgpo_plugin.models.base_identity import PartIdentity
from dgpo_plugin.models.families.sd3 import SD3Model
from dgpo_plugin.models.generate import fixed_noise, sample_latents
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.samplers.ode import sample_ode
from tests.conftest import shapes_run

pytestmark = pytest.mark.fast
PROMPTS = ["a red circle", "two blue squares", "a green triangle left of a yellow circle"]


def plain_pipeline() -> StableDiffusion3Pipeline:
    """What a user has who knows nothing of us."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(world_pipeline("shapes"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_latents(pipeline: StableDiffusion3Pipeline, noise: torch.Tensor, guidance: float) -> torch.Tensor:
    return pipeline(
        PROMPTS,
        height=8 * noise.shape[2],
        width=8 * noise.shape[3],
        latents=noise.clone(),
        num_inference_steps=10,
        guidance_scale=guidance,
        max_sequence_length=1,
        output_type="latent",
    ).images


def test_shipped_pipeline_is_small_float32_and_runs_plainly() -> None:
    folder = world_pipeline("shapes")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10 * 2**20
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    pipeline = plain_pipeline()
    assert pipeline.transformer.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    assert pipeline.transformer.config.attention_head_dim == 64
    assert pipeline.transformer.config.in_channels == 16
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (64, 64)


def test_conditioning_is_the_pipelines_own() -> None:
    encoded = load_model(ModelConfig(path="shapes", max_sequence_length=1)).encode(PROMPTS)
    context, _, pooled, _ = plain_pipeline().encode_prompt(
        prompt=PROMPTS, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    assert torch.equal(encoded.tensors["context"], context)
    assert torch.equal(encoded.tensors["pooled"], pooled)


@pytest.mark.parametrize("size", [(64, 64), (64, 32), (48, 128)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_is_the_pipelines_own(guidance: float, size: tuple[int, int]) -> None:
    model = load_model(ModelConfig(path="shapes", max_sequence_length=1, width=size[0], height=size[1]))
    noise = fixed_noise(model, range(len(PROMPTS)), 0)
    ours = sample_latents(model, PROMPTS, noise, 10, guidance)
    assert torch.allclose(ours, pipeline_latents(plain_pipeline(), noise, guidance), atol=1e-4)
    assert model.decode(ours).shape[2:] == (size[1], size[0])


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (72, 64, "model.width 72: must be a multiple of 16"),
        (64, 40, "model.height 40: must be a multiple of 16"),
        (144, 64, "model.width 144: this base has no positions beyond 128 pixels"),
        (64, 256, "model.height 256: this base has no positions beyond 128 pixels"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(width: int, height: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(path="shapes", width=width, height=height))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_ten_steps_of_the_rollout_are_near_to_many(guidance: float) -> None:
    """With the solver on its own grid; on the pipeline's, made for Euler, guided rollouts become other pictures."""
    model = load_model(ModelConfig(path="shapes", max_sequence_length=1))
    prompts = PROMPTS * 8
    noise, asked, empty = fixed_noise(model, range(len(prompts)), 0), model.encode(prompts), model.encode([""])

    def rollout(steps: int, schedule: Schedule) -> torch.Tensor:
        with torch.no_grad():
            return sample_ode(
                lambda x, sigma: guided_velocity(model, x, sigma, asked, empty, guidance),
                noise,
                model.sigmas(steps, None, schedule),
                "dpm-solver++",
            )

    fine = rollout(160, "dpm")
    ours, native = ((rollout(10, name) - fine).square().mean().sqrt() for name in ("dpm", "native"))
    assert ours < native * (1 if guidance == 1 else 0.5)


def test_decoding_is_the_pipelines_own() -> None:
    model = load_model(ModelConfig(path="shapes", max_sequence_length=1))
    noise = fixed_noise(model, range(len(PROMPTS)), 0)
    ours = model.decode(sample_latents(model, PROMPTS, noise, 10, 1.0)).permute(0, 2, 3, 1).numpy()
    theirs = plain_pipeline()(
        PROMPTS, latents=noise, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=1, output_type="np"
    ).images
    assert np.abs(ours - theirs).max() < 1e-4


def test_schedule_is_the_pipelines_own_and_shift_overrides_it() -> None:
    model = load_model(ModelConfig(path="shapes", max_sequence_length=1))
    assert isinstance(model, SD3Model)
    pipeline = plain_pipeline()
    pipeline.scheduler.set_timesteps(10)
    assert model.sigmas(10, None) == pytest.approx(pipeline.scheduler.sigmas.tolist(), abs=0)
    assert model.sigmas(10, 1.0)[5] < model.sigmas(10, 3.0)[5]


def save(policy: Policy, path: Path) -> None:
    facts = TrainingFacts(shapes_run(), 7, reward_before=0.25, reward_after=0.5)
    export_adapter(policy, policy.copy_weights(), path, facts)


def test_adapter_gives_the_same_pictures_in_diffusers(policy: Policy, tmp_path: Path) -> None:
    noise = fixed_noise(policy.model, range(len(PROMPTS)), 0)
    ours = sample_latents(policy.model, PROMPTS, noise, 10, 1.0)
    save(policy, tmp_path / "adapter.safetensors")
    pipeline = plain_pipeline()
    base = pipeline_latents(pipeline, noise, 1.0)
    pipeline.load_lora_weights(tmp_path / "adapter.safetensors")
    theirs = pipeline_latents(pipeline, noise, 1.0)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (ours - base).abs().max() > 0.05, "the adapter of this test must change the pictures"


def test_adapter_attached_strictly_gives_the_policys_pictures(policy: Policy, tmp_path: Path) -> None:
    save(policy, tmp_path / "adapter.safetensors")
    merged = load_model(ModelConfig(path="shapes", max_sequence_length=1))
    apply_adapter(merged, tmp_path / "adapter.safetensors")
    noise = fixed_noise(policy.model, range(len(PROMPTS)), 0)
    ours = sample_latents(policy.model, PROMPTS, noise, 10, 1.0)
    assert torch.allclose(sample_latents(merged, PROMPTS, noise, 10, 1.0), ours, atol=1e-4)


def test_adapter_has_alpha_folded_and_says_what_it_is(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save(policy, path)
    file = read_adapter(path)
    tensors, header = file.tensors, file.header
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors)
    assert not [name for name in tensors if "alpha" in name]
    name = next(name for name in policy.parameters if name.endswith("lora_B"))
    raw = policy.parameters[name].detach()
    assert torch.equal(tensors[f"transformer.{name}.weight"], raw * 2.0)  # alpha 8 over rank 4
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert header["dgpo.original_alpha"] == "8"
    assert header["modelspec.architecture"] == "stable-diffusion-3-medium/lora"
    card = dict(AdapterCard.of(read_adapter(path)).rows())
    assert card["reward before"] == "0.250000"
    assert card["optimizer steps"] == "7"
    assert card["content hash"].endswith("(matches)")


def test_a_card_tells_its_licence_and_not_where_its_maker_keeps_files(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    config = parse_config(
        {
            "lora": {"license": "CC-BY-4.0"},
            "model": {"path": "/home/me/models/my-sd3"},
            "prompts": {"train": "/home/me/secret/prompts.txt", "held_out": "mine/held-out.txt"},
            "rewards": {"/home/me/own.py:sharp": 1, "ocr": 2},
        },
        "test",
    )
    export_adapter(policy, policy.copy_weights(), path, TrainingFacts(config, 1))
    header = read_adapter(path).header
    assert not [value for value in header.values() if "/home" in value]
    written = json.loads(header["dgpo.config"])
    assert (written["model"]["path"], written["prompts"]["train"]) == ("my-sd3", "prompts.txt")
    assert written["prompts"]["held_out"] == "held-out.txt"
    assert header["dgpo.reward"] == "1 own.py:sharp + 2 ocr"
    assert AdapterCard.of(read_adapter(path)).license == "CC-BY-4.0"


def test_adapter_for_another_base_is_refused(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    vars(policy.model).update(path="somebody/else", identity={"transformer": PartIdentity(digest="0" * 64)})
    save(policy, path)
    fresh = load_model(ModelConfig(path="shapes", max_sequence_length=1))
    with pytest.raises(UserError, match="trained on somebody/else"):
        apply_adapter(fresh, path)
    apply_adapter(fresh, path, any_base=True)


def test_keys_that_match_nothing_are_counted(policy: Policy, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name.replace("attn.to_q", "attn.to_nowhere"): t for name, t in _folded(policy).items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    wrong = sum("to_nowhere" in name for name in tensors)
    with pytest.raises(UserError, match=f"{wrong} of {len(tensors)} tensors match no weight"):
        apply_adapter(
            load_model(ModelConfig(path="shapes", max_sequence_length=1)), tmp_path / "bad.safetensors", any_base=True
        )


def _folded(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in folded_tensors(policy, policy.copy_weights()).items()}


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\x10" + b"\0" * 40])
def test_broken_adapter_file_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="adapter .*adapter.safetensors") as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value)


def test_models_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_model(ModelConfig(path="./nowhere"))
    with pytest.raises(UserError, match="no model_index.json"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(UserError, match="OtherPipeline is not supported; supported: StableDiffusion3Pipeline"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_reference_and_copies_leave_the_policy_as_it_was(policy: Policy) -> None:
    noise = fixed_noise(policy.model, range(3), 0)
    asked = policy.model.encode(PROMPTS)
    with torch.no_grad():
        before = policy.velocity(noise, 0.5, asked)
        with policy.as_reference():
            base = policy.velocity(noise, 0.5, asked)
        with policy.with_weights({name: torch.zeros_like(p) for name, p in policy.parameters.items()}):
            zeroed = policy.velocity(noise, 0.5, asked)
        after = policy.velocity(noise, 0.5, asked)
    assert torch.equal(before, after)
    assert torch.allclose(base, zeroed, atol=1e-6)
    assert not torch.allclose(base, before, atol=1e-3)


def test_lora_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="lora.target_modules"):
        Policy(load_model(ModelConfig(path="shapes")), LoraConfig(target_modules=("attn.nope",)), seed=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_adapter_starts_from_the_distribution_that_is_asked_for(init: str, precision: str) -> None:
    """Kolmogorov-Smirnov over all layers together, each entry in units of its own distribution; B is 0."""
    model = load_model(ModelConfig(path="shapes", precision=precision))
    # Given an empty prompt's conditioning, it computes nothing, so that bf16 needs no processor that has it.
    policy = Policy(model, LoraConfig(rank=16, alpha=32, init=init), seed=3, unconditional=model.blank_conditioning(1))
    downs, other = [], {"kaiming": "gaussian", "gaussian": "kaiming"}[init]
    for name, weight in policy.parameters.items():
        if name.endswith("lora_B"):
            assert not weight.any()
            continue
        rank, inputs = weight.shape
        # Kaiming's uniform with a = sqrt(5): its bound is sqrt(6 / ((1 + 5) inputs)).
        unit = 1 / rank if init == "gaussian" else inputs**-0.5
        downs.append(weight.detach().double().flatten() / unit)
    drawn = torch.cat(downs)[:20_000].numpy()
    laws = {"gaussian": stats.norm().cdf, "kaiming": stats.uniform(-1, 2).cdf}
    assert stats.kstest(drawn, laws[init]).pvalue > 1e-3
    assert stats.kstest(drawn, laws[other]).pvalue < 1e-9


def test_the_adapters_start_is_seeded() -> None:
    def start(seed: int) -> list[torch.Tensor]:
        policy = Policy(load_model(ModelConfig(path="shapes")), LoraConfig(init="gaussian"), seed=seed)
        return list(policy.copy_weights().values())

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_denoiser_evaluations_are_counted(policy: Policy) -> None:
    noise, conditioning = fixed_noise(policy.model, range(3), 0), policy.model.encode(PROMPTS)
    with policy.counting() as cost:
        with torch.no_grad():
            policy.velocity(noise, 0.5, conditioning)
            assert cost.total == 3
            policy.velocity(noise, 0.5, conditioning, guidance=2.0)
        assert cost.total == 9
        policy.velocity(noise, 0.5, conditioning)
    assert cost.total == 18
    policy.velocity(noise, 0.5, conditioning)
    assert cost.total == 18


def test_a_block_inside_a_block_counts_its_own(policy: Policy) -> None:
    """Also where both have counted the same so far."""
    noise, conditioning = fixed_noise(policy.model, range(3), 0), policy.model.encode(PROMPTS)
    with torch.no_grad(), policy.counting() as outer:
        with policy.counting() as inner:
            policy.velocity(noise, 0.5, conditioning)
        policy.velocity(noise, 0.5, conditioning)
    assert (outer.total, inner.total) == (6, 3)
