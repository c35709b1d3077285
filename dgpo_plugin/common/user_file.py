"""What a user's own file defines: ``path/to/file.py:name``.

The file is a module like any other, and so are its helpers, the files of its folder that it imports. They run as one
package that is named after their content, from what was read and hashed (:mod:`~dgpo_plugin.common.own_sources`): so
helpers of one name in two folders do not meet, nor with an installed package, and a file that was changed is another
module. Nothing is put on ``sys.path``, where everybody else would find it too.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from dgpo_plugin.common.errors import UserError, in_one_line, printable
from dgpo_plugin.common.own_sources import Sources, read_sources

log = logging.getLogger(__name__)
PREFIX = "dgpo_own_"
"""How the names of all such packages begin."""
_LOADED: dict[str, Sources] = {}
"""Every file that was imported here, as it was then (the last time)."""


def is_from_file(name: str) -> bool:
    """Whether a name is a file's, ``path/to/file.py:name``, and not a registered one."""
    return ".py:" in name


def import_from_file(name: str, kind: str) -> Any:
    """The function, class or other object that ``path/to/file.py:name`` names.

    A file is run once for what it and its helpers hold: named again, it gives the same objects, unless they were
    changed since. What it changes of torch, of the random numbers' seeds and of the working directory is put back.

    Args:
        kind: what it is to be, as in ``reward``, for messages.

    Raises:
        UserError: no such file or name, an error while it is imported, or it changes torch's default dtype or device.
    """
    path, _, attribute = name.rpartition(":")
    where = f"{kind} {name}"
    sources = note_sources(name, kind)
    try:
        module = _module(sources)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{where}: {path} defines no {attribute!r}")
    return getattr(module, attribute)


def note_sources(name: str, kind: str) -> Sources:
    """Read a file that is about to run, and its helpers, and remember them as what stands behind the name.

    Of one outside the working folder that is said, once in a process.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = name.rpartition(":")[0]
    try:
        if not Path(path).is_file():
            raise UserError(f"{kind} {name}: no file {path}; check the path")
        _LOADED[path] = read_sources(path)
    except OSError as error:
        raise UserError(f"{kind} {name}: {error.filename}: {error.strerror}; check the path") from error
    tell_of(name, kind)
    return _LOADED[path]


# ---- what is said before a file runs that its user may not know of: a configuration runs what it names

_NAMED_BY: dict[Path, str] = {}
_TOLD: set[Path] = set()


def remember_origin(values: Any, source: str, folder: Path | None = None) -> None:
    """Remember which configuration names the files in it, for :func:`tell_of`.

    Args:
        values: a configuration's, nested, before or after it is validated.
        source: what the line is to call it, as in ``run.yaml``.
        folder: where it lies, if its paths may be relative to that too.
    """
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str) and is_from_file(value):
            file = value[: value.index(".py:") + len(".py")]
            for base in (Path(), folder or Path()):
                _NAMED_BY.setdefault(_resolved(base / file), source)


def tell_of(name: str, kind: str) -> None:
    """Say that a file from outside the working folder is run, and which configuration names it: once in a process.

    Workers say nothing: the process that started them does.

    Args:
        name: ``path/to/file.py:name``.
        kind: what it is to be, as in ``reward``.
    """
    file = _resolved(Path(name.rpartition(":")[0]))
    if file in _TOLD or file.is_relative_to(_resolved(Path())):
        return
    _TOLD.add(file)
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        by = f", named by {_NAMED_BY[file]}" if file in _NAMED_BY else ""
        log.info(printable(f"running {file} as {kind}{by}; it lies outside the working folder"))


def _resolved(path: Path) -> Path:
    """Where a path leads; one that cannot be followed as it is."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, in a circle, or the working folder is gone
        return path


def told(error: BaseException, when: str = "") -> str:
    """An error of a user's code in one line, with the innermost line of a user's own file that it came through.

    Args:
        when: follows the name of its class.
    """
    kind, _, message = in_one_line(error).partition(": ")
    said = kind + when + (f": {message}" if message else "")
    for package in _PACKAGES:
        said = said.replace(f"{package}.", "")
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(PREFIX)
    ]
    return f"{said} (at {lines[-1]})" if lines else said


