"""``dgpo-bench gpu``: its rehearsal, whole; what it keeps when it is cut off; what it says of what it found."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from dgpo_bench.commands import main
from dgpo_bench.gpu import session
from dgpo_bench.gpu.card import nominal_tflops
from dgpo_bench.gpu.child import Answer, Task
from dgpo_bench.gpu.flops import count_flops
from dgpo_bench.gpu.published import published, published_models
from dgpo_bench.gpu.random_model import family_of, random_model
from dgpo_bench.gpu.results import FILE, Result, append_result, read_results
from dgpo_bench.gpu.rows import ROWS, Row, choose_rows
from dgpo_bench.gpu.table import markdown, verdict
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import FAMILIES
from dgpo_plugin.config.fields import LoraConfig, ModelConfig
from dgpo_plugin.models.load import model_skeleton

GIB = 2**30


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_rehearsal_runs_every_row(tmp_path: Path) -> None:
    """All of the measuring code, in its processes, with tiny models of the real classes."""
    run = CliRunner().invoke(main, ["gpu", "--rehearsal", "--minutes", "20", "--output", str(tmp_path)])
    assert run.exit_code == 0, run.output
    results = read_results(tmp_path)
    assert list(results) == [row.name for row in ROWS]
    expected = dict.fromkeys(results, "measured") | {"sd35/nf4": "failed"}  # bitsandbytes is not installed
    if shutil.which("g++") is None:  # torch.compile's, on a processor
        expected |= {"sd35/compile": "failed"}
    assert {name: result.status for name, result in results.items()} == expected
    assert "bitsandbytes" in results["sd35/nf4"].reason
    assert results["ranks"].measured["works"]
    assert 0 < results["sd35/numerics"].measured["gradient_relative_difference"] < 1e-4
    assert results["sd35/shard"].measured["relative_difference"] == 0
    assert results["sd35/int8"].measured["applied_difference"] < 1e-3
    assert results["comparison"].measured["runs"] == 3
    dgpo = results["sd35/dgpo"].measured
    assert dgpo["seconds"] >= dgpo["rollout_seconds"] + dgpo["training_seconds"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "A rehearsal" in text
    assert all(f"| {row.name}: " in text for row in ROWS)


@pytest.mark.fast
def test_without_a_gpu_it_offers_the_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = CliRunner().invoke(main, ["gpu", "--output", str(tmp_path)])
    assert run.exit_code == 2
    assert "no GPU here; --rehearsal" in run.output
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_a_row_that_is_not_there_is_an_error_with_the_near_one(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["gpu", "--rehearsal", "--only", "sd35/dpgo", "--output", str(tmp_path)])
    assert run.exit_code == 2
    assert "sd35/dgpo" in run.output
    assert [row.name for row in choose_rows("sdxl,card")] == ["card", "sdxl/dgpo"]


class FakeChildren:
    """Processes that answer what they are told to, in place of real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []

        def one(child: Any, task: Task, seconds: float, *, tiny: bool) -> Result:
            self.asked.append((task.row.name, task.anyway))
            answer = self.answers[task.row.name].pop(0)
            return result(task.row.name, answer.status, answer.measured, anyway=task.anyway)

        monkeypatch.setattr(session, "measure_row", one)
        monkeypatch.setattr(session, "start_child", lambda **_: None)
        monkeypatch.setattr(session, "end_child", lambda child: None)


def result(row: str, status: Any, measured: dict[str, Any] | None = None, **more: Any) -> Result:
    values = {"about": "", "rehearsal": False, "seconds": 1.0, "created": "2026-11-26T00:00:00", **more}
    return Result(row=row, status=status, measured=measured or {}, **values)


def rows(*names: str) -> list[Row]:
    return [Row(name, "iteration", "") for name in names]


@pytest.mark.fast
def test_one_that_does_not_fit_is_tried_all_the_same_and_the_next_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Answer("does not fit", {"planned_bytes": 90 * GIB})
    answers = {"a": [large, Answer("out of memory")], "b": [large], "c": [Answer("measured")]}
    children = FakeChildren(monkeypatch, answers)
    session.measure(rows("a", "b", "c"), tmp_path, 10, lambda line: None, tiny=False, again=False)
    assert children.asked == [("a", False), ("a", True), ("b", False), ("c", False)]
    kept = read_results(tmp_path)
    assert verdict(kept["a"]) == "does not fit, as planned"
    assert verdict(kept["b"]) == "skipped: `dgpo plan` says 90.0 GiB"


