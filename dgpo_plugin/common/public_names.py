"""What strangers may see of paths: a hub's name, or the last part, and never the folders above it.

Adapters are passed on, and their headers with them: ``/home/jane doe/my models/sd3`` tells who Jane is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CACHED = re.compile(r"(?:models|datasets)--([^/\\]+?)--([^/\\]+)")
"""A folder of Hugging Face's cache: ``models--owner--name/snapshots/...``."""
STARTS_A_PATH = re.compile(r"(?:/|\\\\\w|~[\w.-]*[\\/]|\.{1,2}(?:[\\/]|$)|[A-Za-z]:[\\/]|file://)")
FILE = re.compile(r"[\\/].*\.(?:txt|jsonl?|csv|tsv|ya?ml|py|safetensors|pth?|ckpt|bin|onnx|gguf)(?::\w+)?$")
"""A file under a folder, or a function of one: nothing that is named otherwise ends so."""
INSIDE_TEXT = re.compile(r"(?<![^\s'\"=(])(?:~?/|[A-Za-z]:[\\/])(?:[^\s\\/'\",;]+[\\/])+([^\s\\/'\",;]+)")
"""An absolute path in the middle of a text; patterns of answers, ``(\\d+)/5``, are none."""
LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def without_folders(value: Any) -> Any:
    """A configuration's values with every path in them cut to its last part; mappings and lists keep their shape."""
    return _cut(value, sorted(set(_paths_in(value)), key=len, reverse=True))


def public_name(path: str) -> str:
    """What a base is called before strangers: a hub's ``owner/name``, from its cache's folder too, or its last part."""
    cached = CACHED.search(path)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return _last_part(path) if _is_path(path) or not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", path) else path


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "~")]
    if parts and parts[-1] != "..":
        return parts[-1]
    # `.` and `..` have no name of their own: that of where they lead, but a home's is its user's.
    place = Path(path).expanduser().resolve()
    return place.name if place.name and place != Path.home() else path


def _is_path(text: str) -> bool:
    """Whether a text as a whole says where something lies; names of prompt sets and of the hub do not."""
    if "\n" in text or not text.strip():
        return False
    if STARTS_A_PATH.match(text) or (FILE.search(text) and "://" not in text):
        return True
    try:
        return bool(re.search(r"[\\/]", text)) and Path(text).exists()
    except (OSError, ValueError):  # too long, or a zero byte
        return False


def _paths_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths_in(key)
            yield from _paths_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths_in(inner)
    elif isinstance(value, str) and _is_path(value):
        yield value


def _cut(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {_cut(key, known): _cut(inner, known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(inner, known) for inner in value]
    return text_without_folders(value, known) if isinstance(value, str) else value


def text_without_folders(text: str, known: Sequence[str] = ()) -> str:
    """A text with every path in it cut to its last part, and without the login of an address.

    Args:
        known: paths that may stand in it with spaces in them, which could not be told from words; longest first.
    """
    if text.startswith("hf:"):
        return f"hf:{text_without_folders(text.removeprefix('hf:'), known)}"
    if _is_path(text):
        return public_name(text)
    for path in (*known, str(Path.home())):
        if len(path) > 1:
            text = text.replace(path, public_name(path) if path in known else "~")
    return LOGIN.sub("", INSIDE_TEXT.sub(r"\1", text))
