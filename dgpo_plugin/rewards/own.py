"""A user's own reward: ``path/to/file.py:name``, a function of (images, prompts) or a class without arguments."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from dgpo_plugin.errors import UserError


def is_own(name: str) -> bool:
    """Whether a reward's name is a file's."""
    return ".py:" in name


def load_own(name: str) -> Any:
    """Import the file and check that what it names can be called with pictures and prompts.

    Raises:
        UserError: no such file or name, an error while it is imported or made, or another signature.
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
        found = getattr(module, attribute, None)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{where}: {type(error).__name__} while loading it: {error}") from error
    if found is None:
        raise UserError(f"{where}: {path} defines no {attribute!r}")
    if not callable(made):
        raise UserError(f"{where}: {attribute} cannot be called; it must be a function of (images, prompts)")
    try:
        inspect.signature(made).bind(None, None)
    except TypeError as error:
        raise UserError(f"{where}: must take (images, prompts); {error}") from error
    except ValueError:  # a built-in without a signature
        pass
    return made


def own_hash(names: list[str]) -> str:
    """Of the files of users' own rewards among the names, so that a resumed run can tell that one was changed."""
    files = [Path(name.rpartition(":")[0]) for name in names if is_own(name)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest() if files else ""