@pytest.mark.fast
def test_the_same_command_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {name: [Answer("measured")] * 3 for name in "abc"}
    children = FakeChildren(monkeypatch, answers)
    session.measure(rows("a", "b"), tmp_path, 10, lambda line: None, tiny=False, again=False)
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"row": "c", "about": "cut o')
    session.measure(rows("a", "b", "c"), tmp_path, 10, lambda line: None, tiny=False, again=False)
    assert [name for name, _ in children.asked] == ["a", "b", "c"]
    assert set(read_results(tmp_path)) == {"a", "b", "c"}
    session.measure(rows("b"), tmp_path, 10, lambda line: None, tiny=False, again=True)
    assert [name for name, _ in children.asked][-1] == "b"
    assert session.measure(rows("d"), tmp_path, 0.1, lambda line: None, tiny=False, again=False) == ["d"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be caught there")
def test_a_session_that_is_ended_keeps_what_it_measured_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dgpo_bench.commands", "gpu", "--rehearsal", "--output", str(tmp_path)]
    running = subprocess.Popen([*command, "--only", "card,sd35/dgpo,sdxl"], stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("sd35/dgpo"):
            break
    children = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert "card" in read_results(tmp_path)
    assert "want of time" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_a_result(tmp_path: Path) -> None:
    """Real processes: one whose measurement kills it, one that outlasts its time."""
    dying = session.start_child(tiny=True)
    dying.process.kill()
    dying.process.join()
    died = session.measure_row(dying, Task(ROWS[0], tmp_path), 30, tiny=True)
    assert died.status == "failed"
    assert "SIGKILL" in died.reason
    late = session.start_child(tiny=True)
    assert session.measure_row(late, Task(ROWS[0], tmp_path), 0.01, tiny=True).status == "timed out"
    assert not late.process.is_alive()


@pytest.mark.fast
@pytest.mark.parametrize(("name", "resolution"), [("sdxl", 1024), ("sd35", 512), ("flux1", 512)])
def test_flops_are_those_of_every_layer_and_every_attention(
    name: str, resolution: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted another way: by each layer's own shapes as it is called, and by attention's."""
    shapes, config = published(name), ModelConfig(path=str(tmp_path), precision="bf16", resolution=resolution)
    shapes.write_configurations(tmp_path)
    counted = 0

    def layer(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal counted
        weight = module.weight  # a convolution's has its window, a linear layer's has none
        counted += 2 * out.numel() * weight[0].numel()

    def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
        nonlocal counted
        counted += 2 * query.numel() * key.shape[-2] * 2
        return torch.empty_like(query)

    with torch.device("meta"), torch.no_grad():
        model = model_skeleton(config)
        for module in model.denoiser.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(layer)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        model.velocity(torch.zeros(1, *model.latent_shape), 0.5, model.blank_conditioning(1))
        monkeypatch.undo()
    with_adapter = count_flops(shapes, config, LoraConfig(rank=1, alpha=1))
    assert with_adapter.forward == pytest.approx(counted, rel=0.003)
    # Backward without the frozen weights' gradients costs about a forward again.
    assert 1.95 < with_adapter.training / with_adapter.forward < 2.2


@pytest.mark.fast
def test_flops_of_one_layer_by_hand() -> None:
    """A tiny Stable Diffusion 3.5, doubled in depth: the difference is one block's, counted here."""
    tiny = published("sd35").tiny()
    config = ModelConfig(path="", precision="fp32", resolution=32, max_sequence_length=16)

    def of(layers: int) -> int:
        parts = {**tiny.parts, "transformer": {**tiny.parts["transformer"], "num_layers": layers}}
        return count_flops(tiny.model_copy(update={"parts": parts}), config, LoraConfig(rank=4, alpha=4)).forward

    width, image, text, rank = 64, (32 // 2 // 2) ** 2, 77 + 16, 4
    tokens = image + text
    products = 4 * width * width * tokens + 2 * 4 * width * width * tokens  # attention's four, the feed-forward's two
    adapters = 8 * 2 * width * rank * tokens / 2  # four projections a stream, down and up
    modulation = 2 * 6 * width * width  # of the time and the pooled text, once an image and stream
    scores = 2 * tokens * tokens * width
    assert of(3) - of(2) == 2 * (products + adapters + modulation + scores)


@pytest.mark.fast
def test_every_family_has_a_published_model_and_the_measured_ones_a_tiny_one() -> None:
    assert {model.pipeline for model in published_models().values()} == set(FAMILIES)
    for row in ROWS:
        assert not row.model or published(row.model).rehearsal is not None


@pytest.mark.fast
def test_a_random_model_has_the_published_parts_and_encodes_texts() -> None:
    config = ModelConfig(path="", precision="fp32", resolution=32, max_sequence_length=16)
    model = random_model(published("sd35").tiny(), config, torch.device("cpu"))
    assert type(model) is family_of(published("sd35"))
    assert model.encode(["a cat", "a dog"]).tensors["context"].shape == (2, 77 + 16, 32)
    assert model.decode(torch.randn(1, *model.latent_shape)).shape == (1, 3, 32, 32)
    weights = [p for p in model.denoiser.parameters() if p.ndim > 1]
    assert all(p.std() > 0 for p in weights)
    again = random_model(published("sd35").tiny(), config, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.parameters(), again.denoiser.parameters(), strict=True))
    bare = random_model(published("sd35").tiny(), config, torch.device("cpu"), encoders=False)
    assert all(isinstance(e, nn.Module) and next(e.parameters()).device.type == "meta" for e in bare.encoders)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"peak_bytes": 10 * GIB, "planned_bytes": 10.5 * GIB}, "memory as planned"),
        ({"peak_bytes": 12 * GIB, "planned_bytes": 10 * GIB}, "memory 20% more than planned"),
        ({"peak_bytes": 8 * GIB, "planned_bytes": 10 * GIB}, "memory 20% less than planned"),
        (
            {"peak_bytes": 12.5 * GIB, "planned_bytes": 12.5 * GIB, "aim_bytes": 12 * GIB},
            "memory as planned; not within 12 GiB",
        ),
        ({"works": False, "said": ["Duplicate GPU detected"]}, "refused: Duplicate GPU detected"),
        ({"works": False, "note": "NCCL 2.28.9 allows one", "said": ["no"]}, "refused: NCCL 2.28.9 allows one; no"),
    ],
)
def test_verdicts(measured: dict[str, Any], expected: str) -> None:
    assert verdict(result("a", "measured", measured)) == expected


