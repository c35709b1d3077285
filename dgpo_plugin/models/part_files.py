"""What lies in a pipeline's folder, seen before anything is loaded: which parts, in which files, and whether whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import transformers

from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.files import read_text
from dgpo_plugin.common.first_bytes import what_instead
from dgpo_plugin.common.tensor_file import tensor_header

NAMED = 3
"""Weights that a message names before it only counts them."""
_LORA = re.compile(
    r"\.base_layer\.|[._]lora_?(A|B|up|down|mid|linear_layer|embedding|magnitude)|_lora\.(up|down)\.|^base_model\.model\."
)
"""Names of peft's, kohya's and diffusers' old adapters."""
_QUANTIZED = re.compile(
    r"scaled_fp8$|\.(weight_scale(_inv|_2)?|scale_(weight|input)|input_scale|comfy_quant|SCB|absmax|quant_map"
    r"|nested_absmax|nested_quant_map|quant_state\..*|qweight|qzeros|g_idx)$|\.weight\.(absmax|quant_|nested_)"
)
"""Names of what bitsandbytes, GPTQ and scaled float8 (ComfyUI's, diffusers') keep beside a quantized weight."""


def parts_of(folder: Path, expected: Mapping[str, Any], optional: Sequence[str]) -> dict[str, Any]:
    """The parts that ``model_index.json`` says a folder has: the class of one with weights, None for the others.

    Args:
        expected: the family's class of each part with weights.
        optional: those that may be left out, with their tokenizers; then they are not named here.

    Raises:
        UserError: a part with weights is left out, or of a class that is not there.
    """
    index = read_json(folder / "model_index.json")
    absent = left_out(folder, optional)
    parts: dict[str, Any] = {}
    for name, family_class in expected.items():
        if name not in absent:
            with prefixed(name):
                parts[name] = part_class(index.get(name), family_class)
    others = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    return parts | {name: None for name in others if name not in (*parts, *absent)}


def left_out(folder: Path, optional: Sequence[str]) -> list[str]:
    """The optional parts that a folder goes without, by its index or for want of a folder, and their tokenizers."""
    index = read_json(folder / "model_index.json")
    absent = [name for name in optional if not (index.get(name) or [None])[0] or not (folder / name).is_dir()]
    return absent + [name.replace("text_encoder", "tokenizer") for name in absent]


def part_class(entry: Any, expected: Any) -> Any:
    """The class of a part that ``model_index.json`` names, of diffusers or transformers.

    Args:
        entry: the index's, [library, class]; None if it has none.
        expected: the family's.

    Raises:
        UserError: the index leaves the part out, or names a class that is neither's.
    """
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if name is None:
        raise UserError(f"model_index.json leaves it out; fetch the model with it ({expected.__name__})")
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(name), None)
    if not isinstance(found, type) or not issubclass(found, (diffusers.ModelMixin, transformers.PreTrainedModel)):
        raise UserError(
            f"model_index.json says {library}.{name}, which the installed diffusers and transformers do not have; "
            f"install newer ones, or name {expected.__name__} there"
        )
    return found


def check_part(folder: Path, name: str, module_class: Any | None) -> None:
    """Refuse a part whose files are not whole, before anything is read of them.

    Args:
        module_class: None for a part without weights.

    Raises:
        UserError: as :func:`stored` and :func:`check_texts`.
    """
    with prefixed(name):
        if module_class is None:
            check_texts(folder / name)
        else:
            stored(folder / name, module_class)


