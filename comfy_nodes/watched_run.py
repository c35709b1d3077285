"""The library's own training run, watched and stopped from ComfyUI."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from rich.console import Console
from server import PromptServer

from dgpo_plugin.common.errors import StopNow, Stopped
from dgpo_plugin.common.user_file import loaded_hash
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.rewards import RewardSet, WeightedReward
from dgpo_plugin.training.run import resume, train
from dgpo_plugin.training.run_folder import RunFolder
from dgpo_plugin.training.trainer import Trainer

from .loaded_reward import LoadedReward
from .run_files import publish
from .run_settings import settle_settings
from .stop_button import StopButton
from .stoppable_reward import StoppableReward

log = logging.getLogger(__name__)


def run_watched(config: RunConfig, folder: Path, reward: LoadedReward, node: str) -> Path:
    """Start the run in a folder or go on with it, with progress, previews and the stop button.

    Args:
        node: the node's id, where the progress is shown.

    Returns:
        The adapter's path.

    Raises:
        UserError: settings that a run which goes on may not have, or whatever the run raises.
        InterruptProcessingException: the button was pressed; all that was done is saved.
    """
    console = Console(stderr=True, force_terminal=False)
    stop = StopButton()
    bar = comfy.utils.ProgressBar(config.training.iterations, node_id=node)

    def watch(trainer: Trainer, record: dict[str, float] | None) -> None:
        if record is None:
            for module in trainer.model.denoiser.modules():
                module.register_forward_pre_hook(stop.check)
        try:
            bar.update_absolute(trainer.iteration, preview=_preview(folder, trainer.iteration))
        except comfy.model_management.InterruptProcessingException:  # the bar looks at the button too
            stop.press()
        stop.check()

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    # Or a run in fp16 could not follow one that was not, in the same server; accelerate has no public way.
    AcceleratorState._reset_state()  # noqa: SLF001
    going_on = RunFolder(folder).config.exists()
    if going_on:
        settle_settings(config, folder)
    stoppable = WeightedReward(StoppableReward(reward, stop), scoring=config.scoring)
    rewards = RewardSet({reward.name: stoppable}, loaded_hash([reward.name]))
    try:
        # Nodes run in inference mode, where nothing can be differentiated.
        with torch.inference_mode(False), torch.enable_grad(), _same_device():
            if going_on:
                return resume(folder, console, rewards=rewards, watch=watch)
            return train(config, folder, console, rewards=rewards, watch=watch)
    except (Stopped, StopNow) as error:
        _say_stopped(folder, str(error), node)
        raise comfy.model_management.InterruptProcessingException from error
    finally:
        comfy.model_management.soft_empty_cache()


def _say_stopped(folder: Path, reason: str, node: str) -> None:
    """Publish what there is, and tell on the node and in the log how to go on."""
    saved = publish(folder)
    stopped = reason.partition("; go on")[0] or "stopped before the first iteration, nothing to save"
    message = f"{stopped}; set resume to go on"
    log.info("Train DGPO adapter: %s (%s)", message, saved or "no adapter yet")
    PromptServer.instance.send_progress_text(message, node)


@contextlib.contextmanager
def _same_device() -> Iterator[None]:
    """Keep the run's accelerate, which takes a GPU where there is one, on the CPU if ComfyUI was told to use that."""
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


def _preview(folder: Path, iteration: int) -> tuple[str, Image.Image, int] | None:
    """The run's own grid of samples, where it has just drawn one."""
    file = folder / "samples" / f"{iteration:06d}.png"
    if not file.exists():
        return None
    with Image.open(file) as opened:
        small = opened.convert("RGB")
    scale = max(1, 512 // small.width)
    return "JPEG", small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST), 1024