@pytest.mark.fast
def test_utilization_is_of_the_nominal_rate() -> None:
    measured = {"rollout_tflops": 600.0, "training_tflops": 300.0}
    device = {"device": "NVIDIA H200", "nominal_bf16_tflops": nominal_tflops("NVIDIA H200")}
    assert verdict(result("a", "measured", measured, device=device)) == "below the aim of 50%: training 30%"
    assert nominal_tflops("NVIDIA H100 PCIe") == 756.5
    assert nominal_tflops("something new") is None


@pytest.mark.fast
def test_a_failed_row_says_why_in_the_table() -> None:
    kept = {
        "a": result("a", "failed", reason="RuntimeError: no kernel"),
        "b": result("b", "timed out", reason="after 60 s"),
    }
    text = markdown(kept, ["a", "b", "c"], ["c"])
    assert "failed: RuntimeError: no kernel" in text
    assert "timed out: after 60 s" in text
    assert "want of time: c" in text


@pytest.mark.fast
def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"not": "ours"}) + "\n" + "{}\n")
    with pytest.raises(UserError, match="line 1: not a measured row"):
        read_results(tmp_path)


@pytest.mark.fast
def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    append_result(tmp_path, result("a", "measured"))
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"row": "b", "ab')
    assert set(read_results(tmp_path)) == {"a"}
    append_result(tmp_path, result("c", "measured"))
    append_result(tmp_path, result("a", "failed"))
    assert {name: kept.status for name, kept in read_results(tmp_path).items()} == {"a": "failed", "c": "measured"}
