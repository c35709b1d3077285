"""Making a world's pipeline: the shipped one's recipe on a tiny scale, and worlds from elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusion3Pipeline

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.names import WORLDS
from dgpo_plugin.common.registry import imported
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.worlds.shapes.pretrain import draw_scenes, go_on_with, make_pipeline, pretrain
from dgpo_plugin.worlds.shapes.pretrain_loops import PaddedAttention, sharpen_decoder
from dgpo_plugin.worlds.shapes.pretrain_networks import TEXT_TOKENS, PretrainConfig, build_pipeline, build_vae
from dgpo_plugin.worlds.shapes.scenes import all_prompts
from dgpo_plugin.worlds.shapes_2 import scenes as second_version
from dgpo_plugin.worlds.shapes_2.pretrain import settings

TINY = PretrainConfig(seed=3, pictures=64, vae_iterations=2, vae_batch=4, iterations=2, batch=4, layers=1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["worlds", "pretrain", *map(str, arguments)])


@pytest.mark.slow
def test_a_seed_makes_one_pipeline(tmp_path: Path) -> None:
    for name in ("one", "again"):
        make_pipeline(tmp_path / name, TINY)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    log = [json.loads(line) for line in (tmp_path / "one" / "pretrain.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == ["config", "vae", "vae", "denoiser"]
    assert log[-1]["accuracy_guidance_1"].keys() == log[-1]["accuracy_guidance_2.5"].keys()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "one")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.fast
def test_the_shapes_world_names_its_recipe() -> None:
    assert imported(WORLDS.load("shapes").pretrain) is pretrain


@pytest.mark.fast
def test_scenes_are_those_of_the_seed() -> None:
    prompts, pictures = draw_scenes(TINY)
    assert pictures.shape == (64, 3, 64, 64)
    assert pictures.dtype == torch.uint8
    again, same = draw_scenes(TINY)
    assert prompts == again
    assert torch.equal(pictures, same)


@pytest.mark.fast
def test_a_second_version_goes_on_with_the_first_ones_networks_and_words() -> None:
    """Every weight is the first one's but the embeddings of words that it does not have."""
    start = StableDiffusion3Pipeline.from_pretrained(world_pipeline("shapes"))
    pipeline = build_pipeline(build_vae(), settings(), second_version.all_prompts())
    before = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    go_on_with(pipeline, start)
    for key, value in start.transformer.state_dict().items():
        assert torch.equal(pipeline.transformer.state_dict()[key], value), key
    after, old = (each.text_encoder.get_input_embeddings().weight for each in (pipeline, start))
    (new_id, old_id), ring = ([p.tokenizer.get_vocab()["circle</w>"] for p in (pipeline, start)], "ring</w>")
    assert torch.equal(after[new_id], old[old_id])
    assert ring not in start.tokenizer.get_vocab()
    unknown = pipeline.tokenizer.get_vocab()[ring]
    assert torch.equal(after[unknown], before[unknown])


@pytest.mark.fast
def test_the_decoder_goes_on_alone() -> None:
    torch.manual_seed(0)
    vae = build_vae()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    _, pictures = draw_scenes(TINY)
    log: list[dict[str, object]] = []
    config = replace(TINY, decoder_iterations=2)
    zeros = torch.zeros(64, 16, 8, 8)
    sharpen_decoder(vae, pictures, zeros, config, lambda **entry: log.append(entry), in_bf16=False)
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder"}
    assert [entry["iteration"] for entry in log] == [0, 1]


@pytest.mark.fast
def test_training_ends_where_it_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first measurement whose best guidance reaches the mark."""
    means = iter([0.2, 0.3, 0.4, 0.6, 0.1, 0.1])
    monkeypatch.setattr("dgpo_plugin.worlds.shapes.pretrain.task_accuracy", lambda *_: {"mean": next(means)})
    make_pipeline(tmp_path, replace(TINY, iterations=9, log_every=1, enough=0.5))
    log = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in log if entry["stage"] == "denoiser"] == [1, 2]


@pytest.mark.fast
def test_a_token_counted_often_is_as_many_tokens() -> None:
    """The whole denoiser with one third-encoder token for 77, against itself with 77."""
    torch.manual_seed(0)
    transformer = build_pipeline(build_vae(), TINY, all_prompts()).transformer.eval()
    for parameter in transformer.parameters():  # the modulations start at zero, and all else would do nothing
        torch.nn.init.normal_(parameter, std=0.2)
    latents, context, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, TEXT_TOKENS, 128), torch.randn(2, 128)

    def predict(zeros: int) -> torch.Tensor:
        padded = torch.nn.functional.pad(context, (0, 0, 0, zeros))
        with torch.no_grad():
            predicted: torch.Tensor = transformer(latents, padded, pooled, torch.tensor([500.0, 900.0])).sample
        return predicted

    expected, once = predict(77), predict(1)
    attention = PaddedAttention()
    transformer.set_attn_processor(attention)
    attention.count_last_token(torch.tensor([77, 77]))
    assert torch.allclose(predict(1), expected, atol=1e-4)
    attention.count_last_token_once()
    assert torch.allclose(predict(1), once, atol=1e-4)
    assert not torch.allclose(once, expected, atol=1e-2)


@pytest.mark.fast
def test_a_world_of_ones_own_is_made_by_its_own_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dgpo_plugin.common.names import World\n"
        "def make(output, seed, iterations, compile_model):\n"
        "    output.mkdir()\n"
        "    (output / 'made.txt').write_text(f'{seed} {iterations} {compile_model}')\n"
        "world = World(pipeline='unused', pretrain=make)\n"
        "ready_made = World(pipeline='unused')\n"
    )
    done = run(f"{file}:world", "--output", tmp_path / "made", "--seed", 4, "--no-compile")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made" / "made.txt").read_text() == "4 None False"
    refused = run(f"{file}:ready_made", "--output", tmp_path / "other")
    assert refused.exit_code == 2
    assert "its pipeline cannot be made again" in refused.output


@pytest.mark.fast
def test_an_unknown_world_is_one_line(tmp_path: Path) -> None:
    done = run("shape", "--output", tmp_path / "made")
    assert done.exit_code == 2
    assert done.output.startswith("error: no world 'shape'; did you mean 'shapes'?")
    assert len(done.output.splitlines()) == 1
