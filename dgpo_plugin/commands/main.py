"""The ``dgpo`` command."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from dgpo_plugin.common.errors import Stopped, UserError

F = TypeVar("F", bound=Callable[..., Any])


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
    chosen = logging.getLogger("dgpo_plugin.distributed.processor")  # says what `auto` is, and why
    if not chosen.handlers:
        chosen.setLevel(logging.INFO)
        chosen.addHandler(_Lines())


class _Lines(logging.Handler):
    """What a logger says, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def reports_user_errors(command: F) -> F:
    """One line on standard error and exit code 2 for a UserError; 130 for Ctrl-C."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        quieten()
        try:
            return command(*args, **kwargs)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            raise SystemExit(2) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            click.echo(
                "error: out of memory; set a smaller training.micro_batch_size (the result stays the same), "
                "training.gradient_checkpointing=true or model.offload=true; `dgpo plan` says what a run takes",
                err=True,
            )
            raise SystemExit(2) from error
        except Stopped as error:
            click.echo(str(error), err=True)
            raise SystemExit(130) from error
        except KeyboardInterrupt as error:
            click.echo("stopped; what was finished is kept", err=True)
            raise SystemExit(130) from error

    return wrapped  # type: ignore[return-value]


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU (torch's own class, or what the driver, cuBLAS or NCCL say), of the CPU's allocator, or of Python."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(said in text for said in ("out of memory", "status_alloc_failed"))
        or ("defaultcpuallocator" in text and "memory" in text)
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgpo-plugin")
def main() -> None:
    """Fine-tune text-to-image models with a reward."""


@main.command()
@click.argument("config")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the run; must be new.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field, repeatable.")
@reports_user_errors
def train(config: str, output: Path, overrides: tuple[str, ...]) -> None:
    """Train an adapter. CONFIG is a preset's name or a YAML file."""
    from dgpo_plugin.config.load import load_config

    loaded = load_config(config, overrides)
    from dgpo_plugin.common.faults import explained
    from dgpo_plugin.distributed.processes import leave_processes
    from dgpo_plugin.training import run

    with explained(f"go on with: dgpo resume {output}"):
        run.train(loaded, output, Console())
    leave_processes()


@main.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field, repeatable.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="That share an iteration.")
@click.option(
    "--memory", type=click.FloatRange(0, min_open=True), help="GiB of the GPU to plan for.  [default: this one]"
)
@reports_user_errors
def plan(config: str, overrides: tuple[str, ...], processes: int, memory: float | None) -> None:
    """Say what a run takes and whether it fits, before anything is loaded. CONFIG as for train."""
    from dgpo_plugin.common.tables import as_table
    from dgpo_plugin.config.load import load_config
    from dgpo_plugin.distributed.device import device_memory
    from dgpo_plugin.training.plan import make_plan, rows

    name, available = (f"a GPU of {memory:g} GiB", int(memory * 2**30)) if memory else device_memory()
    loaded = load_config(config, overrides)
    lines = rows(make_plan(loaded, processes), available, name)
    if loaded.model.precision == "auto":
        lines.append(("precision", "auto, planned as fp32: the larger of the two that it can be"))
    click.echo(as_table(lines))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--iterations", type=click.IntRange(1), help="Move the run's end: so many in all.  [default: as it is]")
@reports_user_errors
def resume(run: Path, iterations: int | None) -> None:
    """Go on with a run that was stopped or killed, or make a finished one longer. RUN is its folder."""
    from dgpo_plugin.common.faults import explained
    from dgpo_plugin.distributed.processes import leave_processes
    from dgpo_plugin.training import run as runs

    with explained(f"go on with: dgpo resume {run}"):
        runs.resume(run, Console(), iterations=iterations)
    leave_processes()


