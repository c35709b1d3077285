"""Prompts, rewards and what is chosen by them, in the real server."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from dgpo_plugin.worlds.shapes.reward import ShapesReward
from dgpo_plugin.worlds.shapes.scenes import train_prompts
from tests.comfy_nodes.server import Server, node, until

pytestmark = pytest.mark.slow


def shown(server: Server, graph: dict[str, Any], **links: list[Any]) -> dict[str, list[str]]:
    """What comes out of the named outputs, as ComfyUI's own text preview shows it, an entry for each item of a list."""
    previews = {f"shown {name}": node("PreviewAny", source=link) for name, link in links.items()}
    outputs = server.run({**graph, **previews})
    return {name: outputs[f"shown {name}"]["text"] for name in links}


def grey(server: Server, *levels: int) -> dict[str, Any]:
    """A graph whose node ``batch`` gives grey pictures of those levels, in [0, 255]."""
    graph: dict[str, Any] = {}
    for n, level in enumerate(levels):
        name = f"grey-{level}.png"
        Image.new("RGB", (8, 8), (level, level, level)).save(server.base / "input" / name)
        graph[f"picture {n}"] = node("LoadImage", image=name)
    graph["batch"] = node("ImageBatch", image1=["picture 0", 0], image2=["picture 1", 0])
    for n in range(2, len(levels)):
        graph["batch"], graph[f"batch {n}"] = (
            node("ImageBatch", image1=[f"batch {n}", 0], image2=[f"picture {n}", 0]),
            graph["batch"],
        )
    return graph


def own(function: str) -> dict[str, Any]:
    return node("DGPOLoadReward", reward="mine.py", function=function)


def prompts(text: str = "anything") -> dict[str, Any]:
    return node("DGPOPromptList", source="the text below", text=text, start=0, count=0)


def test_a_shipped_prompt_list(server: Server) -> None:
    graph = {"list": node("DGPOPromptList", source="shapes/train", text="", start=3, count=2)}
    found = shown(server, graph, texts=["list", 1], number=["list", 2])
    assert found == {"texts": [prompt.text for prompt in train_prompts()[3:5]], "number": ["2"]}


def test_an_own_prompt_list(server: Server) -> None:
    found = shown(server, {"list": prompts("one\n\n two \n")}, texts=["list", 1], number=["list", 2])
    assert found == {"texts": ["one", "two"], "number": ["2"]}


def test_scores_are_the_rewards_own(server: Server) -> None:
    """Of a batch from the embedded model, with the verifier called here on the saved pictures."""
    # Hard enough that some pictures are right and some are not.
    number = next(n for n, prompt in enumerate(train_prompts()) if prompt.text.startswith("four"))
    prompt = train_prompts()[number]
    graph = {
        "shapes": node("DGPOLoadShapes"),
        "positive": node("CLIPTextEncode", clip=["shapes", 1], text=prompt.text),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=6),
        "sampled": node(
            "KSampler",
            model=["shapes", 0],
            seed=1,
            steps=8,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["positive", 0],
            negative=["positive", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        ),
        "pictures": node("VAEDecode", samples=["sampled", 0], vae=["shapes", 2]),
        "saved": node("SaveImage", images=["pictures", 0], filename_prefix="scored"),
        "list": node("DGPOPromptList", source="shapes/train", text="", start=number, count=1),
        "reward": node("DGPOLoadReward", reward="shapes", function="reward"),
        "scored": node("DGPOScoreImages", images=["pictures", 0], reward=["reward", 0], prompts=["list", 0]),
        "best": node(
            "DGPOBestOfN",
            images=["pictures", 0],
            reward=["reward", 0],
            prompts=["list", 0],
            k=2,
            latents=["sampled", 0],
        ),
        "again": node("VAEDecode", samples=["best", 1], vae=["shapes", 2]),
        "kept": node("SaveImage", images=["best", 0], filename_prefix="kept"),
        "decoded": node("SaveImage", images=["again", 0], filename_prefix="decoded"),
    }
    links = {"scores": ["scored", 0], "mean": ["scored", 1], "indices": ["best", 2], "kept": ["best", 3]}
    previews = {f"shown {name}": node("PreviewAny", source=link) for name, link in links.items()}
    outputs = server.run({**graph, **previews})

    def pictures(name: str) -> torch.Tensor:
        files = [server.base / "output" / image["filename"] for image in outputs[name]["images"]]
        read = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255 for file in files]
        return torch.from_numpy(np.stack(read)).movedim(-1, 1)

    expected = ShapesReward()(pictures("saved"), [prompt] * 6)
    scores = torch.tensor([float(text) for text in outputs["shown scores"]["text"]])
    assert len(set(expected.tolist())) > 1, "pictures that are all alike would prove nothing"
    torch.testing.assert_close(scores, expected)
    assert float(outputs["shown mean"]["text"][0]) == pytest.approx(expected.mean().item())
    order = sorted(range(6), key=lambda n: -expected[n].item())[:2]
    assert [int(text) for text in outputs["shown indices"]["text"]] == order
    assert [float(text) for text in outputs["shown kept"]["text"]] == pytest.approx([expected[n].item() for n in order])
    assert torch.equal(pictures("kept"), pictures("saved")[order])
    # The latents that came along are those pictures'; the batch's size moves the last bit.
    assert (pictures("decoded") - pictures("kept")).abs().max() <= 1 / 255


