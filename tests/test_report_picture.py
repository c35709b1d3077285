"""The README's picture is made of a page by a command."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from dgpo_bench.report.page import write_report
from tests.bench.report.browser import CHROMIUM
from tests.bench.report.synthetic import World, write_synthetic

ROOT = Path(__file__).parents[1]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_picture", ROOT / "tools" / "report_picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_top_of_a_page_is_drawn_as_a_light_screen_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(tmp_path, World({("ours", s): [0.4, 0.6, 0.7] for s in (0, 1)}))
    write_report(tmp_path)
    module, target = tool(), tmp_path / "made" / "report.png"
    monkeypatch.setattr(module, "TARGET", target)
    module.main([str(tmp_path), "500"])
    with Image.open(target) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (1100, 500), "P")
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colors, counts = np.unique(pixels, axis=0, return_counts=True)
    assert colors[counts.argmax()].min() > 230  # light
    assert 0.5 < counts.max() / len(pixels) < 0.99  # and something stands on it
    assert (colors.max(axis=1) < 80).any()


@pytest.mark.fast
@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["a", "1", "2"]], ids=["none", "no page", "too many"])
def test_what_is_no_page_is_told_in_a_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="usage: python tools/report_picture.py FOLDER"):
        tool().main(arguments)
