"""Several real processes (accelerate launch, gloo): the same run as one, and an end in seconds when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.describe import annotated_yaml
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed import device, processes
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.training.build import check_layout
from dgpo_plugin.training.checkpoint import checkpoints, load_checkpoint
from tests.conftest import SMALL
from tests.dgpo_plugin.algorithm_cases import config_for, features_network, pairs_folder

ODD = (
    *SMALL,
    "training.prompts_per_iteration=5",
    "training.group_size=3",
    "training.iterations=4",
    "training.updates_per_iteration=5",
    "evaluation.images=7",
    "training.decay=none",
    "logging.sample_every=4",
    "checkpoint.every=2",
)
"""Nothing here divides by 2 or 4: 15 images, 3 images an update, 7 evaluation pictures."""
WHOLE = "training.micro_batch_size=3"
"""A prompt group: with four of them in two updates each process has whole ones, and looks at them once."""
CLOSE = 1e-3
"""Of the adapter's norm. A forward's last float32 bits depend on how many images share a matrix product, and a sum's
on its order; AdamW's steps, each about as long as the learning rate whatever the gradient's size, pass those bits on
where the gradient is next to nothing."""


def distance(folder: Path, other: Path) -> float:
    """Between two runs' adapters, as a share of the norm."""
    a, b = (load_file(each / "adapter.safetensors") for each in (folder, other))
    apart = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return float((apart / sum(float(tensor.square().sum()) for tensor in a.values())) ** 0.5)


