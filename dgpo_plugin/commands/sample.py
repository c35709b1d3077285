"""``dgpo sample`` and ``dgpo inspect``: what a finished adapter draws, and what its file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError


@click.command()
@click.argument("model")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Adapter file, or the folder that diffusers or peft saved; none for the base model. Repeatable: each goes on "
    "top of those before it.",
)
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to draw, repeatable.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="PNG file for the grid.")
@click.option(
    "--count", default=8, show_default=True, type=click.IntRange(1), help="Pictures of each prompt, which are a row."
)
@click.option("--steps", type=click.IntRange(1), help="Steps of the Euler sampler.  [default: as the preset evaluates]")
@click.option(
    "--guidance",
    type=click.FloatRange(1),
    help="Classifier-free guidance; 1 is none.  [default: as the preset evaluates]",
)
@click.option(
    "--width",
    type=click.IntRange(16),
    help="Pixels of the pictures, as --height.  [default: the preset's or the model's]",
)
@click.option("--height", type=click.IntRange(16), help="Pixels; with --width, or neither.")
@click.option(
    "--strength",
    type=float,
    help="Multiplies the last adapter's effect; 1 is what was trained, 0 nothing.  [default: 1, where the file's scale "
    "is known]",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the initial noise, the same in each row.")
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on other weights.")
@reports_user_errors
def sample(
    model: str,
    adapters: tuple[Path, ...],
    prompts: tuple[str, ...],
    output: Path,
    count: int,
    steps: int | None,
    guidance: float | None,
    width: int | None,
    height: int | None,
    strength: float | None,
    seed: int,
    any_base: bool,
) -> None:
    """Draw pictures. MODEL is a preset's name, a diffusers folder or a hub id."""
    from dgpo_plugin.adapters.load import apply_adapter, base_notes, load_base
    from dgpo_plugin.common.files import atomic_path
    from dgpo_plugin.common.pictures import image_grid
    from dgpo_plugin.config.fields import EvaluationConfig, ModelConfig
    from dgpo_plugin.config.load import load_config, preset_names
    from dgpo_plugin.distributed.device import best_device
    from dgpo_plugin.models.generate import fixed_noise, generate

    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: the name must end in .png")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt: is empty; say what to draw")
    base, evaluation = ModelConfig(path=model), EvaluationConfig()
    if model in preset_names():
        preset = load_config(model)
        base, evaluation = preset.model, preset.evaluation
    # Not in half precision unless asked for: the same pictures on every processor.
    changes: dict[str, Any] = {"precision": "fp32"} if base.precision == "auto" else {}
    if (width is None) != (height is None):
        raise UserError("--width and --height: give both, or neither for the model's own size")
    if width is not None:
        changes |= {"width": width, "height": height}
    loaded = load_base(base.model_copy(update=changes), best_device())
    for number, adapter in enumerate(adapters, 1):
        own = strength if number == len(adapters) else None
        file = apply_adapter(loaded, adapter, strength=own, any_base=any_base)
        if file.for_text:
            click.echo(f"adapter {adapter}: {len(file.for_text)} tensors for text encoders are left out", err=True)
        for line in base_notes(file, loaded):
            click.echo(line, err=True)
    texts = [prompt for prompt in prompts for _ in range(count)]
    noise = fixed_noise(loaded, range(count), seed).repeat(len(prompts), 1, 1, 1)
    images = generate(loaded, texts, noise, steps or evaluation.steps, guidance or evaluation.guidance)
    with atomic_path(output) as temporary:
        image_grid(images, columns=count).save(temporary)
    click.echo(str(output))


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@reports_user_errors
def inspect(adapter: Path) -> None:
    """Print an adapter's card. ADAPTER is its file, or the folder that diffusers or peft saved."""
    from dgpo_plugin.adapters import AdapterCard, read_adapter
    from dgpo_plugin.common.tables import as_table

    click.echo(as_table(AdapterCard.of(read_adapter(adapter)).rows()))
