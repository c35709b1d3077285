"""What a user's own file defines: ``path/to/file.py:name``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from dgpo_plugin.common.errors import UserError

_LOADED: dict[str, bytes] = {}
"""Every file that was imported here, as it was then (the last time)."""


class _FromBytes(SourceFileLoader):
    """Runs what was read, not what a cache or the disk has by now: what is hashed is what scores."""

    def __init__(self, fullname: str, path: str, source: bytes) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 (importlib calls it so)
        code: CodeType = self.source_to_code(self._source, self.path)
        return code


def is_from_file(name: str) -> bool:
    """Whether a name is a file's, ``path/to/file.py:name``, and not a registered one."""
    return ".py:" in name


def import_from_file(name: str, kind: str) -> Any:
    """The function, class or other object that ``path/to/file.py:name`` names.

    A file is run once for what it holds: named again, it gives the same objects, unless it was changed since.

    Args:
        kind: what it is to be, as in ``reward``, for messages.

    Raises:
        UserError: no such file or name, or an error while it is imported.
    """
    path, _, attribute = name.rpartition(":")
    where = f"{kind} {name}"
    if not Path(path).is_file():
        raise UserError(f"{where}: no file {path}; check the path")
    source = Path(path).read_bytes()
    module = _module(path, source, where)
    if not hasattr(module, attribute):
        raise UserError(f"{where}: {path} defines no {attribute!r}")
    _LOADED[path] = source
    return getattr(module, attribute)


def _module(path: str, source: bytes, where: str) -> ModuleType:
    """The file's module, run unless that is done."""
    key = hashlib.sha256(str(Path(path).resolve()).encode() + b"\0" + source).hexdigest()[:16]
    name = f"dgpo_user_file_{Path(path).stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromBytes(name, path, source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their annotations up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        del sys.modules[name]
        raise UserError(f"{where}: {type(error).__name__} while loading it: {error}") from error
    return module


def files_hash(names: list[str]) -> str:
    """SHA-256 of the files that the names are of, as they are on the disk now; empty if none is a file's."""
    return _hash(names, lambda path: Path(path).read_bytes() if Path(path).is_file() else b"")


def loaded_hash(names: list[str]) -> str:
    """SHA-256 of those files as they were imported, so that a resumed run can tell that one was changed."""
    return _hash(names, lambda path: _LOADED.get(path, b""))


def _hash(names: list[str], read: Callable[[str], bytes]) -> str:
    files = [name.rpartition(":")[0] for name in names if is_from_file(name)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(read(file))
    return digest.hexdigest() if files else ""
