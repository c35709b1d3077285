"""The training node in the real server: the library's run, its previews, the stop button, going on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dgpo_plugin.adapters.load import read_adapter
from dgpo_plugin.training.run import train
from dgpo_plugin.training.run_folder import RunFolder
from tests.comfy_nodes.server import BadPrompt, Server, node, until

pytestmark = pytest.mark.slow

SETTINGS = "\n".join(
    (
        "model.precision=fp32",
        "evaluation.images=4",
        "evaluation.steps=4",
        "logging.sample_every=1",
        "logging.sample_images=4",
        "rollout.steps=6",
        "algorithm.timesteps=2",
        "algorithm.noisiest_steps=3",
    )
)
RESPONSE = 5.0
"""Seconds from the stop button to the end; a tenth on an idle machine, but this one may have other work."""


def training(run: str, iterations: int = 3, **changes: Any) -> dict[str, Any]:
    reward = changes.pop("reward", ("shapes", "reward"))
    inputs = {
        "model": "shapes",
        "preset": "shapes",
        "name": run,
        "iterations": iterations,
        "rank": 4,
        "prompts_per_iteration": 2,
        "group_size": 4,
        "micro_batch_size": 0,
        "seed": 0,
        "resume": False,
        "settings": SETTINGS,
    }
    return {
        "list": node("DGPOPromptList", source="shapes/train", text="", start=0, count=40),
        "held": node("DGPOPromptList", source="shapes/held-out", text="", start=0, count=8),
        "reward": node("DGPOLoadReward", reward=reward[0], function=reward[1]),
        "train": node(
            "DGPOTrainAdapter",
            prompts=["list", 0],
            reward=["reward", 0],
            held_out=["held", 0],
            **{**inputs, **changes},
        ),
    }


def lines(server: Server, name: str) -> list[dict[str, Any]]:
    file = server.base / "output" / "dgpo" / name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def interrupted(entry: dict[str, Any]) -> bool:
    return any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])


def test_it_is_the_librarys_run(server: Server, tmp_path: Path) -> None:
    """Its adapter is what `dgpo train` makes of the same configuration; ComfyUI's own nodes take what it gives."""
    graph = training("first")
    graph |= {
        "shapes": node("DGPOLoadShapes"),
        "applied": node("LoraModelLoader", model=["shapes", 0], lora=["train", 0], strength_model=1.0, bypass=False),
        "saved": node("SaveLoRA", lora=["train", 0], prefix="loras/by-comfy"),
        "graph": node("LossGraphNode", loss=["train", 1], filename_prefix="loss"),
        "file": node("PreviewAny", source=["train", 2]),
        "compared": node(
            "DGPOCompareAdapter",
            without=["shapes", 0],
            with_adapter=["applied", 0],
            clip=["shapes", 1],
            vae=["shapes", 2],
            latent=["empty", 0],
            prompts=["held", 0],
            reward=["reward", 0],
            seed=1,
            steps=4,
            cfg=1.0,
            sampler="euler",
            scheduler="simple",
        ),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
    }
    with server.listening("first") as messages:
        entry = server.wait(server.queue(graph, "first"))
        heard = messages()
    assert entry["status"]["status_str"] == "success", entry["status"]
    outputs = entry["outputs"]
    assert outputs["file"]["text"] == ["first.safetensors"]
    assert "algorithm" in outputs["train"]["text"][0]
    assert outputs["graph"]["images"]
    # Progress of every iteration, and a picture after each.
    values = [m["data"]["value"] for m in heard if m["type"] == "progress" and m["data"]["node"] == "train"]
    assert values[0] == 0
    assert values[-1] == 3
    assert sum(m["type"] == "preview" for m in heard) >= 3
    loras = server.base / "output" / "loras"
    file = read_adapter(loras / "first.safetensors")
    made, header = file.tensors, file.header
    config = RunFolder(server.base / "output" / "dgpo" / "first").read_config()
    again = read_adapter(train(config, tmp_path / "first", Console(quiet=True))).tensors
    assert made.keys() == again.keys()
    for key, value in made.items():
        torch.testing.assert_close(value, again[key], rtol=1e-4, atol=1e-6)
    assert any(value.abs().max() > 0 for key, value in made.items() if "lora_B" in key)
    assert header["dgpo.reward"] == "shapes"
    (by_comfy,) = loras.glob("by-comfy*.safetensors")
    theirs = read_adapter(by_comfy).tensors
    assert all(torch.equal(made[key], theirs[key]) for key in made)
    report = outputs["compared"]["text"][0]
    assert "gain" in report
    assert outputs["compared"]["images"]


