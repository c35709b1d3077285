"""Train DGPO adapter: the library's own run, watched and stopped from ComfyUI."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
import yaml
from accelerate.state import AcceleratorState
from comfy_api.latest import io, ui
from PIL import Image
from rich.console import Console
from server import PromptServer
from torch import Tensor

from dgpo_plugin.adapters.card import describe_adapter
from dgpo_plugin.adapters.load import read_adapter
from dgpo_plugin.common.errors import StopNow, Stopped, UserError
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.tables import as_table
from dgpo_plugin.common.user_file import loaded_hash
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.load import load_config, preset_names
from dgpo_plugin.prompts.files import prompts_hash, read_prompts
from dgpo_plugin.rewards import RewardSet, WeightedReward, WrappedReward
from dgpo_plugin.training.checkpoint import MAY_CHANGE
from dgpo_plugin.training.run import CONFIG_FILE, METRICS_FILE, resume, train
from dgpo_plugin.training.trainer import Trainer

from .rewards import LoadedReward
from .types import CATEGORY, Prompts, Reward, written_lines

log = logging.getLogger(__name__)
POLL = 0.1
"""Seconds between two looks at ComfyUI's stop button while a reward is at work."""


class TrainAdapter(io.ComfyNode):
    """A training run as a node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPOTrainAdapter",
            display_name="Train DGPO adapter",
            category=CATEGORY,
            description="Trains a LoRA on a diffusers model so that its pictures score better on a reward. The adapter "
            "goes to output/loras, the run to output/dgpo; stopping it saves both, and 'resume' goes on.",
            search_aliases=["train lora", "reinforcement learning", "rl", "dgpo"],
            is_output_node=True,
            inputs=[
                Prompts.Input("prompts", tooltip="What to train on, from Prompt list; tens at least, better hundreds."),
                Reward.Input("reward", tooltip="What is to be raised, from Load reward."),
                io.String.Input(
                    "model",
                    default="shapes",
                    tooltip="A diffusers model folder or a hub id, not a checkpoint file; 'shapes' is the shipped one.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(preset_names()),
                    default="shapes",
                    tooltip="Where all other settings come from: shapes for the shipped model, sd35-... for large.",
                ),
                io.String.Input(
                    "name",
                    default="dgpo-adapter",
                    tooltip="Of the file in output/loras (letters, digits, - _ .); a taken one gets a number.",
                ),
                io.Int.Input(
                    "iterations", default=50, min=1, max=100_000, tooltip="Rounds of sampling, scoring and learning."
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Of the adapter: its size and capacity."),
                io.Int.Input(
                    "prompts_per_iteration", default=4, min=1, max=1024, tooltip="Prompts drawn in an iteration."
                ),
                io.Int.Input(
                    "group_size", default=16, min=2, max=1024, tooltip="Pictures a prompt, compared with each other."
                ),
                io.Int.Input(
                    "micro_batch_size",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Pictures in memory at once, 0 for all. Lower it if memory runs out: same result.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    tooltip="Of everything that is drawn.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    tooltip="Go on with the run of this name from where it was stopped. Off starts a new one.",
                ),
                Prompts.Input(
                    "held_out",
                    optional=True,
                    tooltip="What before and after are measured on; the training prompts if it is left out.",
                ),
                io.String.Input(
                    "settings",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Any other setting, one a line, as in dgpo train --set: training.learning_rate=1e-3",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora", display_name="lora", tooltip="For ComfyUI's Load LoRA Model and Save LoRA."
                ),
                io.LossMap.Output("loss_map", display_name="loss_map", tooltip="For ComfyUI's Plot Loss Graph."),
                io.String.Output("file", display_name="file", tooltip="The adapter's name in the loras folders."),
                io.String.Output("report", display_name="report", tooltip="The adapter's card."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        prompts: list[Prompt],
        reward: LoadedReward,
        model: str,
        preset: str,
        name: str,
        iterations: int,
        rank: int,
        prompts_per_iteration: int,
        group_size: int,
        micro_batch_size: int,
        seed: int,
        resume: bool,
        held_out: list[Prompt] | None = None,
        settings: str = "",
    ) -> io.NodeOutput:
        output = run_folder(name, resume)
        usual = load_config(preset).lora
        explicit = {
            "model.path": model,
            "rewards": {reward.name: {"weight": 1}},
            "prompts.train": str(output / "prompts.jsonl"),
            "prompts.held_out": None if held_out is None else str(output / "held-out.jsonl"),
            "training.iterations": iterations,
            "training.prompts_per_iteration": prompts_per_iteration,
            "training.group_size": group_size,
            "training.micro_batch_size": micro_batch_size or None,
            "training.seed": seed,
            "lora.rank": rank,
            # A preset's alpha belongs to its rank.
            "lora.alpha": rank * usual.alpha / usual.rank,
        }
        config = load_config(
            preset, [*(f"{key}={json.dumps(value)}" for key, value in explicit.items()), *written_lines(settings)]
        )
        write_prompts(output / "prompts.jsonl", prompts)
        if held_out is not None:
            write_prompts(output / "held-out.jsonl", held_out)
        adapter = run_watched(config, output, reward, str(cls.hidden.unique_id))
        return finished(output, adapter)


def run_folder(name: str, going_on: bool) -> Path:
    """``output/dgpo/NAME``; for a new run with a number if that is taken.

    Raises:
        UserError: a name that is no file's.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"Train DGPO adapter: name {name!r} must be of letters, digits, - _ and .; change it")
    home = Path(folder_paths.get_output_directory()) / "dgpo"
    if going_on and (home / name / CONFIG_FILE).exists():
        return home / name
    number = 1
    while (folder := home / (name if number == 1 else f"{name}-{number}")).joinpath(CONFIG_FILE).exists():
        number += 1
    return folder


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """As a file of the run; a run that goes on must have the same ones.

    Raises:
        UserError: other prompts than are there.
    """
    if path.with_name(CONFIG_FILE).exists() and path.exists():
        if prompts_hash(read_prompts(path)) != prompts_hash(prompts):
            raise UserError(
                f"Train DGPO adapter: {path.parent.name} was trained on other prompts; put them back to resume"
            )
        return
    lines = [json.dumps({"prompt": p.text, **p.metadata}, ensure_ascii=False) for p in prompts]
    write_text_atomically(path, "\n".join(lines) + "\n")


