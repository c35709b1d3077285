"""The pack as ComfyUI sees it: loaded without a warning, documented, and its examples run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgpo_plugin.commands.comfy_install import oldest_versions
from tests.comfy_nodes import environment
from tests.comfy_nodes.node_definitions import LOCALE, node_definitions
from tests.comfy_nodes.server import BadPrompt, Server, node
from tests.comfy_nodes.workflows import as_prompt

pytestmark = pytest.mark.slow

NODES = {
    "DGPOLoadAdapter",
    "DGPOAdapterCard",
    "DGPOLoadReward",
    "DGPOScoreImages",
    "DGPOBestOfN",
    "DGPOCompareAdapter",
    "DGPOTrainAdapter",
    "DGPOPromptList",
    "DGPOLoadShapes",
}
EXAMPLES = sorted((environment.ROOT / "example_workflows").glob("*.json"))


def ours(server: Server) -> dict[str, Any]:
    return {name: info for name, info in server.get("/object_info").items() if name.startswith("DGPO")}


def test_it_loads_without_a_warning(server: Server) -> None:
    assert set(ours(server)) == NODES
    log = re.sub(r"\x1b\[[0-9;]*m", "", server.log())
    start = log.index("Import times for custom nodes")
    loading = log[start : log.index("\n\n", start)]
    assert re.search(r"seconds: .*/dgpo-plugin$", loading, re.MULTILINE), loading
    about_us = [line for line in log[: start + len(loading)].splitlines() if "dgpo" in line]
    assert not [line for line in about_us if re.search("WARN|ERROR|IMPORT FAILED|Traceback", line)], about_us


def test_a_pack_beside_ours_still_loads(server: Server) -> None:
    assert "NeighbourLoadedModels" in server.get("/object_info")
    assert "neighbour: loaded" in server.log()
    assert server.run({"told": node("NeighbourLoadedModels", asked=-1)})["told"]["text"]


def test_everything_is_explained_and_limited(server: Server) -> None:
    for name, info in ours(server).items():
        assert info["display_name"], name
        assert info["description"], name
        assert all(info["output_tooltips"]), name
        assert all(info["output_name"]), name
        for key, (kind, *rest) in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            options = rest[0]
            assert options.get("tooltip"), f"{name}.{key} has no tooltip"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], f"{name}.{key}"
            if kind in ("STRING", "BOOLEAN"):
                assert "default" in options, f"{name}.{key}"
            if kind == "COMBO":
                assert options.get("default", options["options"][0]) in options["options"], f"{name}.{key}"


def test_every_node_has_a_help_page(server: Server) -> None:
    for name in NODES:
        page = server.get(f"/extensions/dgpo-plugin/docs/{name}.md").decode()
        assert page.startswith("# "), name
        assert len(page) > 200, name


def test_the_locale_says_what_the_nodes_say(server: Server) -> None:
    """Otherwise: python -m tests.comfy_nodes.node_definitions"""
    written = json.loads(LOCALE.read_text())
    expected = node_definitions(server.get("/object_info"))
    # Files of rewards are the tests' own.
    assert written == expected
    assert server.get("/i18n")["en"]["nodeDefs"].items() >= written.items()


def test_the_text_script_is_served(server: Server) -> None:
    assert "/extensions/dgpo-plugin/js/text.js" in server.get("/extensions")


def test_the_examples_are_offered_with_thumbnails(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")["dgpo-plugin"]) == [path.stem for path in EXAMPLES]
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        thumbnail = server.get(f"/api/workflow_templates/dgpo-plugin/{path.stem}.jpg")
        assert thumbnail == path.with_suffix(".jpg").read_bytes()
        with Image.open(path.with_suffix(".jpg")) as opened:
            assert max(opened.size) <= 1024


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs_as_it_is(server: Server, path: Path) -> None:
    workflow = json.loads(path.read_text())
    outputs = server.run(as_prompt(workflow, server.get("/object_info")))
    (saved,) = [entry["id"] for entry in workflow["nodes"] if entry["type"] == "SaveImage"]
    for image in outputs[str(saved)]["images"]:
        with Image.open(server.base / "output" / image["subfolder"] / image["filename"]) as opened:
            low, high = np.asarray(opened.convert("L"), dtype=int).min(), np.asarray(opened.convert("L")).max()
            assert high - low > 50, "a picture with nothing in it"


def test_the_examples_use_every_node() -> None:
    used = {entry["type"] for path in EXAMPLES for entry in json.loads(path.read_text())["nodes"]}
    assert used >= NODES


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        ({"x": node("DGPOAdapterCard", adapter="no-such-file.safetensors")}, "value_not_in_list"),
        ({"x": node("DGPOAdapterCard")}, "required_input_missing"),
        (
            {
                "r": node("DGPOLoadReward", reward="no-such-reward", function="reward"),
                "x": node("DGPOScoreImages", reward=["r", 0]),
            },
            "value_not_in_list",
        ),
        (
            {
                "s": node("DGPOLoadShapes"),
                "a": node("DGPOLoadAdapter", model=["s", 0], adapter="shapes.safetensors", strength=99.0),
                "x": node("PreviewAny", source=["a", 1]),
            },
            "value_bigger_than_max",
        ),
        (
            {
                "s": node("DGPOLoadShapes"),
                "a": node("DGPOLoadAdapter", model=["s", 1], adapter="shapes.safetensors", strength=1.0),
                "x": node("PreviewAny", source=["a", 1]),
            },
            "return_type_mismatch",
        ),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(server: Server, graph: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadPrompt) as refused:
        server.queue(graph)
    kinds = {error["type"] for node_ in refused.value.answer["node_errors"].values() for error in node_["errors"]}
    assert kind in kinds


def test_different_bases_cannot_be_compared(server: Server) -> None:
    graph = {
        "one": node("DGPOLoadShapes"),
        "other": node("UNETLoader", unet_name="cut.safetensors", weight_dtype="default"),
        "list": node("DGPOPromptList", source="the text below", text="a circle", start=0, count=0),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "compared": node(
            "DGPOCompareAdapter",
            without=["one", 0],
            with_adapter=["other", 0],
            clip=["one", 1],
            vae=["one", 2],
            latent=["empty", 0],
            prompts=["list", 0],
            seed=0,
            steps=1,
            cfg=1.0,
            sampler="euler",
            scheduler="simple",
        ),
    }
    assert "the two models are different bases" in server.error(graph)["exception_message"]


def test_pixels_survive_the_embedded_vae(server: Server) -> None:
    """VAE Encode and VAE Decode take it as they take any other."""
    picture = Image.new("RGB", (64, 64), (18, 18, 22))
    picture.paste((230, 40, 45), (16, 16, 48, 48))
    picture.save(server.base / "input" / "square.png")
    graph = {
        "shapes": node("DGPOLoadShapes"),
        "picture": node("LoadImage", image="square.png"),
        "latents": node("VAEEncode", pixels=["picture", 0], vae=["shapes", 2]),
        "decoded": node("VAEDecode", samples=["latents", 0], vae=["shapes", 2]),
        "saved": node("SaveImage", images=["decoded", 0], filename_prefix="round-trip"),
    }
    (image,) = server.run(graph)["saved"]["images"]
    with Image.open(server.base / "output" / image["filename"]) as opened:
        pixels = np.asarray(opened.convert("RGB"), dtype=int)
        middle, corner = pixels[32, 32], pixels[4, 4]
    assert all(abs(a - b) < 30 for a, b in zip(middle, (230, 40, 45), strict=True)), middle
    assert all(abs(a - b) < 30 for a, b in zip(corner, (18, 18, 22), strict=True)), corner


def test_dgpo_comfy_install_finds_the_real_one_ready(server: Server, tmp_path: Path) -> None:
    """ComfyUI 0.30.0 with its own environment, in a folder of links, so that the server's stays as it is."""
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    for name in ("main.py", "comfyui_version.py", "comfy_api"):
        (comfyui / name).symlink_to(environment.SERVER / name)
    (comfyui / "custom_nodes").mkdir()
    command = [environment.PYTHON, "-m", "dgpo_plugin", "comfy", "install", comfyui, "--python", environment.PYTHON]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.30.0 in" in done.stdout
    assert f"{len(oldest_versions())} of {len(oldest_versions())} as needed" in done.stdout
    assert (comfyui / "custom_nodes" / "dgpo-plugin").resolve() == environment.ROOT


