"""What rewards with weights have in common: where these come from and run, and how many pictures at once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import AutoConfig

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.first_bytes import what_instead_of_torch
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import ScoringConfig
from dgpo_plugin.distributed.device import best_device, numbered
from dgpo_plugin.distributed.processor import settled
from dgpo_plugin.models.base import DTYPES
from dgpo_plugin.rewards.base import Reward

T = TypeVar("T")


class NeuralReward(Reward):
    """A network that scores pictures; a subclass says how, in :meth:`score`.

    Attributes:
        network: all weights, frozen.
        device: where it runs; it is brought there by a call, so it may be set at any time.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, config: ScoringConfig | None = None) -> None:
        self.config = ScoringConfig() if config is None else config
        auto = self.config.device == "auto"
        self.device = best_device() if auto else numbered(torch.device(self.config.device))
        settled("scoring.precision", self.config.precision, self.device)
        self.network = network.requires_grad_(False).eval().to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return DTYPES[self.config.precision]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (N,), float32, of pictures (N, 3, H, W) in [0, 1] on the network's device, differentiable in these."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (N,) on the CPU, ``scoring.batch_size`` pictures at a time."""
        scored = self.in_batches(images, lambda batch, at: self.score(batch, prompts[at : at + len(batch)]))
        return scored.cpu()

    def in_batches(self, images: Tensor, look: Callable[[Tensor, int], Tensor]) -> Tensor:
        """What the network makes of pictures (N, 3, H, W), (N, ...), float32, on its device.

        Args:
            look: takes a batch that is there, and the number of its first picture.
        """
        settled("scoring.precision", self.config.precision, self.device)  # it may have been set to another
        self.network.to(self.device)
        size = self.config.batch_size
        seen = [look(batch.to(self.device), at * size) for at, batch in enumerate(images.split(size))]
        if self.config.offload:
            self.network.to("cpu")
        return torch.cat(seen).float()


def from_hub(what: str, load: Callable[[], T]) -> T:
    """Whatever ``load`` loads by hub id or local folder.

    Args:
        what: names it in the error, and the option that says another place.

    Raises:
        UserError: not there, or not what it should be.
    """
    try:
        return load()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what}: cannot be loaded ({_first_line(error)}); fetch it first and give its place in that option"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pretrained(kind: Any, weights: str, option: str = "weights") -> Any:
    """A transformers network of one kind, by hub id or folder, no weight of which may be missing.

    Args:
        option: the reward's that says ``weights``.

    Raises:
        UserError: not there, of another kind, or incomplete.
    """
    what, expected = f"{weights} (option {option})", kind.config_class.model_type
    given = from_hub(what, lambda: AutoConfig.from_pretrained(weights)).model_type
    if given != expected:
        raise UserError(f"{what}: is a {given}, not a {expected}; give a {kind.__name__}")
    return complete(kind, weights, what)


def complete(kind: Any, weights: str, what: str) -> Any:
    """A transformers network, no weight of which may be missing.

    Args:
        kind: its class, or transformers' own choice of one.
        what: names it in errors.

    Raises:
        UserError: it cannot be loaded, or is incomplete.
    """
    network, loaded = from_hub(what, lambda: kind.from_pretrained(weights, output_loading_info=True))
    # Buffers, such as a loss's class weights, are made from the configuration.
    missing = sorted(loaded["missing_keys"] & dict(network.named_parameters()).keys())
    if missing:
        raise UserError(f"{what}: lacks {len(missing)} of its weights (first: {missing[0]}); fetch it again")
    return network


def checkpoint_file(repository: str, name: str, given: str | None) -> Path:
    """A published checkpoint: the file that was given, or the hub's.

    Raises:
        UserError: no such file, or the hub cannot be reached.
    """
    if given is None:
        return Path(from_hub(f"{repository}/{name} (option weights)", lambda: hf_hub_download(repository, name)))
    if not Path(given).is_file():
        raise UserError(f"no file {given}; check the path")
    return Path(given)


def load_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that was published as a torch file, without running anything that it holds.

    Raises:
        UserError: not such a file, or one with other things than tensors in it.
    """
    try:
        if instead := what_instead_of_torch(path):
            raise UserError(f"{path} is no checkpoint: {instead}")
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # whose own message tells how to run what the file holds
        raise UserError(f"{path} cannot be read as a table of tensors; give the published checkpoint") from error
    except Exception as error:  # torch has no one class for a file that it cannot read
        raise UserError(f"{path} cannot be read ({_first_line(error)}); fetch it again") from error
    tensors = saved.get("state_dict", saved) if isinstance(saved, Mapping) else None
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no table of tensors; give the published checkpoint")
    return dict(tensors)


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a network, every one of which must have its place and every place its tensor.

    Raises:
        UserError: one is missing, left over, or of another shape.
    """
    places = network.state_dict()
    missing, extra = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    wrong = [name for name in places.keys() & tensors.keys() if places[name].shape != tensors[name].shape]
    for problem, names in (("lacks", missing), ("has no place for", extra), ("has another shape for", sorted(wrong))):
        if names:
            raise UserError(
                f"the checkpoint {problem} {len(names)} of {len(places)} tensors (first: {names[0]}); "
                f"give the published one"
            )
    network.load_state_dict(dict(tensors))


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow the prefix in the tensors' names."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})
