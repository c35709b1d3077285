"""A cell's best checkpoint: chosen on validation prompts alone, kept, measured as the last is, gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dgpo_bench import cell as cell_module
from dgpo_bench.cell import run_cell
from dgpo_bench.cell_adapters import read_best, write_best
from dgpo_bench.evaluate import Evaluator, Subject, empty
from dgpo_bench.forecast import cell_pictures
from dgpo_bench.pictures import KEYS, PICTURES_FILE, Pictures, join, read_pictures
from dgpo_bench.plan import Plan, run_folder
from dgpo_bench.preset import load_preset
from dgpo_bench.prompt_sets import TEST, VALIDATION, sampled_sets
from dgpo_bench.records import CellRecord
from dgpo_bench.written import read_cell
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.models.policy import Policy
from tests.bench.test_cell import Ear, Killed, measured_twice
from tests.bench.test_compare import small_preset
from tests.bench.test_evaluate import SMALL, make

ADAPTERS = ("adapter.safetensors", "adapter-best.safetensors")


@pytest.fixture
def evaluator(policy: Policy) -> Evaluator:
    return make(policy, 1, **SMALL)


def rows(evaluator: Evaluator, name: str, values: dict[int, float], guidance: float = 3.0) -> Pictures:
    """Pictures of a set, all of a checkpoint with the same accuracy."""
    parts = [empty()]
    count = len(evaluator.sets[name].prompts)
    for checkpoint, value in values.items():
        whole = np.zeros(count, dtype=np.int64)
        parts.append(
            Pictures(
                entry=np.full(count, "dgpo"),
                seed=whole,
                checkpoint=whole + checkpoint,
                guidance=np.full(count, guidance),
                set=np.full(count, name),
                prompt=np.arange(count),
                image=whole,
                metrics={"accuracy": np.full(count, value)},
            )
        )
    return join(parts)


@pytest.mark.fast
def test_the_best_is_that_of_the_highest_headline_on_validation_prompts_and_of_equal_ones_the_first(
    evaluator: Evaluator,
) -> None:
    found = rows(evaluator, VALIDATION, {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6})
    assert evaluator.best_checkpoint(found, 3.0, "accuracy", 1) == 2
    assert evaluator.best_checkpoint(found, 1.0, "accuracy", 1) is None
    record = evaluator.measures["accuracy"].record.model_copy(update={"better": "lower"})
    measures = {**evaluator.measures, "accuracy": replace(evaluator.measures["accuracy"], record=record)}
    assert replace(evaluator, measures=measures).best_checkpoint(found, 3.0, "accuracy", 1) == 1


@pytest.mark.fast
def test_neither_test_prompts_nor_the_base_nor_another_guidance_can_change_the_choice(evaluator: Evaluator) -> None:
    chosen = rows(evaluator, VALIDATION, {0: 1.0, 1: 0.5, 2: 0.7, 3: 0.6})
    others = [name for name in evaluator.sets if name != VALIDATION]
    assert TEST in others
    for best in (1, 2, 3):
        against = [rows(evaluator, name, {n: float(n == best) for n in (1, 2, 3)}) for name in others]
        elsewhere = rows(evaluator, VALIDATION, {n: float(n == best) for n in (1, 2, 3)}, guidance=1.0)
        for table in ([chosen, *against, elsewhere], [*against, elsewhere, chosen]):
            assert evaluator.best_checkpoint(join(table), 3.0, "accuracy", 1) == 2
    assert evaluator.best_checkpoint(join(against), 3.0, "accuracy", 1) is None


@pytest.mark.fast
def test_what_chose_the_checkpoint_is_not_drawn_again_for_its_guidance(
    evaluator: Evaluator, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def measured(
        self: Evaluator, policy: Policy, subject: Subject, name: str, guidance: float, images: Sequence[int] | None
    ) -> Pictures:
        drawn.append(guidance)
        return rows(self, name, {subject.checkpoint: 0.5}, guidance)

    monkeypatch.setattr(Evaluator, "measure", measured)
    seen = join([rows(evaluator, VALIDATION, {1: 0.9, 2: 0.4}), rows(evaluator, TEST, {2: 1.0})])
    for checkpoint, best in ((1, 3.0), (2, 1.0)):
        drawn.clear()
        guidance, found = evaluator.best_guidance(
            policy, Subject("dgpo", 0, checkpoint), [1.0, 3.0], "accuracy", 1, seen
        )
        assert (guidance, drawn) == (best, [1.0])
        assert set(found.guidance) == {1.0}


@pytest.mark.fast
def test_kept_weights_come_back_to_the_bit_and_a_damaged_file_is_told(tmp_path: Path) -> None:
    weights = {"a": torch.tensor([1.0, 1e-40, -0.0]), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_best(tmp_path, 2, weights)
    back = read_best(tmp_path, 2)
    assert all(torch.equal(back[name].view(torch.uint8), weights[name].view(torch.uint8)) for name in weights)
    with pytest.raises(OSError, match="No such file"):
        read_best(tmp_path, 1)
    (tmp_path / "best-so-far-3.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"best-so-far-3\.safetensors: damaged"):
        read_best(tmp_path, 3)


def planned(folder: Path) -> Plan:
    preset, task = load_preset(small_preset(folder))
    size = preset.sized("quick", 1, 800)  # three iterations
    plan = Plan.of("small", preset, task, "quick", size, ["dgpo"], jobs=1)
    return plan.model_copy(update={"keep_pictures": False}).with_best(True)


@pytest.mark.slow
def test_the_best_is_measured_as_the_last_is_and_a_killed_cell_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation is made the best, so that it lies before the end; killed after it, its weights are read."""
    plan = planned(tmp_path)
    monkeypatch.setattr(cell_module, "best_checkpoint", lambda *_: 1)
    whole, broken = measured_twice(plan, tmp_path)
    run_cell(plan, whole, "dgpo", 0, Ear())
    with pytest.raises(Killed):
        run_cell(plan, broken, "dgpo", 0, Ear(kill_after=1))
    kept = run_folder(broken, "dgpo", 0)
    assert [path.name for path in kept.glob("best-*")] == ["best-so-far-1.safetensors"]
    run_cell(plan, broken, "dgpo", 0, Ear())

    folders = [run_folder(folder, "dgpo", 0) for folder in (whole, broken)]
    assert not any(list(folder.glob("best-*")) for folder in folders)
    for name in ADAPTERS:
        one, other = (load_file(folder / name) for folder in folders)
        assert all(torch.equal(one[key], other[key]) for key in one)
    last, best = (load_file(folders[0] / name) for name in ADAPTERS)
    assert not all(torch.equal(last[key], best[key]) for key in last)
    tables = [read_pictures(folder / PICTURES_FILE) for folder in folders]
    for name in tables[0].metrics:
        np.testing.assert_array_equal(tables[0].metrics[name], tables[1].metrics[name])
    check_pictures(plan, read_cell(folders[0] / "cell.json"), tables[0])


def check_pictures(plan: Plan, cell: CellRecord, pictures: Pictures) -> None:
    """Check that the best has all that the last has, at its own guidance, and no picture stands there twice."""
    assert cell.best is not None
    assert (cell.best.checkpoint, len(cell.checkpoints) - 1) == (1, 2)
    assert cell.best.adapter == "runs/dgpo-seed0/adapter-best.safetensors"
    sets = sampled_sets(plan.task, plan.size)
    for checkpoint, guidance in ((1, cell.best.guidance), (2, cell.guidance)):
        for name, each in sets.items():
            count = len(each.prompts) * each.images
            assert len(pictures.of("dgpo", 0, name, checkpoint=checkpoint, guidance=guidance)) == count
        for guidance in plan.guidances:
            validation = pictures.of("dgpo", 0, VALIDATION, checkpoint=checkpoint, guidance=guidance)
            assert len(validation) == len(sets[VALIDATION].prompts) * sets[VALIDATION].images
    keys = list(zip(*(getattr(pictures, key) for key in KEYS), strict=True))
    assert len(set(keys)) == len(keys) <= cell_pictures(plan, sets)