def test_installing_the_requirements_moves_nothing(server: Server) -> None:
    command = [
        str(environment.PYTHON),
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-input",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*command, "--requirement", str(environment.ROOT / "requirements.txt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_a_clone_works_without_installing_the_library(server: Server, tmp_path: Path) -> None:
    """Loaded as ComfyUI loads a pack, by a python that knows nothing of this project."""
    script = f"""
import asyncio, importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [{str(environment.SERVER)!r}, *(place for place in sys.path if place and "editable" not in place)]
assert importlib.util.find_spec("dgpo_plugin") is None
sys.argv[1:] = ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.utils, server, nodes
spec = importlib.util.spec_from_file_location("/somewhere/dgpo-plugin", {str(environment.ROOT / "__init__.py")!r})
pack = importlib.util.module_from_spec(spec)
sys.modules["/somewhere/dgpo-plugin"] = pack
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
print(len(asyncio.run(extension.get_node_list())), pack.WEB_DIRECTORY)
import dgpo_plugin
print(dgpo_plugin.__file__)
"""
    done = subprocess.run([environment.PYTHON, "-E", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, made, where = done.stdout.splitlines()
    assert made == "9 ./comfy_nodes/web"
    assert Path(where) == environment.ROOT / "dgpo_plugin" / "__init__.py"
