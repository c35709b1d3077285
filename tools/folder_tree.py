"""The folder tree of docs/architecture.md from the files' own first lines: `python tools/folder_tree.py [--write]`.

Without `--write` it only says whether the page is out of date; a test holds it to it.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from dgpo_plugin.common.files import write_text_atomically

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: made by tools/folder_tree.py -->\n```\n", "```\n<!-- end of tree -->"
PACKAGES = ("dgpo_plugin", "bench", "comfy_nodes")
ORDER = (
    *("common", "config", "distributed", "prompts", "samplers", "models", "adapters", "rewards", "algorithms"),
    *("training", "commands", "worlds"),
)
"""Of the library's folders: each may import those before it; worlds are imported by nobody."""
NAME_WIDTH = 22


def tree() -> str:
    """Every folder and file of the packages, a line each, with what its docstring says first."""
    return "".join(_folder(ROOT / name, 0) for name in PACKAGES)


def _folder(folder: Path, depth: int) -> str:
    lines = [_line(f"{folder.name}/", _says(folder / "__init__.py"), depth)]
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    lines += [_line(path.name, _says(path), depth + 1) for path in files]
    folders = [path for path in folder.iterdir() if (path / "__init__.py").exists()]
    for path in sorted(folders, key=lambda path: (ORDER.index(path.name) if path.name in ORDER else 99, path.name)):
        lines.append(_folder(path, depth + 1))
    return "".join(lines)


def _line(name: str, says: str, depth: int) -> str:
    indented = "  " * depth + name
    return f"{indented:<{NAME_WIDTH + 2 * depth}} {says}\n"


def _says(path: Path) -> str:
    """The first sentence of a file's docstring, without markup."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    first = re.sub(r":\w+:`~?([^`]+)`", lambda match: match.group(1).rpartition(".")[2], first)
    return first.replace("``", "").removesuffix(".")


def page() -> str:
    """The page with its tree as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tree() + END + after


def main() -> None:
    """Write the page, or say that it is out of date."""
    if PAGE.read_text(encoding="utf-8") == page():
        return
    if "--write" not in sys.argv:
        raise SystemExit(f"{PAGE.relative_to(ROOT)}: out of date; run: python tools/folder_tree.py --write")
    write_text_atomically(PAGE, page())


if __name__ == "__main__":
    main()
