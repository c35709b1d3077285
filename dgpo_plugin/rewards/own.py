"""A user's own reward: ``path/to/file.py:name``, a function of (images, prompts), or a class of such objects."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from dgpo_plugin.errors import UserError

_LOADED: dict[str, bytes] = {}
"""Every file that was imported here, as it was then (the last time)."""


class _FromBytes(SourceFileLoader):
    """Runs what was read, not what a cache or the disk has by now: what is hashed is what scores."""

    def __init__(self, fullname: str, path: str, source: bytes) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self._source, self.path)
        return code


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
    module_name, source = f"own_reward_{Path(path).stem}", Path(path).read_bytes()
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_FromBytes(module_name, path, source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"{where}: {type(error).__name__} while loading it: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{where}: {path} defines no {attribute!r}")
    _LOADED[path] = source
    return getattr(module, attribute)


def own_hash(names: list[str]) -> str:
    """Of the files of users' own rewards among the names, as they are on the disk now; empty if there are none."""
    return _hash(names, lambda path: Path(path).read_bytes() if Path(path).is_file() else b"")


def loaded_hash(names: list[str]) -> str:
    """The same of the files as they were imported, so that a resumed run can tell that one was changed."""
    return _hash(names, lambda path: _LOADED.get(path, b""))


def _hash(names: list[str], read: Callable[[str], bytes]) -> str:
    files = [name.rpartition(":")[0] for name in names if is_own(name)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(read(file))
    return digest.hexdigest() if files else ""
