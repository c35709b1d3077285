"""bf16 is tried before it is used: on this processor, and on ones that are only imitated by what a trial would say.

No processor at hand refuses its AMX, so trials that die do so by a SIGILL that they send themselves.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from dgpo_plugin.commands.main import main
from dgpo_plugin.common.errors import StopNow, UserError
from dgpo_plugin.config.fields import ModelConfig, ScoringConfig
from dgpo_plugin.config.load import load_config
from dgpo_plugin.distributed import processor
from dgpo_plugin.distributed.processor import (
    COMMON_WORK,
    ISA_VARIABLE,
    ISA_WITHOUT_AMX,
    ProcessState,
    Trial,
    bf16_trial,
    settled,
)
from dgpo_plugin.models import load_model
from dgpo_plugin.models.load import denoiser_work
from dgpo_plugin.rewards.networks.base import NeuralReward
from dgpo_plugin.training import run
from dgpo_plugin.training.build import build_trainer
from tests.conftest import SMALL, needs_bf16
from tests.dgpo_plugin.families import FAMILIES

CPU = torch.device("cpu")
AUTO = [change for change in SMALL if "precision" not in change] + ["model.precision=auto"]

DIES = "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), {signal})"


def trial_script(*, plain: str = "", masked: str = "", fp32: float = 1.0, bf16: float = 0.5) -> str:
    """A trial that says what it is told to, and runs ``plain``, or under the mask ``masked``, before it does."""
    return f"""