def stored(folder: Path, module_class: Any) -> dict[str, dict[str, Any]]:
    """The headers of the files that a class loads from a folder, as one: name -> ``dtype`` and ``shape``.

    Raises:
        UserError: there are none, they are not whole, a LoRA lies in them, or they are quantized without a word of how.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} has an adapter_config.json, so an adapter lies on it; merge it and save it again")
    config = read_json(folder / "config.json")
    headers = [tensor_header(file) for file in weight_files(folder, module_class)]
    held = {name: tensor for header in headers for name, tensor in header.items()}
    adapters = sorted(name for name in held if _LORA.search(name))
    if adapters:
        raise UserError(
            f"{folder} was saved with a LoRA on it ({named(adapters)}); merge it (diffusers: fuse_lora and "
            f"unload_lora_weights; peft: merge_and_unload) and save it again"
        )
    if not config.get("quantization_config"):
        _refuse_unscaled(held)
    return held


def _refuse_unscaled(held: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse quantized weights that nothing says how to read: they would be taken for plain numbers."""
    integers = [name for name, tensor in held.items() if str(tensor["dtype"])[0] in "IU" and name.endswith(".weight")]
    quantized = sorted([name for name in held if _QUANTIZED.search(name)] or integers)
    if quantized:
        raise UserError(
            f"its weights are quantized ({named(quantized)}), and its config.json has no quantization_config to say "
            f"how, so they would be read as other numbers; take the unquantized weights, and set model.quantization to "
            f"have them quantized here"
        )


def weight_files(folder: Path, module_class: Any) -> list[Path]:
    """The safetensors files that a class loads from a folder: one, or those that an index names.

    Where both lie there, diffusers takes the index (``ModelMixin.from_pretrained``) and transformers the one file
    (``_get_resolved_checkpoint_files``).

    Raises:
        UserError: there are none, or a shard is missing.
    """
    ours = issubclass(module_class, diffusers.ModelMixin)
    whole = folder / f"{'diffusion_pytorch_model' if ours else 'model'}.safetensors"
    index = folder / f"{whole.name}.index.json"
    if index.exists() and (ours or not whole.exists()):
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise UserError(f"{index} places no weights; fetch it again")
        shards = sorted({str(shard) for shard in placed.values()})
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise UserError(f"{folder} lacks {len(missing)} of {len(shards)} shards ({named(missing)}); fetch them")
        return [folder / shard for shard in shards]
    if whole.exists():
        return [whole]
    raise UserError(f"{folder} has no {whole.name}{_other_weights(folder, whole)}")


def _other_weights(folder: Path, whole: Path) -> str:
    """What a folder has instead of its file of weights, and what to do."""
    if whole.is_symlink():
        return f": the link of that name leads to {whole.readlink()}, which is not there; fetch the model again"
    others = [
        file.name for pattern in ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth") for file in _in(folder, pattern)
    ]
    if not others:
        return "; fetch the model again, with its weights"
    if others[0].endswith(".safetensors"):
        return f", only {named(others)}; rename it to that if it is the same part (a variant such as fp16)"
    return f", only {named(others)}, and pickles are not read; fetch the safetensors, or save it again as {whole.name}"


def _in(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        UserError: it is not there, or something else.
    """
    try:
        values = json.loads(read_text(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); fetch the model again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} {_stand_in(file) or 'is no JSON: cut or damaged; fetch it again'}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is no JSON object; fetch it again")
    return values


def check_texts(folder: Path) -> None:
    """Refuse a part without weights, a tokenizer or scheduler, if one of its files is a stand-in or cut off.

    Raises:
        UserError: it is, or the folder is not there.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; fetch the model again, whole")
    files = [file for file in _in(folder, "*") if file.suffix in (".json", ".txt", ".model")]
    # With a tokenizer.json nobody reads what it was made of.
    fast = any(file.name == "tokenizer.json" for file in files)
    for file in files:
        is_json = file.suffix == ".json"
        if is_json or not fast:
            instead = _stand_in(file)
            if instead is None and is_json and not file.read_bytes()[-64:].rstrip().endswith((b"}", b"]")):
                instead = "is cut off; fetch it again"
            if instead is not None:
                raise UserError(f"{file} {instead}")


def _stand_in(file: Path) -> str | None:
    """What a text is instead of itself, and what to do: a pointer, a web page, nothing."""
    instead = what_instead(file)
    # A vocabulary may begin with <pad>.
    is_page = re.match(rb"\s*<(!doctype|html|\?xml)", file.read_bytes()[:256].lower())
    kinds = ["a Git LFS pointer", "empty", "nothing but zeros", *(["a web page"] if is_page else [])]
    return f"is {instead}" if instead is not None and instead.startswith(tuple(kinds)) else None


def named(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