def test_a_list_of_pictures_has_a_prompt_each(server: Server) -> None:
    """What runs once for each prompt comes back together, in pictures of any size."""
    for name, size, level in (("small.png", 8, 0), ("large.png", 16, 255)):
        Image.new("RGB", (size, size), (level,) * 3).save(server.base / "input" / name)
    graph = {
        "small": node("LoadImage", image="small.png"),
        "large": node("LoadImage", image="large.png"),
        "both": node("CreateList", **{"inputs.input0": ["small", 0], "inputs.input1": ["large", 0]}),
        "reward": own("brightness"),
        "list": prompts("dark\nbright"),
        "scored": node("DGPOScoreImages", images=["both", 0], reward=["reward", 0], prompts=["list", 0]),
    }
    (report,) = server.run(graph)["scored"]["text"]
    assert report.splitlines() == [
        "mine.py:brightness: mean 0.5000 of 2",
        "   0    0.0000  dark",
        "   1    1.0000  bright",
    ]


def test_words_are_read(server: Server) -> None:
    picture = Image.new("RGB", (320, 128), "white")
    ImageDraw.Draw(picture).text((40, 30), "HELLO", fill="black", font=ImageFont.load_default(size=64))
    picture.save(server.base / "input" / "hello.png")
    graph = {
        "picture": node("LoadImage", image="hello.png"),
        "reward": node("DGPOLoadReward", reward="ocr", function="reward"),
        "right": prompts('A sign that reads "Hello"'),
        "wrong": prompts('A sign that reads "Quartz"'),
        "scored": node("DGPOScoreImages", images=["picture", 0], reward=["reward", 0], prompts=["right", 0]),
        "other": node("DGPOScoreImages", images=["picture", 0], reward=["reward", 0], prompts=["wrong", 0]),
    }
    found = shown(server, graph, right=["scored", 1], wrong=["other", 1])
    assert float(found["right"][0]) == 1
    assert float(found["wrong"][0]) < 0.5


def free(server: Server, **what: bool) -> None:
    server.post("/free", what)


def loaded_models(server: Server, asked: int) -> list[str]:
    (text,) = server.run({"told": node("NeighbourLoadedModels", asked=asked)})["told"]["text"]
    names: list[str] = json.loads(text)
    return names


