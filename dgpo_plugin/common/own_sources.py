"""What a user's own file is made of: itself, and what it imports of its own folder, read before any of it runs.

Imports are found in the text, those inside functions too, so that what a reward is made of is known, and hashed, before
it is called for the first time. What is imported by a name that is put together while it runs is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dgpo_plugin.common.files import read_bytes


@dataclass(frozen=True)
class Sources:
    """A file of a user's and its helpers, as they were when they were read.

    Attributes:
        file: the file itself, its links followed; what lies in its folder is importable from it.
        content: the bytes of every file by its path, the file itself first.
    """

    file: Path
    content: Mapping[Path, bytes]

    @property
    def folder(self) -> Path:
        """Where helpers are looked for."""
        return self.file.parent

    def hashed(self) -> bytes:
        """What the hash of a result's origin is taken of: the file, then each helper with its name."""
        first, *helpers = self.content
        names = {path.relative_to(self.folder).as_posix(): path for path in helpers}
        parts = [name.encode() + b"\0" + self.content[path] for name, path in sorted(names.items())]
        return b"".join([self.content[first], *parts])

    @property
    def key(self) -> str:
        """Another for every other content and place."""
        return hashlib.sha256(str(self.file).encode() + b"\0" + self.hashed()).hexdigest()[:16]

    def owns(self, top: str, importer: Path | None) -> bool:
        """Whether a first name, as in ``import top.other``, is a module of the folder for a file that imports it.

        As for a script, the folder comes before what is installed; but a file is not its own helper (a ``clip.py`` that
        imports ``clip`` means the installed one), and what Python has already from that very place stays what it is.
        """
        if top in sys.builtin_module_names:
            return False
        places = (self.folder / top / "__init__.py", self.folder / f"{top}.py")
        place = next((each for each in places if each in self.content or each.is_file()), None)
        if place is None:
            return (self.folder / top).is_dir() and not _installed(top)
        known = vars(sys.modules[top]).get("__file__") if top in sys.modules else None
        return place != importer and (known is None or Path(known).resolve() != place.resolve())


def read_sources(file: str | Path) -> Sources:
    """The file and every file of its folder that it imports, or that these import.

    Raises:
        OSError: one cannot be read.
    """
    first = Path(file).resolve()
    content: dict[Path, bytes] = {}
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path not in content:
            content[path] = read_bytes(path)
            waiting += _imported_files(Sources(first, content), path)
    return Sources(first, content)


def _imported_files(sources: Sources, path: Path) -> Iterator[Path]:
    """The files of the folder that one file's text imports."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):  # told when it runs
        for node in ast.walk(ast.parse(sources.content[path])):
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield from _files_of(sources, path, 0, name.name)
            elif isinstance(node, ast.ImportFrom):
                for name in node.names:
                    dotted = ".".join([*([node.module] if node.module else []), name.name])
                    yield from _files_of(sources, path, node.level, dotted)


def _files_of(sources: Sources, importer: Path, level: int, dotted: str) -> Iterator[Path]:
    """The files that run when ``dotted`` is imported, ``level`` dots before it; what is no module ends them."""
    parts = dotted.split(".")
    if not level and not sources.owns(parts[0], importer):
        return
    place = sources.folder if not level else importer.parents[level - 1]
    if place != sources.folder and sources.folder not in place.parents:
        return
    for part in parts:
        package, module = place / part / "__init__.py", place / f"{part}.py"
        if package.is_file():
            yield package
        elif module.is_file():
            yield module
            return
        place = place / part


def _installed(name: str) -> bool:
    """Whether Python finds a module of that name by itself, a folder without ``__init__.py`` not counted."""
    with contextlib.suppress(ImportError, ValueError):
        spec = find_spec(name)
        return spec is not None and spec.origin is not None
    return False
