"""The valid inputs that hostile ones are made from; small, and all made here."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from dgpo_plugin.adapters.hashes import MODELSPEC, header_hashes
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.checkpoint import Progress, _State, save_checkpoint
from dgpo_plugin.training.identity import RunIdentity
from tests.bench.report.synthetic import World, write_synthetic

PICTURES = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP")
BRIGHTNESS = 127 / 255
PROMPTS = {
    ".txt": "a red cat\na blue dog",
    ".jsonl": '{"prompt": "a red cat", "tag": "color", "n": 1}\n{"prompt": "a blue dog", "of": [{"class": "dog"}]}',
    ".json": '[{"prompt": "a red cat", "file": "1.png"}, {"prompt": "a blue dog", "file": "2.png"}]',
    ".csv": 'file,prompt\n1.png,"a red cat, sitting"\n2.png,a blue dog\n',
    ".tsv": "file\tprompt\n1.png\ta red cat\n2.png\ta blue dog\n",
}
PEFT_SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k"], "alpha_pattern": {}}


@functools.cache
def config() -> dict[str, Any]:
    """A whole configuration, as a run's folder has it."""
    values: dict[str, Any] = load_config("shapes").model_dump(mode="json")
    values["rewards"]["mine"] = {"reward": "brightness", "weight": 0.5, "options": {"scale": 1.5, "names": ["a", "b"]}}
    return values


@functools.cache
def config_on_pairs() -> dict[str, Any]:
    """Likewise, of a run that learns from preferred pairs."""
    values: dict[str, Any] = load_config("sd35-pairs-diffusion-dpo-unconfirmed").model_dump(mode="json")
    return values


@functools.cache
def fields() -> tuple[str, ...]:
    """Every setting of either, as ``section.field``."""
    both = (config(), config_on_pairs())
    return tuple({f"{section}.{name}": None for each in both for section in each for name in each[section] or ()})


def picture(kind: str, random: Random | None = None) -> bytes:
    """A grey picture of 8 x 6 pixels; with text, orientation and transparency for some."""
    out = io.BytesIO()
    mode = (
        "RGB" if random is None or kind in ("JPEG", "WEBP", "BMP") else random.choice(("RGB", "L", "RGBA", "P", "I;16"))
    )
    if mode == "I;16" and kind != "PNG":
        mode = "L"
    color: Any = {"RGB": (127, 127, 127), "RGBA": (127, 127, 127, 128), "I;16": 32000}.get(mode, 127)
    image, more = Image.new(mode, (8, 6), color), dict[str, Any]()
    if random is not None and kind == "PNG":
        more["pnginfo"] = PngImagePlugin.PngInfo()
        more["pnginfo"].add_text("parameters", "x" * 50, zip=True)
    if random is not None and kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = random.choice((1, 3, 6, 8))
        more["exif"] = exif
    image.save(out, kind, **more)
    return out.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds one row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 25)) + chunk(b"IEND", b"")