def launch(count: int, *arguments: str, extra: str | None = None) -> subprocess.Popen[str]:
    options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    start = [sys.executable, "-m", "accelerate.commands.launch", *options] if count > 1 else [sys.executable]
    program = ["-m", "dgpo_plugin"] if extra is None else [extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        [*start, *program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def arguments(folder: Path, *changes: str) -> list[str]:
    return ["train", "shapes", "--output", str(folder), *(p for c in (*ODD, *changes) for p in ("--set", c))]


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rewards(folder: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["reward"], line["reward_group_std"], line["denoiser_evaluations"]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "changes", "counts"),
    [
        ("dgpo", ["algorithm.clip=0.01", "algorithm.old_policy_after=3", "training.micro_batch_size=4"], (1, 2, 4)),
        ("dgpo", ["algorithm.t_min=0.4", "algorithm.text_dropout=0.3"], (1, 2)),
        ("dgpo", ["training.prompts_per_iteration=4", "training.updates_per_iteration=2", WHOLE], (1, 2)),
        ("dgpo", ["training.inner_epochs=2"], (1, 2)),
        ("nft", ["algorithm.name=nft", "algorithm.timesteps=2"], (1, 2)),
        ("flow-grpo", ["algorithm.name=flow-grpo", "algorithm.guidance=1"], (1, 2)),
        (
            "flow-grpo-gardo",
            [
                "algorithm={name: flow-grpo-gardo, guidance: 1, renew_after: 1, features: FEATURES}",
                "rewards.sharpness={weight: 0}",
            ],
            (1, 2),
        ),
    ],
)
def test_the_number_of_processes_changes_nothing(
    algorithm: str, changes: list[str], counts: tuple[int, ...], tmp_path: Path
) -> None:
    base = [c for c in ODD if algorithm == "dgpo" or not c.startswith("algorithm.")]
    folders = {}
    for count in counts:
        folder = folders[count] = tmp_path / str(count) / "run"
        given = [p for c in (*base, *changes) for p in ("--set", c.replace("FEATURES", features_network()))]
        finish(launch(count, "train", "shapes", "--output", str(folder), *given))
    for count, folder in folders.items():
        assert [r[2] for r in rewards(folder)] == [r[2] for r in rewards(folders[1])], count
        for given_rewards, expected in zip(rewards(folder), rewards(folders[1]), strict=True):
            assert given_rewards == pytest.approx(expected, abs=1e-6), count
        assert distance(folders[1], folder) <= CLOSE, count
        if algorithm == "flow-grpo":
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert all(0 <= line["ratio_deviation"] < 1e-4 for line in lines), count
    pictures = [np.asarray(Image.open(folder / "samples" / "000000.png")).astype(int) for folder in folders.values()]
    assert all(np.abs(picture - pictures[0]).max() <= 1 for picture in pictures)  # rounded to 8 bits


@pytest.mark.slow
def test_preferred_pairs_on_two_processes_are_learnt_as_on_one(tmp_path: Path) -> None:
    """Three pairs an iteration, with both pictures of a pair on two processes or on one; held-out ones measured."""
    held_out = f"pairs.held_out={pairs_folder(3)}"
    quiet = ("logging.sample_every=1", "evaluation.images=3", "evaluation.rewards=shapes")
    config = config_for("diffusion-dpo", held_out, *quiet, "training.prompts_per_iteration=3", "training.iterations=3")
    file = tmp_path / "pairs.yaml"
    file.write_text(annotated_yaml(config))
    lines = {}
    for count in (1, 2):
        finish(launch(count, "train", str(file), "--output", str(tmp_path / str(count))))
        lines[count] = [json.loads(x) for x in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()]
    for alone, shared in zip(lines[1], lines[2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert shared["held_out_accuracy"] == alone["held_out_accuracy"]
        assert shared["denoiser_evaluations"] == alone["denoiser_evaluations"]
    assert distance(tmp_path / "1", tmp_path / "2") <= CLOSE


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two iterations on two processes and two on one are four on one."""
    whole, mixed = tmp_path / "whole" / "run", tmp_path / "mixed" / "run"
    finish(launch(1, *arguments(whole)))
    finish(launch(2, *arguments(mixed, "training.iterations=2")))
    config = mixed / "config.yaml"
    config.write_text(config.read_text().replace("  iterations: 2", "  iterations: 4"))
    finish(launch(1, "resume", str(mixed)))
    assert distance(whole, mixed) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dgpo", "flow-grpo", "flow-grpo, graphs kept"])
def test_a_base_split_over_two_processes_trains_the_same_adapter(algorithm: str, tmp_path: Path) -> None:
    """FSDP2 on gloo; the reward makes groups of equal images, which only one of the processes could skip."""
    changes = ["training.group_size=4", "training.prompts_per_iteration=3", "training.updates_per_iteration=3"]
    changes += ["training.micro_batch_size=3", "training.gradient_checkpointing=true"]
    base = [c for c in ODD if algorithm == "dgpo" or not c.startswith("algorithm.")]
    own = {
        "dgpo": ["algorithm.kl_weight=0"],
        "flow-grpo": ["algorithm.name=flow-grpo", "algorithm.guidance=1"],
        "flow-grpo, graphs kept": [
            "algorithm.name=flow-grpo",
            "algorithm.guidance=1",
            "algorithm.keep_graphs=true",
            "training.updates_per_iteration=1",
        ],
    }[algorithm]
    given = [p for c in (*base, *changes, *own) for p in ("--set", c)]
    whole, split = tmp_path / "whole" / "run", tmp_path / "split" / "run"
    finish(launch(1, "train", "shapes", "--output", str(whole), *given))
    finish(launch(2, "train", "shapes", "--output", str(split), *given, "--set", "model.shard=true"))
    assert distance(whole, split) <= CLOSE
    assert [r[:2] for r in rewards(split)] == [pytest.approx(r[:2], abs=1e-6) for r in rewards(whole)]


@pytest.mark.slow
def test_a_base_split_over_one_process_trains_the_same_adapter(tmp_path: Path) -> None:
    """A mesh of one: what a single card can try of FSDP2."""
    whole, alone = tmp_path / "whole" / "run", tmp_path / "alone" / "run"
    finish(launch(1, *arguments(whole)))
    finish(launch(1, *arguments(alone, "model.shard=true")))
    assert distance(whole, alone) <= CLOSE


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.shard=true", "training.group_size=5"], "group_size 5 must be a multiple of the 2 processes"),
        (["model.shard=true", "model.quantization=torchao-int8"], "cannot split a quantized base"),
        (["training.group_size=2", "training.prompts_per_iteration=1"], "4 processes for 1 x 2 images an iteration"),
    ],
)
def test_layouts_that_cannot_hold_are_errors(changes: list[str], message: str) -> None:
    config = load_config("shapes", [*SMALL, *changes])
    processes = {"4 p": 4}.get(message[:3], 2)
    with pytest.raises(UserError, match=message):
        check_layout(config, processes)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


@pytest.mark.slow
def test_a_dead_process_ends_the_others_in_seconds(tmp_path: Path) -> None:
    process = launch(2, *arguments(tmp_path / "run", "training.iterations=100000"))
    saved = tmp_path / "run" / "checkpoints" / "000002"
    while not saved.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another process is gone" in output or "SIGKILL" in output
    for path in checkpoints(tmp_path / "run"):
        load_checkpoint(path)  # and what they had finished is whole


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_in_one_line(tmp_path: Path) -> None:
    """Stopped, it keeps its connections, so that only the clock tells."""
    changes = ("training.iterations=100000", "training.process_timeout=20")
    process = launch(2, *arguments(tmp_path / "run", *changes))
    saved = tmp_path / "run" / "checkpoints" / "000002"
    while not saved.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if "error: another process is gone" in line]
    assert "did not answer within training.process_timeout" in line
    for path in checkpoints(tmp_path / "run"):
        load_checkpoint(path)


def program_with_reward(file: Path, body: str) -> Path:
    """``dgpo`` with another function in the place of the reward ``shapes``: its body, from ``images`` and ``rank``."""
    file.write_text(f"""
from dgpo_plugin.commands.main import main
from dgpo_plugin.worlds.shapes import reward as shapes
from dgpo_plugin.distributed.processes import join_processes

class StandIn:
    def __call__(self, images, prompts):
        rank = join_processes().rank
{textwrap.indent(textwrap.dedent(body).strip(), 8 * " ")}

shapes.ShapesReward = StandIn
main()
""")
    return file


BROKEN = """
    if rank == 1 and len(images) > 2:  # two are its trial
        raise ConnectionError("the judge is out")
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_all_with_its_reason(tmp_path: Path) -> None:
    script = program_with_reward(tmp_path / "broken.py", BROKEN)
    process = launch(2, *arguments(tmp_path / "run", "scoring.retries=0"), extra=str(script))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 1: reward shapes: failed 1 times, last with ConnectionError: the judge is out" in output
    assert list((tmp_path / "run" / "failed-reward").glob("*.png"))


@pytest.mark.fast
def test_alone_nothing_is_sent() -> None:
    alone = Processes()
    values = torch.arange(6.0)
    assert torch.equal(alone.assemble(values, alone.share(6), 6), values)
    assert alone.sum(values) is values
    assert alone.largest(values[3]) == 3
    alone.fail_together(None)
    with pytest.raises(UserError, match="^broken$"):
        alone.fail_together("broken")


@pytest.mark.fast
@pytest.mark.parametrize(("total", "count"), [(15, 2), (15, 4), (3, 4), (16, 4)])
def test_shares_cover_everything_once(total: int, count: int) -> None:
    shares = [Processes(rank, count).share(total) for rank in range(count)]
    assert sorted(torch.cat(shares).tolist()) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def dist(name: str, text: str) -> RuntimeError:
    error: RuntimeError = getattr(torch.distributed, name)(text)
    return error


LOST = [
    RuntimeError("[/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4242\nand more"),
    RuntimeError("[/gloo/transport/tcp/pair.cc:447] Read error [127.0.0.1]:1: Connection reset by peer"),
    RuntimeError(
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
    ),
    RuntimeError("Application timeout caused pair closure"),
    dist("DistBackendError", "NCCL error, remote process exited or there was a network error, NCCL version 2.27"),
    dist(
        "DistNetworkError", "The client socket has failed to connect to [::1]:29500 (errno: 111 - Connection refused)"
    ),
    dist("DistStoreError", "wait timeout after 300000ms, keys: /default_pg/0/0"),
]
OWN = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    dist("DistBackendError", "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    dist("DistBackendError", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError(""),
    torch.OutOfMemoryError("out of memory; Connection closed by peer"),  # the class says more than the text
]


def collective(error: RuntimeError, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every collective in turn, failing so."""

    def fails(*arguments: object, **named: object) -> object:
        raise error

    for used in ("reduce", "gather_object", "broadcast_object_list"):
        monkeypatch.setattr(processes, used, fails)
    two = Processes(0, 2)
    {
        "sum": lambda: two.sum(torch.ones(2)),
        "fail_together": lambda: two.fail_together(None),
        "on_main": lambda: two.on_main(lambda: None),
    }[name]()


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sum", "fail_together", "on_main"])
@pytest.mark.parametrize("error", LOST)
def test_a_lost_connection_is_a_process_that_is_gone(
    error: RuntimeError, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"^another process is gone, or did not answer .*; see what it said before \(.*\); go on with"
    ) as raised:
        collective(error, monkeypatch, name)
    assert "\n" not in str(raised.value)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sum", "fail_together", "on_main"])
@pytest.mark.parametrize("error", OWN)
def test_an_error_of_this_process_is_not_blamed_on_another(
    error: RuntimeError, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError) as raised:
        collective(error, monkeypatch, name)
    assert raised.value is error


@pytest.mark.fast
def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "runs_on_cpu", lambda: True)
    (name,) = device.device_names()
    assert name
    monkeypatch.setattr(device, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert device.device_names() == ["GPU 0", "GPU 1"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))  # which has no names
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert device.device_names() == ["mps"]