def run_watched(config: RunConfig, output: Path, reward: LoadedReward, node: str) -> Path:
    """Start the run in a folder or go on with it, with progress, previews and the stop button; the adapter's path."""
    console = Console(stderr=True, force_terminal=False)
    stop = StopButton()
    watched = WeightedReward(Stoppable(reward, stop), scoring=config.scoring)
    rewards = RewardSet({reward.name: watched}, loaded_hash([reward.name]))
    bar = comfy.utils.ProgressBar(config.training.iterations, node_id=node)

    def watch(trainer: Trainer, record: dict[str, float] | None) -> None:
        if record is None:
            for module in trainer.model.denoiser.modules():
                module.register_forward_pre_hook(stop.check)
        try:
            bar.update_absolute(trainer.iteration, preview=_preview(output, trainer.iteration))
        except comfy.model_management.InterruptProcessingException:  # the bar looks at the button too
            stop.press()
        stop.check()

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    AcceleratorState._reset_state()  # or a run in fp16 could not follow one that was not, in the same server
    going_on = (output / CONFIG_FILE).exists()
    if going_on:
        settle_settings(config, output)
    try:
        # Nodes run in inference mode, where nothing can be differentiated.
        with torch.inference_mode(False), torch.enable_grad(), _same_device():
            if going_on:
                return resume(output, console, rewards=rewards, watch=watch)
            return train(config, output, console, rewards=rewards, watch=watch)
    except (Stopped, StopNow) as error:
        saved = publish(output)
        said = str(error).partition("; go on")[0] or "stopped before the first iteration, nothing to save"
        done = f"{said}; set resume to go on"
        log.info("Train DGPO adapter: %s (%s)", done, saved or "no adapter yet")
        PromptServer.instance.send_progress_text(done, node)
        raise comfy.model_management.InterruptProcessingException from error
    finally:
        comfy.model_management.soft_empty_cache()


