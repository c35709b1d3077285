"""A user's own reward: ``path/to/file.py:name``, a function of (images, prompts), or a class of such objects."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from dgpo_plugin.errors import UserError


def is_own(name: str) -> bool:
    """Whether a reward's name is a file's."""
    return ".py:" in name


def import_own(name: str) -> Any:
    """What the file calls so: a function or a class.

    Raises:
        UserError: no such file or name, or an error while it is imported.
    """
    path, _, attribute = name.rpartition(":")
    where = f"reward {name}"
    if not Path(path).is_file():
        raise UserError(f"{where}: no file {path}; check the path")
    spec = importlib.util.spec_from_file_location(f"own_reward_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{where}: {type(error).__name__} while loading it: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{where}: {path} defines no {attribute!r}")
    return getattr(module, attribute)


def own_hash(names: list[str]) -> str:
    """Of the files of users' own rewards among the names, so that a resumed run can tell that one was changed."""
    files = [Path(name.rpartition(":")[0]) for name in names if is_own(name)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest() if files else ""