def test_stopping_saves_and_resuming_gives_the_same_adapter(server: Server) -> None:
    whole = server.run(training("whole", 6, group_size=16))
    assert whole["train"]["text"]
    prompt = ""
    with server.listening("stopped") as messages:
        prompt = server.queue(training("stopped", 6, group_size=16), "stopped")
        until(lambda: len(lines(server, "stopped")) >= 2, "two iterations")
        pressed = time.monotonic()
        server.post("/interrupt", {})
        entry = server.wait(prompt)
        took = time.monotonic() - pressed
        said = [message["text"] for message in messages() if message["type"] == "text"]
    print(f"stopped in {took:.2f} s")
    assert interrupted(entry), entry["status"]
    assert took < RESPONSE
    done = len(lines(server, "stopped"))
    assert done < 6
    assert any(f"stopped after iteration {done} of 6, all of it saved; set resume to go on" in text for text in said)
    assert f"stopped after iteration {done} of 6" in server.log()
    read_adapter(server.base / "output" / "loras" / "stopped.safetensors")
    server.run(training("stopped", 6, group_size=16, resume=True))
    assert [line["iteration"] for line in lines(server, "stopped")] == [1, 2, 3, 4, 5, 6]
    expected = read_adapter(server.base / "output" / "loras" / "whole.safetensors").tensors
    resumed = read_adapter(server.base / "output" / "loras" / "stopped.safetensors").tensors
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.parametrize(("function", "done"), [("slow", 0), ("SlowLater", 1)])
def test_a_reward_that_takes_long_can_be_stopped_too(server: Server, function: str, done: int) -> None:
    run = server.base / "output" / "dgpo" / function
    prompt = server.queue(training(function, reward=("mine.py", function)))
    until(lambda: (run / "config.yaml").exists() and len(lines(server, function)) == done, "the run to get there")
    time.sleep(1)  # to be inside the reward, which sleeps for half a minute
    pressed = time.monotonic()
    server.post("/interrupt", {})
    entry = server.wait(prompt)
    took = time.monotonic() - pressed
    print(f"stopped in {took:.2f} s")
    assert interrupted(entry), entry["status"]
    assert took < RESPONSE
    assert len(list((run / "checkpoints").glob("[0-9]*"))) == done
    adapter = server.base / "output" / "loras" / f"{function}.safetensors"
    assert adapter.exists() == bool(done)
    if done:  # what the reward calls itself comes through every wrapper around it
        assert read_adapter(adapter).header["dgpo.reward"] == "brightness, later slowly"
    # The server is as good as before.
    assert server.run({"card": node("DGPOAdapterCard", adapter="shapes.safetensors")})


def test_a_taken_name_gets_a_number(server: Server) -> None:
    for seed in (0, 1):
        server.run(training("twice", 1, seed=seed))
    loras = server.base / "output" / "loras"
    first, second = (read_adapter(loras / f"{name}.safetensors").tensors for name in ("twice", "twice-2"))
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../outside"}, "name '../outside' must be of letters, digits"),
        ({"model": "no-such-folder"}, "model no-such-folder: no such folder"),
        ({"settings": "training.lerning_rate=1"}, "unknown key training.lerning_rate; did you mean 'learning_rate'?"),
        ({"preset": "sd35-ocr", "settings": "lora.rank=2"}, "lora.rank is an input of the node"),
        ({"settings": "rewards.ocr.weight=1"}, "rewards is an input of the node"),
        ({"settings": "rewards=ocr"}, "rewards is an input of the node"),
        ({"settings": "lora={rank: 2, alpha: 2}"}, "lora.rank is an input of the node"),
        ({"settings": "training.seed=3"}, "training.seed is an input of the node"),
        ({"reward": ("mine.py", "broken")}, "4 of 4 values are not finite"),
    ],
)
def test_mistakes_are_clear_errors(server: Server, changes: dict[str, Any], message: str) -> None:
    failure = server.error(training("wrong", 1, **changes))
    assert failure["node_id"] == "train"
    assert failure["exception_type"].endswith(("UserError", "FailedTogether"))
    assert message in failure["exception_message"]


def test_a_run_that_could_not_start_does_not_take_its_name(server: Server) -> None:
    assert "no such folder" in server.error(training("free", 1, model="no-such-folder"))["exception_message"]
    graph = training("free", 1)
    graph["list"]["inputs"]["start"] = 5
    server.run(graph)
    assert (server.base / "output" / "loras" / "free.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 8}, "lora.rank is 8, but resumed was started with 4"), ({"iterations": 9}, "training.iterations is 9")],
)
def test_a_run_goes_on_only_as_it_began(server: Server, changes: dict[str, Any], message: str) -> None:
    name = "resumed"
    if not (server.base / "output" / "dgpo" / name).exists():
        server.run(training(name, 1))
    failure = server.error(training(name, **{"iterations": 1, "resume": True, **changes}))
    assert message in failure["exception_message"]


def test_a_run_goes_on_only_with_its_prompts(server: Server) -> None:
    server.run(training("prompted", 1))
    other = training("prompted", 1, resume=True)
    other["list"]["inputs"]["start"] = 5
    assert "prompted was trained on other prompts" in server.error(other)["exception_message"]


def test_a_run_can_be_made_longer_where_nothing_depends_on_its_end(server: Server) -> None:
    constant = f"{SETTINGS}\ntraining.decay=none"
    server.run(training("longer", 1, settings=constant))
    server.run(training("longer", 2, settings=constant, resume=True))
    assert [line["iteration"] for line in lines(server, "longer")] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"iterations": 0}, "iterations"),
        ({"rank": 4096}, "rank"),
        ({"group_size": 1}, "group_size"),
        ({"preset": "x"}, "preset"),
    ],
)
def test_values_beyond_the_limits_are_refused_at_once(server: Server, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(BadPrompt) as refused:
        server.queue(training("limits", **changes))
    errors = refused.value.answer["node_errors"]["train"]["errors"]
    assert [error["extra_info"]["input_name"] for error in errors] == [name]
