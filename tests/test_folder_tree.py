"""The architecture page's tree names every file, with what the file says of itself."""

from __future__ import annotations

import pytest

from tools.folder_tree import PACKAGES, PAGE, ROOT, page, tree

pytestmark = pytest.mark.fast


def test_the_page_has_the_tree_that_is_there() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/folder_tree.py --write"


def test_it_names_every_file_and_none_without_a_word() -> None:
    lines = tree().splitlines()
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    assert len(lines) == len(files)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
