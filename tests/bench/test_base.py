"""The base's measurement: what cells wait for first, the pictures of best-of-n after it, whatever cuts it off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo_bench.base import measure_base
from dgpo_bench.evaluate import Evaluator
from dgpo_bench.pictures import Pictures, read_pictures
from dgpo_bench.plan import Plan, base_file
from dgpo_bench.preset import load_preset
from dgpo_bench.prompt_sets import TEST, VALIDATION
from dgpo_bench.written import base_is_measured, base_pictures_file, read_base
from tests.bench.test_cell import Killed
from tests.bench.test_compare import small_preset


@pytest.mark.slow
def test_the_pictures_of_best_of_n_come_last_and_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, task = load_preset(small_preset(tmp_path))
    size = preset.sized("quick", 1, 100, controls="best-of-n")
    plan = Plan.of("small", preset, task, "quick", size, ["dgpo"], jobs=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert not base_is_measured(plan, whole)
    measure_base(plan, whole)
    assert base_is_measured(plan, whole)

    measure = Evaluator.measure

    def cut_off(self: Evaluator, *args: Any, images: Any = None, **named: Any) -> Pictures:
        if args[2] == TEST and images is not None:
            raise Killed
        return measure(self, *args, images=images, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure", cut_off)
        with pytest.raises(Killed):
            measure_base(plan, broken)
    assert base_file(broken).exists()  # which is what cells wait for
    assert not base_is_measured(plan, broken)
    rows = read_pictures(base_pictures_file(broken))
    assert set(rows.image[rows.set == TEST]) == {0, 1}
    assert set(rows.image[rows.set == VALIDATION]) == {0, 1, 2}

    monkeypatch.setattr(Evaluator, "finished", None)  # nothing that is there is drawn again
    measure_base(plan, broken)
    assert read_base(broken) == read_base(whole)
    assert base_pictures_file(broken).read_bytes() == base_pictures_file(whole).read_bytes()
    assert set(read_pictures(base_pictures_file(whole)).image) == set(range(8))