def files_hash(names: Sequence[str]) -> str:
    """SHA-256 of the files that the names are of and their helpers, as they are on the disk now; empty if there are
    none."""
    return _hash(names, lambda path: read_sources(path).hashed() if Path(path).is_file() else b"")


def loaded_hash(names: Sequence[str]) -> str:
    """SHA-256 of those files as they were imported, so that a resumed run can tell that one was changed."""
    return _hash(names, lambda path: _LOADED[path].hashed() if path in _LOADED else b"")


def _hash(names: Sequence[str], read: Callable[[str], bytes]) -> str:
    files = [name.rpartition(":")[0] for name in names if is_from_file(name)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(read(file))
    return digest.hexdigest() if files else ""


# ---- how they are imported

_PACKAGES: dict[str, Sources] = {}


def _module(sources: Sources) -> ModuleType:
    """The file's module, run unless that is done.

    Raises:
        UserError: it cannot be run, or changes what :func:`~dgpo_plugin.common.others_code.others_code` refuses.
    """
    package = PREFIX + sources.key
    name = f"{package}.{_main_name(sources)}"
    if name in sys.modules:
        return sys.modules[name]
    _PACKAGES[package] = sources
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    from dgpo_plugin.common.others_code import others_code  # imports torch, which not every command needs

    try:
        with others_code():
            return importlib.import_module(name)
    except BaseException as error:  # whatever the user's code raises
        for module in [each for each in sys.modules if each.partition(".")[0] == package]:
            del sys.modules[module]
        if isinstance(error, KeyboardInterrupt | UserError):
            raise
        raise UserError(told(error, " while loading it")) from error


def _main_name(sources: Sources) -> str:
    return sources.file.stem.replace(".", "_")


class _Finder(MetaPathFinder):
    """Finds the modules of users' packages, and no others."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 (importlib calls it so)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        package, *parts = fullname.split(".")
        sources = _PACKAGES.get(package)
        if sources is None:
            return None
        place = sources.folder.joinpath(*parts)
        init, module = place / "__init__.py", place.with_name(f"{place.name}.py")
        if parts == [_main_name(sources)]:
            return spec_from_file_location(fullname, sources.file, loader=_Loader(fullname, sources.file, sources))
        if parts and (init in sources.content or init.is_file()):
            loader = _Loader(fullname, init, sources)
            return spec_from_file_location(fullname, init, loader=loader, submodule_search_locations=[str(place)])
        if parts and (module in sources.content or module.is_file()):
            return spec_from_file_location(fullname, module, loader=_Loader(fullname, module, sources))
        if not place.is_dir():
            return None
        spec = ModuleSpec(fullname, None, is_package=True)  # a folder without __init__.py, as the package itself
        spec.submodule_search_locations = [str(place)]
        return spec


class _Loader(SourceFileLoader):
    """Runs what was read, not what a cache or the disk has by now; imports in it find its folder's modules."""

    def __init__(self, fullname: str, path: Path, sources: Sources) -> None:
        super().__init__(fullname, str(path))
        self._sources = sources

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 (importlib calls it so)
        path = Path(self.path)
        source = self._sources.content[path] if path in self._sources.content else path.read_bytes()
        code: CodeType = self.source_to_code(source, self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        # A module's own import function, looked up there by every import statement in it.
        package = module.__name__.partition(".")[0]
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import_for(self._sources, package)}
        super().exec_module(module)


def _import_for(sources: Sources, package: str) -> Callable[..., ModuleType]:
    """The function behind the import statements of a package's modules: the folder's own modules before others."""

    def own_import(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        file = (globals or {}).get("__file__")
        if level or not sources.owns(top, Path(file) if isinstance(file, str) else None):
            return builtins.__import__(name, globals, locals, fromlist, level)
        if fromlist:
            return builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        importlib.import_module(f"{package}.{name}")
        return sys.modules[f"{package}.{top}"]

    return own_import
