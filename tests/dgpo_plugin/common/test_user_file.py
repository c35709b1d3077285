"""A user's own file: a module like any other, with its folder's helpers, and nothing that it does reaches the run."""

from __future__ import annotations

import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dgpo_plugin.common.prompt
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.own_sources import read_sources
from dgpo_plugin.common.user_file import files_hash, import_from_file, loaded_hash, remember_origin

pytestmark = pytest.mark.fast

CASES = Path(__file__).parents[2] / "cases" / "rewards"


def write(folder: Path, **files: str) -> str:
    """Files by their paths, without ``.py``; the name of ``value`` in ``mine.py``."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return f"{folder / 'mine.py'}:value"


def imported(folder: Path, **files: str) -> Any:
    return import_from_file(write(folder, **files), "reward")


@pytest.mark.parametrize(
    ("files", "value"),
    [
        ({"mine": "from helper import value", "helper": "value = 1"}, 1),
        ({"mine": "import helper\nvalue = helper.value", "helper": "value = 2"}, 2),
        ({"mine": "import helper as h\nvalue = h.value", "helper": "value = 3"}, 3),
        ({"mine": "from helper import value", "helper": "from deeper import value", "deeper": "value = 4"}, 4),
        ({"mine": "from .helper import value", "helper": "value = 5"}, 5),
        ({"mine": "from . import helper\nvalue = helper.value", "helper": "value = 6"}, 6),
        ({"mine": "import pack.part\nvalue = pack.part.value", "pack/part": "value = 7"}, 7),  # no __init__.py
        ({"mine": "from pack import part\nvalue = part.value", "pack/part": "value = 8"}, 8),
        ({"mine": "from pack import value", "pack/__init__": "from .part import value", "pack/part": "value = 9"}, 9),
        ({"mine": "from pack.part import value", "pack/part": "from pack.other import value",
          "pack/other": "value = 10"}, 10),
        ({"mine": "import helper\nother = 11\nvalue = helper.get()",
          "helper": "def get():\n    import mine\n    return mine.other"}, 11),
        # The folder comes first, as for a script: before the standard library and what is installed.
        ({"mine": "from statistics import value", "statistics": "value = 12"}, 12),
        ({"mine": "from rich import value", "rich": "value = 13"}, 13),
        ({"mine": "value = __import__('helper').value", "helper": "value = 14"}, 14),
        ({"mine": "from helper import *", "helper": "value = 15"}, 15),
    ],
    ids=range(15),
)  # fmt: skip
def test_the_folder_of_a_file_is_importable(files: dict[str, str], value: int, tmp_path: Path) -> None:
    path = list(sys.path)
    assert imported(tmp_path, **files) == value
    assert sys.path == path
    assert "helper" not in sys.modules
    assert vars(sys.modules["statistics"])["mean"]


def test_a_helper_may_be_imported_in_a_call(tmp_path: Path) -> None:
    value = imported(tmp_path, mine="def value():\n    from helper import one\n    return one", helper="one = 1")
    write(tmp_path, helper="one = 2")  # what was hashed is what runs
    assert value() == 1


def test_helpers_of_one_name_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    mine = "def value():\n    import helper\n    return helper.one"
    values = [imported(tmp_path / str(n), mine=mine, helper=f"one = {n}") for n in range(3)]
    assert [value() for value in values] == [0, 1, 2]


def test_a_file_is_not_its_own_helper(tmp_path: Path) -> None:
    """A reward in ``safetensors.py`` that imports safetensors means the package."""
    (tmp_path / "safetensors.py").write_text("import safetensors\nvalue = safetensors.safe_open\n")
    assert import_from_file(f"{tmp_path / 'safetensors.py'}:value", "reward").__module__ == "builtins"


def test_beside_the_library_a_file_gets_the_library_and_no_copy(tmp_path: Path) -> None:
    """In a clone of the repository, where ``dgpo_plugin`` lies beside ``mine.py``."""
    (tmp_path / "dgpo_plugin").symlink_to(Path(dgpo_plugin.__file__).parent)
    assert imported(tmp_path, mine="from dgpo_plugin import Prompt as value") is dgpo_plugin.common.prompt.Prompt
    assert list(read_sources(tmp_path / "mine.py").content) == [tmp_path / "mine.py"]


def test_what_a_file_defines_can_be_pickled_and_resolved(tmp_path: Path) -> None:
    made = imported(tmp_path, mine="from helper import Value as value", helper="class Value:\n    pass")
    assert type(pickle.loads(pickle.dumps(made()))) is made
    assert sys.modules[made.__module__].__name__ == made.__module__


@pytest.mark.parametrize("name", ["my-reward.py", "my reward.v2.py", "1.py", "été.py"])
def test_any_file_name_will_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("from helper import value\n")
    assert (
        import_from_file(f"{write(tmp_path, helper='value = 1')[: -len('mine.py:value')]}{name}:value", "reward") == 1
    )


@pytest.mark.parametrize("name", ["with_a_helper/mine.py", "with_dataclass.py", "switches_gradients_off.py"])
def test_a_case(name: str) -> None:
    reward = import_from_file(f"{CASES / name}:reward", "reward")
    assert torch.is_grad_enabled()
    assert reward(torch.full((2, 3, 4, 4), 0.25), []).tolist() == [0.25, 0.25]


# ---- hashed


@pytest.mark.parametrize(
    "mine",
    [
        "import helper\nvalue = 1",
        "def value():\n    from helper import one",
        "from .helper import one\nvalue = 1",
        "import pack.part\nvalue = 1",
        "from pack import part\nvalue = 1",
        "from pack.part import one\nvalue = 1",
    ],
)  # fmt: skip
def test_helpers_are_hashed_and_a_changed_one_is_run_anew(mine: str, tmp_path: Path) -> None:
    files = {"helper": "one = 1", "pack/part": "from helper import one"}
    name = write(tmp_path, mine=mine, **files)
    import_from_file(name, "reward")
    before, first = loaded_hash([name]), sys.modules.copy()
    assert before == files_hash([name])
    import_from_file(name, "reward")
    assert sys.modules.keys() == first.keys()
    write(tmp_path, helper="one = 2")
    assert files_hash([name]) != before == loaded_hash([name])
    import_from_file(name, "reward")
    assert loaded_hash([name]) == files_hash([name])
    assert len(sys.modules) > len(first)


def test_of_a_folder_only_what_is_imported_is_hashed(tmp_path: Path) -> None:
    name = write(tmp_path, mine="import os.path, helper\nvalue = 1", helper="one = 1", other="one = 1")
    before = files_hash([name])
    write(tmp_path, other="one = 2")
    (tmp_path / "notes.txt").write_text("no code")
    assert files_hash([name]) == before


# ---- errors


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mine": "import nowhere"},
         "ModuleNotFoundError while loading it: No module named 'nowhere' (at {0}/mine.py:1)"),
        ({"mine": "\n1 / 0"}, "ZeroDivisionError while loading it: division by zero (at {0}/mine.py:2)"),
        ({"mine": "import helper", "helper": "\n\n1 / 0"},
         "ZeroDivisionError while loading it: division by zero (at {0}/helper.py:3)"),
        ({"mine": "import sys\nsys.exit(0)"}, "SystemExit while loading it: 0 (at {0}/mine.py:2)"),
        ({"mine": "raise GeneratorExit"}, "GeneratorExit while loading it (at {0}/mine.py:1)"),
        ({"mine": "class Own(BaseException):\n    pass\nraise Own('a\\nb')"},
         "Own while loading it: a (at {0}/mine.py:3)"),
        ({"mine": "class Own(Exception):\n    def __str__(self):\n        raise SystemExit\nraise Own"},
         "Own while loading it: its message cannot be read (at {0}/mine.py:4)"),
        ({"mine": "import pack.absent", "pack/__init__": ""},
         "ModuleNotFoundError while loading it: No module named 'pack.absent' (at {0}/mine.py:1)"),
        ({"mine": "from helper import absent", "helper": ""},
         "ImportError while loading it: cannot import name 'absent' from 'helper' ({0}/helper.py) (at {0}/mine.py:1)"),
        ({"mine": "value = ("}, "SyntaxError while loading it: '(' was never closed (mine.py, line 1)"),
    ],
    ids=range(10),
)  # fmt: skip
def test_an_error_has_its_place_and_the_next_try_runs_it_again(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    name = write(tmp_path, **files)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            import_from_file(name, "reward")
        assert str(caught.value) == f"reward {name}: {said.format(tmp_path)}"


def test_ctrl_c_while_a_file_is_imported_stops(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path, mine="raise KeyboardInterrupt")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch.set_default_dtype(torch.bfloat16)", "default dtype from torch.float32 to torch.bfloat16"),
        ("torch.set_default_dtype(torch.float64)", "default dtype from torch.float32 to torch.float64"),
        ("torch.set_default_device('meta')", "default device from cpu to meta"),
    ],
)
def test_another_default_is_refused_by_name_each_time_and_put_back(line: str, said: str, tmp_path: Path) -> None:
    name = write(tmp_path, mine=f"import torch\n{line}\nvalue = 1")
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            import_from_file(name, "reward")
        assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float32, "cpu")


def everybodys() -> dict[str, Any]:
    """What all code of a process shares, and a thread's own of torch."""
    backends = torch.backends
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.enabled),
        "anomalies": torch.is_anomaly_enabled(),
        "attention": (backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "folder": os.getcwd(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "torch": torch.get_rng_state().tolist(),
        "streams": (sys.stdout, sys.stderr),
    }


MEDDLING = (
    "torch.set_grad_enabled(False)",
    "torch.no_grad().__enter__()",
    "torch.inference_mode().__enter__()",
    "kept = torch.inference_mode(); kept.__enter__()",
    "torch.autocast('cpu').__enter__()",
    "torch.use_deterministic_algorithms(True)",
    "torch.backends.cudnn.benchmark = True",
    "torch.backends.cudnn.deterministic = True",
    "torch.autograd.set_detect_anomaly(True)",
    "torch.backends.cuda.enable_flash_sdp(False)",
    "torch.backends.cuda.enable_mem_efficient_sdp(False)",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.set_num_threads(2)",
    "os.chdir('/')",
    "import sys; sys.stdout = sys.stderr = None",
    "random.seed(0)",
    "np.random.seed(0)",
    "torch.manual_seed(0)",
    "random.random(), np.random.rand(), torch.rand(3)",
)


@pytest.mark.parametrize("line", MEDDLING)
def test_what_a_file_changes_of_everybodys_is_put_back(line: str, tmp_path: Path) -> None:
    before = everybodys()
    imported(tmp_path, mine=f"import os, random, torch, numpy as np\n{line}\nvalue = 1")
    assert everybodys() == before


def said_of(name: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level("INFO", "dgpo_plugin.common.user_file"):
        import_from_file(name, "reward")
    return [record.getMessage() for record in caplog.records]


def test_a_file_outside_the_working_folder_is_named_once_with_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name = write(tmp_path / "there", mine="value = 1\nother = 2")
    remember_origin({"rewards": {"a": {"reward": "../there/mine.py:value"}}}, "run.yaml")
    line = f"running {tmp_path / 'there' / 'mine.py'} as reward, named by run.yaml; it lies outside the working folder"
    assert said_of(name, caplog) == [line]
    assert said_of("../there/mine.py:other", caplog) == [line]


def test_a_file_in_the_working_folder_runs_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said_of(write(tmp_path / "mine", mine="value = 1"), caplog) == []


def test_a_worker_leaves_the_line_to_the_process_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert said_of(write(tmp_path, mine="value = 1"), caplog) == []


@pytest.mark.parametrize("path", ["a\0b.py", "x" * 5000 + ".py", "/dev/null.py"], ids=["NUL", "long", "device"])
def test_a_path_that_can_lead_nowhere_is_a_line(path: str) -> None:
    with pytest.raises(UserError, match="reward "):
        import_from_file(f"{path}:value", "reward")