class StopButton:
    """ComfyUI's stop button, looked at without letting it go; remembers that it was pressed."""

    def __init__(self) -> None:
        self.pressed = False

    def press(self) -> None:
        """Remember it, and let go of the button: what stops the prompt is raised once everything is saved."""
        self.pressed = True
        comfy.model_management.interrupt_current_processing(False)

    def check(self, *_: object) -> None:
        """Raises StopNow once the button is pressed; also a hook before any module's forward."""
        if comfy.model_management.processing_interrupted():
            self.press()
        if self.pressed:
            raise StopNow


class Stoppable(WrappedReward):
    """A reward that can be walked away from: it scores in a thread of its own while the button is watched."""

    def __init__(self, reward: LoadedReward, stop: StopButton) -> None:
        super().__init__(reward)
        self._stop = stop

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        answer: list[Tensor | BaseException] = []

        def work() -> None:
            try:
                with torch.no_grad():
                    answer.append(self.inner(images, prompts))
            except BaseException as error:
                answer.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            self._stop.check()
        if isinstance(answer[0], BaseException):
            raise answer[0]
        return answer[0]


@contextlib.contextmanager
def _same_device() -> Iterator[None]:
    """The run's accelerate takes a GPU where there is one; not if ComfyUI was told to use the CPU."""
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    before = os.environ.get("ACCELERATE_USE_CPU")
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    try:
        yield
    finally:
        if on_cpu:
            os.environ.pop("ACCELERATE_USE_CPU")
            if before is not None:
                os.environ["ACCELERATE_USE_CPU"] = before


def settle_settings(config: RunConfig, output: Path) -> None:
    """Give the run in the folder the node's settings, as far as a run that goes on may have others.

    Raises:
        UserError: names the first that it may not.
    """
    file = output / CONFIG_FILE
    now, before = config.model_dump(mode="json"), load_config(str(file)).model_dump(mode="json")
    if now["model"]["precision"] == "auto":  # what that stands for was settled when the run was started
        now["model"]["precision"] = before["model"]["precision"]
    for section in now:
        for key in now[section]:
            name, value, then = f"{section}.{key}", now[section][key], before[section].get(key)
            # A falling learning rate depends on where the run ends.
            fixed = name == "training.iterations" and config.training.decay != "none"
            if value != then and (fixed or not name.startswith(MAY_CHANGE)):
                longer = f" (or move its end with: dgpo resume {output} --iterations {value})" if fixed else ""
                raise UserError(
                    f"Train DGPO adapter: {name} is {value!r}, but {output.name} was started with {then!r}; "
                    f"put it back, or choose another name{longer}"
                )
    now["training"]["replanned"] = before["training"]["replanned"]  # no setting of the node's
    write_text_atomically(file, yaml.safe_dump(now, sort_keys=False))


def _preview(output: Path, iteration: int) -> tuple[str, Image.Image, int] | None:
    """The run's own grid of samples, where it has just drawn one."""
    file = output / "samples" / f"{iteration:06d}.png"
    if not file.exists():
        return None
    with Image.open(file) as opened:
        small = opened.convert("RGB")
    scale = max(1, 512 // small.width)
    return "JPEG", small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST), 1024


def publish(output: Path) -> str | None:
    """Copy the run's adapter to ``output/loras``, where loaders list it; its name there, None if there is none."""
    adapter = output / "adapter.safetensors"
    if not adapter.exists():
        return None
    name = f"{output.name}.safetensors"
    target = Path(folder_paths.get_output_directory()) / "loras" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter, target)
    return name


def finished(output: Path, adapter: Path) -> io.NodeOutput:
    """What the node gives on."""
    tensors, _ = read_adapter(adapter)
    lines = (output / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    card = as_table(describe_adapter(adapter))
    return io.NodeOutput(tensors, {"loss": losses}, publish(output), card, ui=ui.PreviewText(card))