import json, os, sys
sys.stdin.read()
masked = os.environ.get("{ISA_VARIABLE}") == "{ISA_WITHOUT_AMX}"
print(json.dumps({{"fp16": not masked}}), flush=True)
exec({masked!r} if masked else {plain!r})
print(json.dumps({{"error": 0.01, "fp32": {fp32}, "bf16": {bf16}}}))
"""


ILLEGAL = DIES.format(signal="signal.SIGILL")
FAST, SLOW = trial_script(), trial_script(bf16=2.0)
DEAD = trial_script(plain=ILLEGAL, masked=ILLEGAL)
TRAPS = trial_script(plain=ILLEGAL)

Imitate = Callable[[str], None]


@pytest.fixture
def imitate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Imitate:
    """Another processor from here on, on which nothing was tried yet and nothing is kept."""
    script = tmp_path / "trial" / "trial.py"
    script.parent.mkdir()
    monkeypatch.setattr(processor, "TRIAL", script)
    monkeypatch.setattr(processor, "cache_folder", lambda: tmp_path / "trial" / "cache")

    def as_if(says: str) -> None:
        script.write_text(says)
        monkeypatch.setattr(processor, "state", ProcessState())
        monkeypatch.delenv(ISA_VARIABLE, raising=False)
        for file in (tmp_path / "trial" / "cache").glob("*"):
            file.unlink()

    as_if(FAST)
    return as_if


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dgpo_plugin.distributed.processor"]


@functools.cache
def says_fp16(*steps: str) -> bool:
    """What oneDNN says of itself after some steps in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if name != ISA_VARIABLE}
    script = "; ".join(["import torch", *steps, "print(torch.ops.mkldnn._is_mkldnn_fp16_supported())"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean)
    return done.stdout.strip() == "True"


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


# ---- the real trial, here


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["", "ONEDNN_MAX_CPU_ISA=AVX2", "ATEN_CPU_CAPABILITY=default"])
def test_the_real_trial_answers(variable: str, imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever processor runs this, as it is and cut down: it works, with times, or there is a reason."""
    monkeypatch.undo()
    monkeypatch.setattr(processor, "state", ProcessState())
    monkeypatch.setattr(processor, "cache_folder", homeless)
    name, _, value = variable.partition("=")
    if name:
        monkeypatch.setenv(name, value)
    trial = bf16_trial(((64, 32, 32, 2),), 1)
    assert bool(trial.problem) != (trial.fp32 > 0 and trial.bf16 > 0)
    assert "no process could be started" not in trial.problem
    assert "not done" not in trial.problem


@pytest.mark.slow
@needs_bf16
def test_a_process_that_has_computed_cannot_be_masked_any_more() -> None:
    """oneDNN itself says so. Where it has no float16 anyway, its answer tells nothing, and none is looked for."""
    mask = f"import os; os.environ['{ISA_VARIABLE}'] = '{ISA_WITHOUT_AMX}'"
    compute = "torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))"
    if not says_fp16():
        pytest.skip("this processor has no float16")
    assert not says_fp16(mask)
    assert says_fp16(compute, mask)


# ---- what is chosen


@pytest.mark.fast
@pytest.mark.parametrize(
    ("says", "chosen", "why"),
    [
        (FAST, "bf16", "model.precision auto: bf16, whose layers take 1/2.0 of fp32's time"),
        (trial_script(bf16=0.95), "fp32", "bf16's layers are 5% faster on this processor, of 10% that it takes"),
        (SLOW, "fp32", "bf16's layers take 2.0 times as long"),
        (DEAD, "fp32", "bf16 does not work here (a trial of it was ended by SIGILL)"),
        (trial_script(plain="raise RuntimeError('pack_vnni2')"), "fp32", "failed (RuntimeError: pack_vnni2)"),
        (trial_script(plain="print(json.dumps({'error': 0.7, 'fp32': 1, 'bf16': .1})); sys.exit()"), "fp32", "wrong"),
        (trial_script(plain=DIES.format(signal="signal.SIGKILL")), "fp32", "a trial of it failed"),
        ("raise SystemExit('no torch')", "fp32", "a trial of it failed (no torch)"),
    ],
)
def test_auto_takes_what_works_and_is_clearly_faster(
    says: str, chosen: str, why: str, imitate: Imitate, caplog: pytest.LogCaptureFixture
) -> None:
    imitate(says)
    with caplog.at_level(logging.INFO):
        assert settled("model.precision", "auto", CPU) == chosen
    (line,) = lines(caplog)
    assert why in line
    assert os.environ.get(ISA_VARIABLE) is None


@pytest.mark.fast
def test_by_name_a_slow_one_runs_and_says_so_once(imitate: Imitate, caplog: pytest.LogCaptureFixture) -> None:
    imitate(SLOW)
    with caplog.at_level(logging.INFO):
        assert settled("scoring.precision", "bf16", CPU) == "bf16"
        assert settled("model.precision", "bf16", CPU) == "bf16"
    assert lines(caplog) == ["scoring.precision bf16: runs, but its layers take 2.0 times as long as fp32's here"]


@pytest.mark.fast
def test_by_name_one_that_does_not_run_is_refused(imitate: Imitate) -> None:
    imitate(DEAD)
    for _ in range(2):
        with pytest.raises(UserError, match=r"bf16: does not work here \(a trial of it was ended by SIGILL\); set it"):
            settled("model.precision", "bf16", CPU)


@pytest.mark.fast
def test_nothing_is_tried_where_nothing_has_to_be(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_trial(*_: object) -> None:
        raise AssertionError("a trial")

    monkeypatch.setattr(processor, "bf16_trial", no_trial)
    for device in ("cpu", "cuda", "mps"):
        for precision in ("fp32", "fp16"):
            assert settled("", precision, torch.device(device)) == precision
    assert settled("", "bf16", torch.device("cuda")) == "bf16"
    assert settled("", "auto", torch.device("mps")) == "fp32"
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert settled("", "auto", torch.device("cuda")) == ("bf16" if native else "fp32")


@pytest.mark.slow
def test_an_import_starts_no_process() -> None:
    script = """
import importlib, pkgutil, subprocess
import torch, diffusers, transformers, peft, accelerate
def refuse(*arguments, **options): raise AssertionError(arguments)
subprocess.Popen = refuse
import dgpo_plugin
for module in pkgutil.walk_packages(dgpo_plugin.__path__, "dgpo_plugin."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- AMX that is announced and refused


MASKING = """
import logging, os, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from pathlib import Path
from dgpo_plugin.distributed import processor
from dgpo_plugin.common.errors import UserError
processor.TRIAL, processor.cache_folder = Path(sys.argv[1]), lambda: Path(sys.argv[1]).with_name("kept")
if "computed" in sys.argv:
    torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3))
if "no-fp16" in sys.argv:
    processor.computes_in_fp16 = lambda: "computed" in sys.argv
for precision in ("auto", "bf16", "auto"):
    try:
        print(processor.settled("model.precision", precision, torch.device("cpu")))
    except UserError as error:
        print(error)
print(os.environ.get(processor.ISA_VARIABLE))
print(processor.computes_in_fp16())
"""


def masking(tmp_path: Path, says: str, *arguments: str) -> list[str]:
    """What a fresh process does; where the processor has no float16, its answer is imitated too."""
    (tmp_path / "trial.py").write_text(says)
    clean = {name: value for name, value in os.environ.items() if name != ISA_VARIABLE}
    extra = [] if says_fp16() else ["no-fp16"]
    command = [sys.executable, "-c", MASKING, str(tmp_path / "trial.py"), *arguments, *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    return [*done.stdout.splitlines(), done.stderr]


@pytest.mark.slow
def test_amx_that_traps_is_masked_for_the_process(tmp_path: Path) -> None:
    for _ in range(2):  # the second time from what was kept
        first, second, third, mask, fp16, said = masking(tmp_path, TRAPS)
        assert (first, second, third) == ("bf16", "bf16", "bf16")
        assert (mask, fp16) == (ISA_WITHOUT_AMX, "False")
        assert f"its AMX, announced and refused, is masked ({ISA_VARIABLE}={ISA_WITHOUT_AMX})" in said


@pytest.mark.slow
def test_a_masked_processor_that_is_slow_computes_in_float32(tmp_path: Path) -> None:
    first, second, third, mask, *_ = masking(tmp_path, trial_script(plain=ILLEGAL, bf16=1.5))
    assert (first, second, third, mask) == ("fp32", "bf16", "fp32", ISA_WITHOUT_AMX)


@pytest.mark.slow
def test_where_it_is_too_late_to_mask_it_is_float32(tmp_path: Path) -> None:
    """As in a ComfyUI that has already computed."""
    first, second, third, mask, fp16, said = masking(tmp_path, TRAPS, "computed")
    assert (first, third, mask, fp16) == ("fp32", "fp32", "None", "True")
    assert (
        f"can be masked only before a process first computes: start it with {ISA_VARIABLE}={ISA_WITHOUT_AMX}" in second
    )
    assert said.count("model.precision auto: fp32; bf16 does not work here") == 2


@pytest.mark.fast
def test_a_mask_that_does_not_show_is_not_relied_on(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without float16, or a torch that cannot be asked: its answer would be no, masked or not."""
    monkeypatch.setattr(processor, "computes_in_fp16", lambda: False)
    imitate(TRAPS)
    assert settled("", "auto", CPU) == "bf16"
    assert os.environ[ISA_VARIABLE] == ISA_WITHOUT_AMX
    for says in (TRAPS.replace("not masked", "False"), TRAPS.replace("not masked", "True")):
        imitate(says)
        assert settled("", "auto", CPU) == "fp32"
        assert ISA_VARIABLE not in os.environ


@pytest.mark.fast
def test_a_switch_of_the_users_own_is_left_alone(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(TRAPS)
    monkeypatch.setenv(ISA_VARIABLE, "AVX512_CORE_AMX")
    with pytest.raises(UserError, match=f"SIGILL, with {ISA_VARIABLE}=AVX512_CORE_AMX"):
        settled("", "bf16", CPU)
    assert os.environ[ISA_VARIABLE] == "AVX512_CORE_AMX"


@pytest.mark.fast
def test_a_switch_that_was_set_too_late_is_noticed(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, say: a trial has it from its start, and this process has not."""
    for answer, refused in ((True, True), (False, False)):
        imitate(TRAPS)
        monkeypatch.setenv(ISA_VARIABLE, ISA_WITHOUT_AMX)
        monkeypatch.setattr(processor, "computes_in_fp16", lambda answer=answer: answer)
        if refused:
            with pytest.raises(UserError, match=f"{ISA_VARIABLE} was set when this process had computed already"):
                settled("", "bf16", CPU)
        else:
            assert settled("", "bf16", CPU) == "bf16"


# ---- what is kept


def forget(monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """A new process, in which a trial would say something else."""
    processor.TRIAL.write_text(says)
    monkeypatch.setattr(processor, "state", ProcessState())


@pytest.mark.fast
def test_a_trial_is_kept(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = bf16_trial(COMMON_WORK, 1)
    forget(monkeypatch, DEAD)
    assert bf16_trial(COMMON_WORK, 1) == trial
    # but not for other work, other threads, or another limit on the processor
    assert bf16_trial(((1, 2, 3, 4),), 1).problem
    assert bf16_trial(COMMON_WORK, 2).problem
    monkeypatch.setattr(processor, "state", ProcessState())
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert bf16_trial(COMMON_WORK, 1).problem


@pytest.mark.fast
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"fp32": "fast"}', b'{"other": 1}'])
def test_a_damaged_cache_is_no_error(content: bytes, imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = bf16_trial(COMMON_WORK, 1)
    (file,) = vars(processor)["cache_folder"]().iterdir()
    file.write_bytes(content)
    forget(monkeypatch, FAST)
    assert bf16_trial(COMMON_WORK, 1) == trial
    assert json.loads(file.read_text())["fp32"] == 1.0


@pytest.mark.fast
def test_a_cache_that_cannot_be_written_is_no_error(
    imitate: Imitate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(processor, "cache_folder", lambda: tmp_path / "file" / "cache")
    assert not bf16_trial(COMMON_WORK, 1).problem

    monkeypatch.setattr(processor, "cache_folder", homeless)
    forget(monkeypatch, SLOW)
    assert bf16_trial(COMMON_WORK, 1).bf16 == 2


@pytest.mark.fast
def test_what_says_nothing_of_the_processor_is_not_kept(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed for want of memory, say."""
    imitate(trial_script(plain=DIES.format(signal="signal.SIGKILL")))
    assert bf16_trial(COMMON_WORK, 1).problem
    forget(monkeypatch, FAST)
    assert not bf16_trial(COMMON_WORK, 1).problem


# ---- every way into bf16


class Mean(NeuralReward):
    """A reward with a network."""

    def __init__(self, config: ScoringConfig) -> None:
        super().__init__(torch.nn.Linear(3, 1), config)

    def score(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
        return images.mean((1, 2, 3))


OWN = "from tests.dgpo_plugin.distributed.test_processor import Mean\n"
SHARED = [part for change in SMALL if "precision" not in change for part in ("--set", change)]


@pytest.mark.fast
@pytest.mark.parametrize(
    "command",
    [
        ["train", "shapes", "--output", "{tmp}/run", *SHARED, "--set", "model.precision=bf16"],
        ["train", "shapes", "--output", "{tmp}/run", *SHARED, "--set", "model.precision=fp32",
         "--set", "rewards={{'{tmp}/mine.py:Mean': {{precision: bf16}}}}"],
        ["score", "{tmp}/a.png", "--reward", "{tmp}/mine.py:Mean", "--prompt", "x", "--set", "precision=bf16"],
        ["serve-reward", "{tmp}/mine.py:Mean", "--port", "0", "--set", "precision=bf16"],
        ["sample", "half", "--prompt", "a red circle", "--output", "{tmp}/x.png"],
    ],
)  # fmt: skip
def test_every_command_refuses_what_would_die(
    command: list[str], imitate: Imitate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imitate(DEAD)
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "half.yaml").write_text(
        "{model: {path: shapes, precision: bf16}, prompts: {train: shapes/train}, rewards: shapes}"
    )
    names = {"half": tmp_path / "half.yaml"}
    if command[0] == "sample":
        monkeypatch.setattr("dgpo_plugin.config.load.preset_names", lambda: names)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    result = CliRunner().invoke(main, [part.format(tmp=tmp_path) for part in command])
    assert result.exit_code == 2, result.output
    told = result.stderr.strip().splitlines()
    (line,) = [each for each in told if not each.startswith(f"running {tmp_path / 'mine.py'} as reward")]
    assert "bf16: does not work here (a trial of it was ended by SIGILL); set it to fp32" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.fast
def test_the_vaes_own_precision_is_looked_at_too(imitate: Imitate) -> None:
    imitate(DEAD)
    with pytest.raises(UserError, match=r"model\.vae_precision bf16: does not work here"):
        load_model(ModelConfig(path="shapes", precision="fp32", vae_precision="bf16"))


@pytest.mark.fast
def test_a_reward_that_is_moved_to_a_processor_is_looked_at_again(imitate: Imitate) -> None:
    """ComfyUI sets the device after the reward was loaded."""
    imitate(DEAD)
    reward = Mean(ScoringConfig(precision="bf16", device="cuda"))
    reward.device = CPU
    with pytest.raises(UserError, match=r"scoring.precision bf16: does not work here"):
        reward(torch.zeros(1, 3, 8, 8), [])


@pytest.mark.fast
def test_pretraining_decides_before_it_computes(
    imitate: Imitate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dgpo_plugin.worlds.shapes import pretrain

    imitate(DEAD)

    def enough(*_: object) -> None:
        raise StopNow

    monkeypatch.setattr(pretrain, "draw_scenes", enough)
    with pytest.raises(StopNow):
        pretrain.pretrain(tmp_path / "world")
    assert json.loads((tmp_path / "world" / "pretrain.jsonl").read_text())["precision"] == "fp32"


# ---- a model's own work


@pytest.mark.fast
def test_the_work_is_the_denoisers_own() -> None:
    """Counted by hand: 4 layers of width 128, 16 tokens of a picture and 13 of a text, 3 layers of which go on."""
    pictures, texts = 8 * 16, 8 * 13
    assert set(denoiser_work(ModelConfig(path="shapes", max_sequence_length=1), 8)) == {
        (pictures, 128, 128, 16),
        (pictures, 128, 512, 4),
        (pictures, 512, 128, 4),
        (texts, 128, 128, 16),
        (texts, 128, 512, 3),
        (texts, 512, 128, 3),
    }


@pytest.mark.fast
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_work_is_found(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    chosen.build(tmp_path)
    config = ModelConfig(
        path=str(tmp_path), width=chosen.width, height=chosen.height, max_sequence_length=chosen.tokens
    )
    work = denoiser_work(config, 2)
    assert work
    assert all(number > 0 for layer in work for number in layer)


@pytest.mark.fast
def test_what_is_timed_is_what_runs(imitate: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch that a run has, and its threads."""
    asked: list[tuple[object, int]] = []

    def trial(work: object, threads: int) -> Trial:
        asked.append((work, threads))
        return Trial(fp32=1, bf16=2)

    monkeypatch.setattr(processor, "bf16_trial", trial)
    config = load_config("shapes", [*AUTO, "training.micro_batch_size=3"])
    assert build_trainer(config).config.model.precision == "fp32"
    assert asked == [(denoiser_work(config.model, 3), torch.get_num_threads())]


# ---- decided once a run


@pytest.mark.fast
def test_what_auto_was_is_written_into_the_run_and_kept(
    imitate: Imitate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that turns out otherwise later changes nothing."""
    imitate(SLOW)
    folder = tmp_path / "run"
    run.train(load_config("shapes", [*AUTO, "training.decay=none"]), folder, Console(quiet=True))
    config = folder / "config.yaml"
    assert yaml.safe_load(config.read_text())["model"]["precision"] == "fp32"
    state = json.loads((folder / "checkpoints" / "000002" / "state.json").read_text())
    assert state["identity"]["config"]["model"]["precision"] == "fp32"
    imitate(FAST)
    config.write_text(config.read_text().replace("  iterations: 2", "  iterations: 3"))
    monkeypatch.setattr(processor, "bf16_trial", None)  # would be called
    assert run.resume(folder, Console(quiet=True)).exists()
    again = run.train(load_config(str(config)), tmp_path / "again", Console(quiet=True))
    assert again.exists()


@pytest.mark.slow
def test_all_processes_hear_what_the_first_decided(tmp_path: Path) -> None:
    """Two real ones, the second of which would decide otherwise."""
    script = tmp_path / "two.py"
    script.write_text("""
import os
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.distributed.processes import join_processes, leave_processes
processes = join_processes()
def decide():
    return "bf16" if processes.is_main else "fp32"
def refuse():
    raise UserError("no bf16")
def say(what):
    os.write(1, f"{processes.rank} {what}\\n".encode())  # a whole line at once, or the two are mixed
say(processes.decided_by_main(decide))
try:
    processes.decided_by_main(refuse)
except UserError as error:
    say(error)
leave_processes()
""")
    from tests.dgpo_plugin.distributed.test_processes import finish, launch

    said = finish(launch(2, extra=str(script)))
    for line in ("0 bf16", "1 bf16", "0 no bf16", "1 no bf16"):
        assert line in said


@pytest.mark.fast
def test_an_unsettled_auto_is_planned_as_float32(imitate: Imitate) -> None:
    """The file of planned memory must not hang on the processor that wrote it."""
    from dgpo_plugin.training.plan import make_plan

    imitate(FAST)
    auto, full = (make_plan(load_config("shapes", [f"model.precision={name}"])) for name in ("auto", "fp32"))
    assert auto == full
    printed = CliRunner().invoke(main, ["plan", "shapes"]).output
    assert "auto, planned as fp32" in printed


@pytest.mark.fast
@needs_bf16
def test_a_model_is_loaded_in_what_was_chosen(imitate: Imitate) -> None:
    for says, kind in ((FAST, torch.bfloat16), (SLOW, torch.float32)):
        imitate(says)
        assert load_model(ModelConfig(path="shapes", precision="auto")).denoiser.dtype == kind