@main.command()
@click.argument("model")
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file; none for the base model.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to draw, repeatable.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="PNG file for the grid.")
@click.option("--count", default=8, show_default=True, type=click.IntRange(1), help="Pictures a prompt (a row).")
@click.option("--steps", type=click.IntRange(1), help="Of the sampler.  [default: as the preset evaluates]")
@click.option("--guidance", type=click.FloatRange(1), help="Likewise.")
@click.option("--strength", default=1.0, show_default=True, type=float, help="Of the adapter.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on other weights.")
@reports_user_errors
def sample(
    model: str,
    adapter: Path | None,
    prompts: tuple[str, ...],
    output: Path,
    count: int,
    steps: int | None,
    guidance: float | None,
    strength: float,
    seed: int,
    any_base: bool,
) -> None:
    """Draw pictures. MODEL is a preset's name, a diffusers folder or a hub id."""
    from dgpo_plugin.adapters.load import apply_adapter
    from dgpo_plugin.common.files import atomic_path
    from dgpo_plugin.common.pictures import image_grid
    from dgpo_plugin.config.fields import EvaluationConfig, ModelConfig
    from dgpo_plugin.config.load import load_config, preset_names
    from dgpo_plugin.distributed.device import best_device
    from dgpo_plugin.models import load_model
    from dgpo_plugin.models.generate import decode_in_batches, fixed_noise, sample_latents

    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: the name must end in .png")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt: is empty; say what to draw")
    base, evaluation = ModelConfig(path=model), EvaluationConfig()
    if model in preset_names():
        preset = load_config(model)
        base, evaluation = preset.model, preset.evaluation
    # Not in half precision unless asked for: the same pictures on every processor.
    precise = {"precision": "fp32"} if base.precision == "auto" else {}
    loaded = load_model(base.model_copy(update=precise), best_device())
    if adapter is not None:
        apply_adapter(loaded, adapter, strength=strength, any_base=any_base)
    texts = [prompt for prompt in prompts for _ in range(count)]
    noise = fixed_noise(loaded, range(count), seed).repeat(len(prompts), 1, 1, 1)
    latents = sample_latents(loaded, texts, noise, steps or evaluation.steps, guidance or evaluation.guidance)
    images = decode_in_batches(loaded.decode, latents)
    with atomic_path(output) as temporary:
        image_grid(images, columns=count).save(temporary)
    click.echo(str(output))


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@reports_user_errors
def inspect(adapter: Path) -> None:
    """Print an adapter's card."""
    from dgpo_plugin.adapters import AdapterCard, read_adapter
    from dgpo_plugin.common.tables import as_table

    click.echo(as_table(AdapterCard.of(read_adapter(adapter)).rows()))


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reward", "rewards", required=True, help="Names, comma-separated; see `dgpo list rewards`.")
@click.option("--prompt", help="What all of them should show.")
@click.option("--prompts", "prompt_file", help="Prompts in the pictures' order: .txt, .jsonl or a set's name.")
@click.option("--output", type=click.Path(path_type=Path), help=".csv or .json file; standard output if left out.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Of a run's section scoring, or rewards.NAME.options.x=1; repeatable.",
)
@reports_user_errors
def score(
    images: tuple[Path, ...],
    rewards: str,
    prompt: str | None,
    prompt_file: str | None,
    output: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Score pictures with rewards. IMAGES are files or folders."""
    from rich.progress import Progress

    from dgpo_plugin.common.files import write_text_atomically
    from dgpo_plugin.common.prompt import Prompt
    from dgpo_plugin.config.load import reward_terms
    from dgpo_plugin.prompts.registry import load_prompts
    from dgpo_plugin.rewards import load_rewards
    from dgpo_plugin.rewards.picture_files import as_text, find_pictures
    from dgpo_plugin.rewards.picture_files import score as score_pictures

    if (prompt is None) == (prompt_file is None):
        raise UserError("--prompt, --prompts: give one of the two")
    if output is not None and output.suffix not in (".csv", ".json"):
        raise UserError(f"--output {output}: the name must end in .csv or .json")
    pictures = find_pictures(images)
    prompts = [Prompt(prompt)] * len(pictures) if prompt is not None else load_prompts(prompt_file or "")
    if len(prompts) != len(pictures):
        raise UserError(f"--prompts {prompt_file}: {len(prompts)} prompts for {len(pictures)} pictures; give as many")
    terms, scoring = reward_terms([name.strip() for name in rewards.split(",")], overrides)
    console = Console(stderr=True)
    with console.status("loading the rewards"):
        loaded = load_rewards(terms, scoring)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=len(pictures))
        rows = score_pictures(
            pictures, prompts, loaded, scoring.batch_size, lambda done: bar.update(task, advance=done)
        )
    text = as_text(rows, "csv" if output is None else output.suffix[1:])
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text_atomically(output, text)


@main.command("serve-reward")
@click.argument("name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; beyond loopback it needs a token.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 for any free one.")
@click.option("--token-variable", help="Environment variable that holds the token which clients must bring.")
@click.option("--max-megabytes", default=64, show_default=True, type=click.IntRange(1), help="Of a request's body.")
@click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Of the reward, as device=cpu or options.x=1."
)
@reports_user_errors
def serve_reward(
    name: str, host: str, port: int, token_variable: str | None, max_megabytes: int, overrides: tuple[str, ...]
) -> None:
    """Serve a reward to other processes and machines. NAME as in `dgpo list rewards`, or your own file.py:name."""
    from dgpo_plugin.config.load import reward_terms
    from dgpo_plugin.rewards.served.server import serve
    from dgpo_plugin.rewards.served.wire import secret

    token = secret("--token-variable", token_variable)
    serve(*reward_terms([name], overrides), (host, port), token, max_megabytes * 2**20, click.echo)


@main.command("list")
@click.argument("kind", required=False, type=click.Choice(["presets", "models", "prompts", "rewards"]))
@reports_user_errors
def list_(kind: str | None) -> None:
    """List presets, models, prompt sets and rewards, or one KIND of them."""
    from dgpo_plugin.common.names import FAMILIES, WORLDS
    from dgpo_plugin.config.load import preset_names, preset_says
    from dgpo_plugin.prompts.registry import prompt_set_names
    from dgpo_plugin.rewards import REWARDS
    from dgpo_plugin.training.plan import model_rows

    rows: dict[str, tuple[str, Iterable[str]]] = {
        "presets": ("presets", preset_names()),
        "models": ("models", [*WORLDS, *(f"any {name}" for name in FAMILIES)]),
        "prompts": ("prompt sets", prompt_set_names()),
        "rewards": ("rewards", REWARDS),
    }
    if kind == "models":
        click.echo("\n".join(model_rows()))
        return
    if kind == "presets":
        for name, path in preset_names().items():
            click.echo("\n    ".join([name, *preset_says(path)]))
        return
    if kind == "rewards":
        for name, info in REWARDS.entries().items():
            click.echo(f"{name}\n    {info.about}\n    " + "; ".join(info.facts()))
        return
    for key, (label, names) in rows.items():
        if kind == key:
            click.echo("\n".join(names))
        elif kind is None:
            click.echo(f"{label + ':':<13}{', '.join(names)}")


@main.group()
def comfy() -> None:
    """The ComfyUI node pack."""


@comfy.command("install")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--python", type=click.Path(path_type=Path), help="ComfyUI's interpreter.  [default: its environment's]")
@reports_user_errors
def comfy_install(path: Path, python: Path | None) -> None:
    """Link the nodes into the ComfyUI at PATH and say what they still need there."""
    from dgpo_plugin.commands.comfy_install import install
    from dgpo_plugin.common.tables import as_table

    report = install(path, python)
    click.echo(as_table(report.rows))
    if report.problems:
        raise UserError("; ".join(report.problems))
    click.echo("restart ComfyUI; the nodes are under DGPO")


@main.group()
def worlds() -> None:
    """The embedded worlds."""


@worlds.command()
@click.argument("world")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the pipeline.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--iterations", type=click.IntRange(1), help="Of the denoiser; the shipped number if left out.")
@click.option("--compile/--no-compile", "compile_model", default=True, help="torch.compile the denoiser.")
@reports_user_errors
def pretrain(world: str, output: Path, seed: int, iterations: int | None, compile_model: bool) -> None:
    """Make the pipeline of WORLD again, from nothing (shapes: about an hour on two cores)."""
    from dgpo_plugin.common.names import WORLDS
    from dgpo_plugin.common.registry import imported

    entry = WORLDS.load(world).pretrain
    if not entry:
        raise UserError(f"world {world}: its pipeline cannot be made again; it says of no function that does")
    if (output / "model_index.json").exists():
        raise UserError(f"--output {output}: holds a pipeline already; choose another folder")
    make = imported(entry) if isinstance(entry, str) else entry
    make(output, seed, iterations, compile_model)
    click.echo(str(output))