@functools.cache
def adapters() -> tuple[bytes, ...]:
    """Ours, diffusers' with its settings in the header, kohya's with alpha as tensors, and peft's."""
    generator = torch.Generator().manual_seed(0)

    def layers(prefix: str, down: str, up: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for name in ("to_q", "to_k"):
            found[f"{prefix}{name}{down}"] = torch.randn(2, 6, generator=generator)
            found[f"{prefix}{name}{up}"] = torch.randn(6, 2, generator=generator)
        return {**found, **more}

    diffusers = layers("transformer.transformer_blocks.0.attn.", ".lora_A.weight", ".lora_B.weight")
    kohya = layers("lora_unet_blocks_0_attn_", ".lora_down.weight", ".lora_up.weight")
    alphas = {f"lora_unet_blocks_0_attn_{name}.alpha": torch.tensor(1.0) for name in ("to_q", "to_k")}
    settings = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q", "to_k"]}
    settings |= {"transformer.alpha_pattern": {"to_q": 8}, "transformer.rank_pattern": {}}
    own = {"dgpo.original_alpha": "4.0", "ss_network_dim": "2", "ss_network_alpha": "2", "dgpo.reward": "ocr"}
    own |= {
        "dgpo.packages": '{"torch": "2.13"}',
        "modelspec.title": "a",
        "dgpo.base_parts": "{}",
        "dgpo.reward_after": "0.5",
    }
    return (
        _headed(diffusers, own, hashed=True),
        _headed(diffusers, {"lora_adapter_metadata": json.dumps(settings)}),
        _headed({**kohya, **alphas}, {"ss_network_dim": "2", "ss_network_alpha": "1"}, hashed=True),
        _headed(layers("base_model.model.blocks.0.", ".lora_A.weight", ".lora_B.weight"), {"format": "pt"}),
    )


def _headed(tensors: dict[str, torch.Tensor], header: dict[str, str], *, hashed: bool = False) -> bytes:
    blob = save(tensors)
    size = struct.unpack("<Q", blob[:8])[0]
    entries, data = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    if hashed:
        header = header | header_hashes(entries, memoryview(data), header)
        assert MODELSPEC in header
    text = json.dumps({"__metadata__": header, **entries}).encode()
    return struct.pack("<Q", len(text)) + text + data


@functools.cache
def comparison() -> dict[str, bytes]:
    """A comparison's folder: two entries with two seeds, records, the pictures' table and the galleries."""
    curves = {
        ("dgpo", 0): [0.3, 0.5, 0.8],
        ("dgpo", 1): [0.3, 0.6, 0.7],
        ("flow-grpo", 0): [0.3, 0.2, 0.6],
        ("flow-grpo", 1): [0.3, 0.3, 0.5],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic(folder, World(curves))
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


RETURNS = (
    *(
        "images.mean((1, 2, 3))",
        "[0.5]",
        "0.5",
        "None",
        "[]",
        "['a']",
        "[None]",
        "[float('nan')]",
        "[1e400]",
        "(images, 1)",
    ),
    *(
        "[[0.5]]",
        "[0.5, 0.5]",
        "images",
        "torch.tensor([1+2j])",
        "torch.tensor(True)",
        "{'a': 1}",
        "iter([0.5])",
        "[10**400]",
    ),
    *(
        "torch.full((1,), 0.5, requires_grad=True)",
        "torch.zeros(1, device='meta')",
        "[torch.tensor(0.5)]",
        "'0'",
        "[b'1']",
    ),
    *("type('X', (), {'__float__': lambda s: 1/0})()", "[type('X', (), {'__float__': lambda s: 'a'})()]", "lambda: 1"),
    *(
        "torch.zeros(1).to_sparse()",
        "torch.zeros(0)",
        "torch.zeros(1, 1, 1)",
        "[0.25]",
        "torch.tensor([3], dtype=torch.int8)",
    ),
)
DOES = (
    *(
        "pass",
        "images.zero_()",
        "images[:] = 5",
        "images += 1",
        "raise ValueError('x' * 100000)",
        "raise ValueError('a\\nb')",
    ),
    *(
        "raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "raise BaseException",
        "raise Odd()",
        "1 / 0",
    ),
    *(
        "raise StopIteration",
        "raise MemoryError",
        "raise RecursionError",
        "f = lambda: f()\n    f()",
        "raise OSError(2, 'a')",
    ),
    *(
        "torch.set_default_dtype(torch.float64)",
        "torch.set_grad_enabled(False)",
        "import os\n    os.chdir('/')",
        "del images",
    ),
    *(
        "prompts.clear()",
        "prompts[0].text = 'b'",
        "raise UnicodeDecodeError('a', b'b', 0, 1, '\\ud800')",
        "raise Exception(Odd())",
    ),
    *(
        "raise ExceptionGroup('a', [ValueError()])",
        "import sys\n    sys.stdout = None",
        "raise type('\\x1b[31m', (Exception,), {})",
    ),
)
TOP = (
    *(
        "",
        "raise ValueError('x')",
        "import no_such_module",
        "import sys; sys.exit(0)",
        "raise KeyboardInterrupt",
        "x =",
    ),
    *(
        "score = 5",
        "class score: pass",
        "del torch",
        "score = None",
        "1 / 0",
        "raise BaseException('a\\nb')",
        "import mine",
    ),
    *(
        "class score:\n    def __call__(self): pass",
        "class score:\n    def __init__(self): raise ValueError",
    ),
)


def reward(random: Random) -> str:
    """A user's reward: a usual one, of which one thing is not as it should be."""
    before, does, gives = (
        random.choice(choices) if random.random() < 0.5 else choices[0] for choices in (("",), DOES, RETURNS)
    )
    after = random.choice(TOP) if random.random() < 0.25 else ""
    odd = "class Odd(Exception):\n    def __str__(self): raise ValueError('no')\n"
    return f"import torch\n{odd}{before}\ndef score(images, prompts):\n    {does}\n    return {gives}\n{after}\n"


@functools.cache
def run() -> Mapping[str, bytes]:
    """A run's folder with two checkpoints, by path."""
    identity = RunIdentity(config=config(), prompts_sha256="a" * 64, rewards_sha256="", packages={"torch": "2.13"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "r"
        folder.mkdir()
        for iteration in (1, 2):
            told = Progress(iteration=iteration, steps=iteration, started="2026-01-01T00:00:00+00:00")
            named = {f"blocks.{n}.attn.to_q.lora_A": torch.full((2, 3), float(iteration)) for n in range(2)}
            save_checkpoint(
                folder,
                identity,
                told,
                {"policy": named, "evaluation": {name: tensor.clone() for name, tensor in named.items()}},
                9,
            )
        (folder / "config.yaml").write_text(yaml.safe_dump(config(), sort_keys=False))
        (folder / "metrics.jsonl").write_text('{"iteration": 1, "loss": 0.5}\n{"iteration": 2, "loss": 0.4}\n')
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(name).as_posix(): path.read_bytes() for path in files}


def signed(state: Any) -> Any:
    """A checkpoint's state with the hash that belongs to it, as somebody who means harm would write it."""
    try:
        return json.loads(_State.model_validate_json(json.dumps(state)).signed().model_dump_json())
    except (ValueError, RecursionError):
        return state