def test_a_reward_is_loaded_once_and_unloaded_by_comfyui(server: Server) -> None:
    def mean(*levels: int) -> float:
        graph = {**grey(server, *levels), "reward": own("Neural"), "list": prompts()}
        graph["scored"] = node("DGPOScoreImages", images=["batch", 0], reward=["reward", 0], prompts=["list", 0])
        return float(shown(server, graph, mean=["scored", 1])["mean"][0])

    made = server.log().count("own rewards: network made")
    assert mean(51, 102) == pytest.approx(0.3, abs=1e-6)
    assert server.log().count("own rewards: network made") == made + 1
    assert "BrightnessNet" in loaded_models(server, 1)
    # Everything that ComfyUI keeps is thrown away: its models' memory and the outputs of nodes.
    free(server, unload_models=True, free_memory=True)
    asked = iter(range(2, 1000))
    until(lambda: "BrightnessNet" not in loaded_models(server, next(asked)), "the reward to be unloaded", 30)
    assert mean(102, 153) == pytest.approx(0.5, abs=1e-6)
    assert "BrightnessNet" in loaded_models(server, 1001)
    assert server.log().count("own rewards: network made") == made + 1


def test_a_changed_file_is_loaded_again(server: Server) -> None:
    file = server.base / "models" / "dgpo_rewards" / "changing.py"

    def mean() -> float:
        graph = {**grey(server, 0, 255), "list": prompts()}
        graph["reward"] = node("DGPOLoadReward", reward="changing.py", function="reward")
        graph["scored"] = node("DGPOScoreImages", images=["batch", 0], reward=["reward", 0], prompts=["list", 0])
        return float(shown(server, graph, mean=["scored", 1])["mean"][0])

    file.write_text("def reward(images, prompts): return images.mean((1, 2, 3))\n")
    until(lambda: "changing.py" in str(server.get("/object_info/DGPOLoadReward")), "the folder to be read again")
    assert mean() == pytest.approx(0.5)
    file.write_text("def reward(images, prompts): return images.mean((1, 2, 3)) + 1\n")
    assert mean() == pytest.approx(1.5)


def test_a_rewards_settings(server: Server) -> None:
    graph = {**grey(server, 51, 102), "reward": own("Scaled"), "list": prompts()}
    graph["reward"]["inputs"]["settings"] = "options.factor=10\n\n batch_size=4\n"
    graph["scored"] = node("DGPOScoreImages", images=["batch", 0], reward=["reward", 0], prompts=["list", 0])
    assert float(shown(server, graph, mean=["scored", 1])["mean"][0]) == pytest.approx(10 * 0.3 + 4, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "at", "message"),
    [
        ({"best": {"k": 3}}, "best", "k is 3, but the batch has 2 pictures"),
        ({"list": {"text": "a\nb\nc"}}, "best", "3 prompts for 2 pictures"),
        ({"list": {"text": "  "}}, "list", "the text is empty"),
        ({"list": {"start": 9}}, "list", "start 9 is behind the last of 1 prompts"),
        ({"list": {"text": "nowhere.txt"}}, "list", "prompt file nowhere.txt: No such file"),
        ({"reward": {"function": "nothing"}}, "reward", "defines no 'nothing'"),
        ({"reward": {"function": "broken"}}, "best", "2 of 2 values are not finite"),
        ({"reward": {"settings": "batch_sise=4"}}, "reward", "unknown key batch_sise; did you mean 'batch_size'?"),
        (
            {"reward": {"function": "Scaled", "settings": "options.facto=2"}},
            "reward",
            "no option 'facto'; did you mean",
        ),
        ({"reward": {"reward": "shapes"}}, "best", "judges 64 x 64 RGB pictures"),
    ],
)
def test_mistakes_are_clear_errors(server: Server, change: dict[str, Any], at: str, message: str) -> None:
    graph = {**grey(server, 10, 20), "reward": own("brightness"), "list": prompts()}
    graph["best"] = node("DGPOBestOfN", images=["batch", 0], reward=["reward", 0], prompts=["list", 0], k=1)
    for name, inputs in change.items():
        graph[name]["inputs"].update(inputs)
    failure = server.error(graph)
    assert failure["node_id"] == at
    assert failure["exception_type"].endswith("UserError")
    assert message in failure["exception_message"]
