"""A part of a pipeline's folder as a module: empty as its configuration says, or with weights, all of which arrived.

diffusers and transformers fill what a file lacks with random numbers (or leave it on the meta device, to fail later)
and say so in their logs alone. Here it is an error that names the part and its weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from dgpo_plugin.common.errors import UserError, in_one_line
from dgpo_plugin.models.part_files import named, read_json, stored

_STATISTICS = ("running_mean", "running_var")
"""Buffers that were learned all the same: FLUX.2's VAE normalises latents by them."""


@dataclass(frozen=True)
class Part:
    """A loaded module.

    Attributes:
        unread: tensors in its files that it has no place for.
        computed: buffers of its that the files lack, made from its configuration.
    """

    module: nn.Module
    unread: list[str]
    computed: list[str]

    def note(self) -> str:
        """What to say of its files; empty if nothing."""
        unread = f"{named(self.unread)} not read, for want of a place" if self.unread else ""
        computed = f"{named(self.computed)} made from config.json" if self.computed else ""
        return ", ".join(filter(None, (unread, computed)))


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Make a user error of whatever a library raises while it loads; memory that runs out stays what it is."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(f"needs what is not installed here ({in_one_line(error)})") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise UserError(f"cannot be loaded ({in_one_line(error)}); fetch it again") from error


def empty_module(module_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A diffusers or transformers module as its configuration says, with whatever is in its weights.

    Raises:
        UserError: the folder's ``config.json`` cannot be read.
    """
    values = read_json(folder / "config.json")
    if issubclass(module_class, diffusers.ModelMixin):
        module: nn.Module = module_class.from_config(values)
    else:
        module = module_class(module_class.config_class.from_dict(values))
    return module if all(p.dtype == dtype for p in module.parameters()) else module.to(dtype)


def load_part(module_class: Any, folder: Path, dtype: torch.dtype, **options: Any) -> Part:
    """A module with all of its weights, of safetensors files.

    Args:
        options: for its class's ``from_pretrained``, which may quantize.

    Raises:
        UserError: a file that is not whole or not what its name says, or weights that the files lack, have in another
            shape, or have quantized without a word of how. What else the library raises is passed on.
    """
    held = stored(folder, module_class)
    ours = issubclass(module_class, diffusers.ModelMixin)
    # transformers then tells which shapes differ; diffusers stops at the first.
    settings = {"torch_dtype": dtype} if ours else {"dtype": dtype, "ignore_mismatched_sizes": True}
    with _silent_reports():
        try:
            module, told = module_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **settings, **options
            )
        except (ValueError, NotImplementedError) as error:
            if ours:
                _explain(error, module_class, folder, held)
            raise
    _refuse_other_shapes(
        {key: tuple(wanted) for key, _, wanted in told["mismatched_keys"]},
        {key: {"shape": tuple(found)} for key, found, _ in told["mismatched_keys"]},
    )
    unread = sorted(told["unexpected_keys"])
    _refuse_absent(_absent(module, told["missing_keys"]), len(module.state_dict()), unread, folder)
    computed = [
        name for name, tensor in module.named_buffers() if name in told["missing_keys"] and tensor.is_floating_point()
    ]
    return Part(module, unread, computed)


def _absent(module: nn.Module, told: Any) -> list[str]:
    """The weights that did not arrive, of those that a library calls missing; tied ones it has told apart.

    diffusers leaves what it lacks on the meta device, and believes an index that names what no shard holds. A buffer is
    computed from the configuration, unless it was learned.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    filled = isinstance(module, transformers.PreTrainedModel)
    absent = {name for name, parameter in parameters.items() if parameter.is_meta or (filled and name in told)}
    absent |= {name for name in told if name in buffers and name.rpartition(".")[2] in _STATISTICS}
    return sorted(absent)


def _refuse_absent(absent: list[str], count: int, unread: list[str], folder: Path) -> None:
    if absent:
        instead = f"; it has {named(unread)} instead, which is another network's" if unread else ""
        raise UserError(
            f"{len(absent)} of the {count} weights that {folder} is to have are not there: {named(absent)}{instead}; "
            f"they would be random: fetch that folder again, whole"
        )


def _explain(error: Exception, module_class: Any, folder: Path, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what diffusers stopped at, if it was a shape or a weight that is missing: its own words name one, or none.

    Raises:
        UserError: it was.
    """
    if read_json(folder / "config.json").get("quantization_config"):
        return  # stored in shapes and under names of its own
    with torch.device("meta"):
        module = empty_module(module_class, folder, torch.float32)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _refuse_other_shapes(expected, held)
    if "meta tensor" in str(error):
        absent = sorted(name for name, _ in module.named_parameters() if name not in held)
        _refuse_absent(absent, len(expected), sorted(held.keys() - expected.keys()), folder)


def _refuse_other_shapes(expected: Mapping[str, tuple[int, ...]], held: Mapping[str, Mapping[str, Any]]) -> None:
    differ = sorted(name for name, shape in expected.items() if name in held and tuple(held[name]["shape"]) != shape)
    if differ:
        first = differ[0]
        raise UserError(
            f"{len(differ)} weights have other shapes than config.json says (first: {first} is "
            f"{tuple(held[first]['shape'])}, not {expected[first]}): they are of two models; fetch both again"
        )


@contextlib.contextmanager
def _silent_reports() -> Iterator[None]:
    """Keep both libraries' reports of what is missing and unexpected out of the output: ours is told instead."""
    loggers = [logging.getLogger(name) for name in ("diffusers.models.modeling_utils", "transformers.modeling_utils")]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:  # noqa: ARG001 (a filter is called so)
    return False
