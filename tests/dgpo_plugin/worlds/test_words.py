"""The world of words: what it can say, that its pictures are read, and the shipped pipeline that draws them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from string import ascii_letters, digits

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import ImageFont

from dgpo_plugin.common.names import WORLDS
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.registry import imported
from dgpo_plugin.config.fields import ModelConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.models import load_model
from dgpo_plugin.models.generate import fixed_noise, generate
from dgpo_plugin.models.load import world_pipeline
from dgpo_plugin.prompts.registry import load_prompts
from dgpo_plugin.rewards.ocr.reward import OcrExactReward, OcrReward, requested_texts
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checks import picture_size
from dgpo_plugin.worlds.shapes.pretrain_loops import tokenize
from dgpo_plugin.worlds.words import captions, render
from dgpo_plugin.worlds.words.pretrain import SETTINGS, draw_words, make_pipeline, pretrain
from dgpo_plugin.worlds.words.pretrain_networks import spelling_tokenizer

pytestmark = pytest.mark.fast
SETS = ("train", "validation", "held-out", "out-of-domain")
TINY = replace(SETTINGS, seed=3, pictures=32, vae_iterations=2, vae_batch=4, iterations=2, batch=4, layers=1)
SMALL = [
    "training.iterations=2",
    "training.prompts_per_iteration=2",
    "training.group_size=2",
    "evaluation.images=2",
    "model.precision=fp32",
]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Prompt]]:
    return {name: load_prompts(f"words/{name}") for name in SETS}


def words(prompts: list[Prompt]) -> list[str]:
    return [prompt.metadata["text"] for prompt in prompts]


# ---- prompts


def test_a_prompt_says_what_its_metadata_ask_for(sets: dict[str, list[Prompt]]) -> None:
    for prompt in (prompt for prompts in sets.values() for prompt in prompts):
        said = re.fullmatch(r'"([A-Z]{3})" in (\w+) on a (\w+) (\w+) ground', prompt.text)
        assert said is not None
        assert dict(zip(("text", "font", "ground", "color"), said.groups(), strict=True)) == prompt.metadata
        assert requested_texts(prompt) == requested_texts(Prompt(prompt.text)) == (said[1],)
        assert not set(said[1]) & set("IJOQ")


def test_no_word_stands_in_two_sets_or_twice_in_one(sets: dict[str, list[Prompt]]) -> None:
    for one, other in combinations(sets.values(), 2):
        assert not set(words(one)) & set(words(other))
    assert all(len(set(words(prompts))) == len(prompts) for prompts in sets.values())
    assert len(sets["held-out"]) >= 240 <= len(sets["out-of-domain"])
    assert len(sets["validation"]) >= 100


def test_training_sees_two_fonts_and_plain_grounds_and_the_others_are_out_of_domain(
    sets: dict[str, list[Prompt]],
) -> None:
    def kinds(name: str, *fields: str) -> Counter[tuple[str, ...]]:
        return Counter(tuple(prompt.metadata[field] for field in fields) for prompt in sets[name])

    for name in ("train", "validation", "held-out"):
        found = kinds(name, "font", "ground", "color")
        assert found.keys() == set(product(("sans", "serif"), ("plain",), captions.COLORS))
        assert max(found.values()) - min(found.values()) <= 1
    outside = kinds("out-of-domain", "font", "ground")
    inside = set(product(("sans", "serif"), ("plain",)))
    assert outside.keys() == set(product(captions.FONTS, captions.GROUNDS)) - inside
    of_font, of_ground = kinds("out-of-domain", "font"), kinds("out-of-domain", "ground")
    assert of_ground["plain",] == of_font["sans",] + of_font["serif",] == 80


@pytest.mark.parametrize(("asked", "size"), [({}, (64, 32)), ({"width": 64, "height": 64}, (64, 64))])
def test_its_pictures_have_their_own_size_where_no_other_is_asked_for(
    asked: dict[str, int], size: tuple[int, int]
) -> None:
    config = ModelConfig(path="words", precision="fp32", **asked)
    model = load_model(config)
    assert (model.width, model.height) == size == picture_size(config)


# ---- pictures


@pytest.mark.parametrize("font", captions.FONTS)
def test_a_word_that_is_drawn_is_read(font: str) -> None:
    rng = np.random.default_rng(0)
    kinds = product(captions.GROUNDS, captions.COLORS)
    prompts = [captions.prompt(captions.HELD_OUT[n], font, *kind) for n, kind in enumerate(kinds)]
    pictures = torch.from_numpy(np.stack([render.render(prompt.metadata, rng) for prompt in prompts]))
    assert pictures.shape == (24, 3, 32, 64)
    assert (OcrExactReward()(pictures, prompts) == 1).float().mean() >= 0.97
    # Of another word little is read.
    assert OcrReward()(pictures, prompts[5:] + prompts[:5]).mean() < 0.5


def test_a_ground_has_its_color_and_its_pattern() -> None:
    rng = np.random.default_rng(0)
    shades = {}
    for ground in captions.GROUNDS:
        asked = {"text": "LEX", "font": "mono", "ground": ground, "color": "blue"}
        corner = render.render(asked, rng)[:, :8, :8].reshape(3, -1)
        shades[ground] = len(np.unique(corner.round(3), axis=1).T)
        assert np.all(corner[2] > corner[:2].max(0))
    assert shades == {"plain": 1, "striped": 2, "checkered": 2, "dotted": 2}


def test_the_fonts_have_their_license_beside_them_and_no_other_letter() -> None:
    folder = Path(render.__file__).parent / "fonts"
    assert "Bitstream Vera Fonts Copyright" in (folder / "LICENSE").read_text()
    files = sorted(file.stem for file in folder.glob("*.ttf"))
    assert files == sorted(render.FONT_FILES.values())
    for file in files:
        font = ImageFont.truetype(str(folder / f"{file}.ttf"), 24)
        missing = bytes(font.getmask("☃"))
        drawn = {letter for letter in ascii_letters + digits if bytes(font.getmask(letter)) != missing}
        assert drawn == set(captions.CONSONANTS + captions.VOWELS)


# ---- the pipeline


def test_words_are_spelled_and_kinds_are_one_token(sets: dict[str, list[Prompt]]) -> None:
    tokenizer = spelling_tokenizer()
    assert tokenizer.tokenize('"SAN" in sans on a plain red ground')[:9] == [
        '"</w>', "s", "a", "n</w>", '"</w>', "in", "sans", "on", "a",
    ]  # fmt: skip
    lengths = {len(tokenizer(prompt.text).input_ids) for prompts in sets.values() for prompt in prompts}
    assert lengths == {14}


def test_pictures_are_those_of_the_seed_and_of_trained_words() -> None:
    prompts, pictures = draw_words(TINY)
    assert (pictures.shape, pictures.dtype) == ((32, 3, 32, 64), torch.uint8)
    assert set(words(prompts)) <= set(captions.TRAIN)
    again, same = draw_words(TINY)
    assert prompts == again
    assert torch.equal(pictures, same)


def test_the_world_names_its_recipe() -> None:
    assert imported(WORLDS.load("words").pretrain) is pretrain


@pytest.mark.slow
def test_a_shorter_pretraining_is_the_beginning_of_a_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, list[torch.Tensor]] = {"one": [], "longer": []}
    monkeypatch.setattr("dgpo_plugin.worlds.words.pretrain.GUIDANCES", (1.0,))  # looked at once each time
    for name, iterations in (("one", 2), ("longer", 3)):

        def keep(pipeline: StableDiffusion3Pipeline, *_: object, name: str = name, **__: object) -> dict[str, float]:
            kept[name].append(pipeline.transformer.proj_out.weight.detach().clone())
            return {}

        monkeypatch.setattr("dgpo_plugin.worlds.words.pretrain.words_read", keep)
        make_pipeline(tmp_path / name, replace(TINY, iterations=iterations, log_every=2))
    assert torch.equal(kept["one"][0], kept["longer"][0])
    assert not torch.equal(kept["one"][0], kept["longer"][1])
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "one")
    pipeline.set_progress_bar_config(disable=True)
    prompt = captions.held_out_prompts()[0].text
    assert pipeline(prompt, width=64, height=32, num_inference_steps=1).images[0].size == (64, 32)


def test_the_shipped_pipeline_is_small_and_runs_plainly() -> None:
    folder = world_pipeline("words")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10 * 2**20
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    text = captions.held_out_prompts()[0].text
    assert pipeline(text, width=64, height=32, num_inference_steps=2).images[0].size == (64, 32)
    assert torch.equal(tokenize(pipeline, [text])[0, :14], torch.tensor(spelling_tokenizer()(text).input_ids))


def test_it_draws_words_that_it_never_saw_but_not_all_of_them() -> None:
    model, prompts = load_model(load_config("words", SMALL).model), captions.held_out_prompts()[:60]
    pictures = generate(model, [prompt.text for prompt in prompts], fixed_noise(model, range(60), 0), 10, 3.0)
    assert 0.25 < OcrExactReward()(pictures, prompts).mean() < 0.75


@pytest.mark.parametrize(("preset", "tuned"), [("words", "shapes-2"), ("words-unguided", "shapes-unguided")])
def test_its_presets_train(preset: str, tuned: str) -> None:
    config = load_config(preset, SMALL)
    assert config.algorithm.model_dump() == load_config(tuned).algorithm.model_dump()
    trainer = build_trainer(config)
    records = list(trainer.iterations())
    assert len(records) == 2
    assert all(0 <= record["reward"] <= 1 for record in records)
