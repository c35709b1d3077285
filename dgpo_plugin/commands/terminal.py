"""What every command does at the terminal: libraries kept quiet, a mistake told in one line, an exit code that says."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dgpo_plugin.common.errors import Stopped, UserError
from dgpo_plugin.common.files import reason
from dgpo_plugin.common.signals import ENDING, known

F = TypeVar("F", bound=Callable[..., Any])
OUT_OF_MEMORY = (
    "out of memory; set a smaller training.micro_batch_size (the result stays the same), "
    "training.gradient_checkpointing=true or model.offload=true; `dgpo plan` says what a run takes"
)
STOPPED = "stopped; what was finished is kept"
BY_SIGNALS = {128 + number for number in known(ENDING)}
"""Exit codes, as a shell has them, of commands that signals ended in order."""
Changes = tuple[str, ...]
"""What was given with ``--set``."""
set_option = functools.partial(click.option, "--set", "overrides", multiple=True, metavar="FIELD=VALUE")
"""The option ``--set FIELD=VALUE``; its ``help`` says whose fields they are."""


def quieten() -> None:
    """Keep the libraries' start-up notices out of our output; their errors still show."""
    # The hub's retries are warnings; what it says last is in our error.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    for name in ("torchao", "torch.utils._pytree"):  # about kernels that are not for this machine
        logging.getLogger(name).setLevel(logging.ERROR)
    # They say what `auto` is, and why; how far a long reading is; and which files of others are run.
    for name in ("distributed.processor", "common.content", "common.user_file"):
        show_notes_of(f"dgpo_plugin.{name}")


def show_notes_of(name: str) -> None:
    """Write what a logger notes on standard error, a line each."""
    speaks = logging.getLogger(name)
    if not speaks.handlers:
        speaks.setLevel(logging.INFO)
        speaks.addHandler(_StandardError())


class _StandardError(logging.Handler):
    """What a logger says, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def reports_user_errors(command: F) -> F:
    """The command, with one line on standard error: exit code 2 for what the user can mend, 130 for Ctrl-C.

    That is a UserError, memory that ran out, and whatever a file or a disk answers that nobody expected.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        quieten()
        try:
            return command(*args, **kwargs)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            raise SystemExit(2) from error
        except (RuntimeError, MemoryError, OSError) as error:
            told = OUT_OF_MEMORY
            if not is_out_of_memory(error):
                if not isinstance(error, OSError):
                    raise
                _let_go_of_output()
                told = f"{error.filename or 'a file or a stream'}: {reason(error)}; see to its disk"
            click.echo(f"error: {told}", err=True)
            raise SystemExit(2) from error
        except Stopped as error:
            click.echo(str(error), err=True)
            raise SystemExit(130) from error
        except KeyboardInterrupt as error:
            click.echo(STOPPED, err=True)
            raise SystemExit(130) from error
        except SystemExit as error:
            if error.code in BY_SIGNALS:
                click.echo(STOPPED, err=True)
            raise

    return wrapped  # type: ignore[return-value]


def _let_go_of_output() -> None:
    """Give up what standard output cannot take, which Python would try again, and fail with, on its way out."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: the GPU's (torch's class, or the driver's, cuBLAS' or NCCL's words), or the CPU's.

    oneDNN, which computes on CPUs, says only that it could not make what it had found to be possible; Python, that
    there is no room for another thread's stack.
    """
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(said in text for said in ("out of memory", "status_alloc_failed", "bad_alloc", "can't start new thread"))
        or text.endswith(("could not create a primitive", "could not create a memory object"))
        or ("defaultcpuallocator" in text and "memory" in text)
    )
