"""Which layer of a model each LoRA of a file is for, whoever named them: our names, diffusers', or a converter's.

A file that names its layers as the model does, in any spelling (``transformer.a.b``, ``lora_unet_a_b``, ``a.b``), is
matched by name. What is named after another layout (kohya's SDXL blocks, Black Forest Labs' fused projections) goes
through the ``lora_state_dict`` of the family's pipeline, which is diffusers' own reader. Nothing is dropped unnoticed
on the way: every tensor carries its number through the converter once more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dgpo_plugin.adapters.kinds import ALPHA, LORA, Layer, by_kind, counted, is_for_text, lora_layers
from dgpo_plugin.adapters.scale import alpha_scales
from dgpo_plugin.common.errors import UserError, in_one_line
from dgpo_plugin.models.low_rank import attach

if TYPE_CHECKING:
    from dgpo_plugin.models.base import Model

PREFIXES = (
    "{prefix}.",
    "",
    "base_model.model.",
    "{prefix}.base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
)
"""What stands before a layer's own name, dots kept: diffusers, bare, peft, peft in diffusers, ComfyUI."""
FLAT_PREFIXES = ("lora_{prefix}_", "lora_unet_", "lora_transformer_", "lycoris_")
"""The same where dots are underscores: ours and kohya's, kohya's for transformers, OneTrainer's, LyCORIS'."""


@dataclass(frozen=True, eq=False)
class Update:
    """A LoRA found for a layer of a model.

    Attributes:
        layer: a linear layer, or a convolution.
        down, up: (r, inputs) and (outputs, r), of a convolution with its kernel behind; float32, the scale in ``up``.
    """

    layer: nn.Module
    down: Tensor
    up: Tensor

    def attach(self, strength: float) -> RemovableHandle:
        """Have the layer add strength up(down(x)) to what it gives, until what is returned takes it away."""
        if isinstance(self.layer, nn.Conv2d):
            return _attach_convolution(self.layer, self.down, self.up, strength)
        return attach(cast(nn.Linear, self.layer), self.down, self.up, strength)


@contextlib.contextmanager
def attached(updates: Sequence[Update], strength: float) -> Iterator[None]:
    """Have a model run with an adapter at a strength for the block; at 0 it is the base, to the bit."""
    handles = [update.attach(strength) for update in updates] if strength else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Pairs = dict[str, tuple[Tensor, Tensor]]
"""(down, up) of each LoRA by a name for its layer."""


def updates_for(model: Model, tensors: Mapping[str, Tensor]) -> list[Update]:
    """Every LoRA of a file with the model's layer that it is for; those of text encoders are left out.

    Args:
        tensors: by key; ``.alpha`` among them counts.

    Raises:
        UserError: a tensor that is no LoRA, or matches no weight, or is of another shape.
    """
    mine = {key: tensor for key, tensor in tensors.items() if not is_for_text(key)}
    if not mine:
        raise UserError(f"all of its {len(tensors)} tensors are for a text encoder, which gets no adapter here")
    _refuse_other_kinds(mine)
    layers = lora_layers(mine)
    scales = alpha_scales(mine, layers)
    pairs = {
        name: (mine[layer.down].float(), mine[layer.up].float() * scales.get(name, 1.0))
        for name, layer in layers.items()
    }
    places = _places(model)
    if not any(name not in places for name in pairs):
        found = _by_place(pairs, places)
    else:
        # By diffusers' converter all at once: it tells a format by any of its keys.
        found = _by_place(_converted(model, layers, pairs, scales), places)
    modules, updates, wrong = dict(model.denoiser.named_modules()), [], []
    for name, (down, up) in found.items():
        shaped = _shaped(modules.get(name), down, up)
        if shaped is None:
            wrong.append(name)
        else:
            updates.append(Update(modules[name], *shaped))
    if wrong:
        stored = {places.get(name, name): layer for name, layer in layers.items()}
        first = stored[wrong[0]].down if wrong[0] in stored else wrong[0]
        raise UserError(
            f"{2 * len(wrong)} of {2 * len(found)} tensors match no weight of {model.path} "
            f"(first: {first}); it was made for another model or format"
        )
    return updates


def _refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no LoRA, by name."""
    if any(key.endswith("_norm.scale") for key in tensors):
        raise UserError("is a FLUX control LoRA (Canny, Depth), which needs a control picture; use FluxControlPipeline")
    layers = lora_layers(tensors)
    used = {key for layer in layers.values() for key in (layer.down, layer.up)} | {f"{name}.alpha" for name in layers}
    rest = [key for key in tensors if key not in used]
    others = [key for kind, keys in by_kind(rest).items() if kind not in (LORA, ALPHA) for key in keys]
    if others:
        raise UserError(
            f"{len(others)} of its {len(tensors)} tensors are no LoRA: {counted(others)}; these kinds are not applied "
            f"here, ComfyUI applies some; give it a plain LoRA"
        )
    if rest:
        raise UserError(f"{rest[0]} has no other half, or its layer has another LoRA; fetch or export the file again")


def _places(model: Model) -> dict[str, str]:
    """The model's layers by every spelling of their names; a spelling that two layers share is nobody's."""
    places: dict[str, str] = {}
    shared: set[str] = set()
    for name, module in model.denoiser.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        flat = name.replace(".", "_")
        # As diffusers named them until 2023: attention's processor held them, and `to_out` was no list.
        old = name.replace(".to_", ".processor.to_").removesuffix(".0") if ".to_" in name else name
        spelled = {before.format(prefix=model.prefix) + way for before in PREFIXES for way in (name, old)}
        spelled |= {before.format(prefix=model.prefix) + flat for before in FLAT_PREFIXES}
        spelled.add(
            model.adapter_key(f"{name}.lora_A").removesuffix(".lora_A.weight").removesuffix(".lora_down.weight")
        )
        for spelling in spelled:
            if places.setdefault(spelling, name) != name:
                shared.add(spelling)
    return {spelling: name for spelling, name in places.items() if spelling not in shared}


def _by_place(pairs: Pairs, places: Mapping[str, str]) -> Pairs:
    """Pairs by the model's own layer names, as far as it has them.

    Raises:
        UserError: two for one layer.
    """
    found: Pairs = {}
    for name, pair in pairs.items():
        place = places.get(name, name)
        if place in found:
            raise UserError(f"has two LoRAs for {place} (the second: {name}); export it again with one")
        found[place] = pair
    return found


def _converted(model: Model, layers: Mapping[str, Layer], pairs: Pairs, scales: Mapping[str, float]) -> Pairs:
    """The pairs under diffusers' names, by its own reader of the family's files.

    Raises:
        UserError: it cannot read them, or leaves some out.
    """
    # The scale is in `up` by now; alpha is kept as the rank, because readers know formats by it.
    alphas = {f"{name}.alpha": torch.tensor(float(layers[name].rank)) for name in scales}
    state, numbered = dict(alphas), dict(alphas)
    for number, (name, pair) in enumerate(pairs.items(), start=1):
        for key, tensor in zip((layers[name].down, layers[name].up), pair, strict=True):
            state[key] = tensor
            numbered[key] = torch.full(tensor.shape, float(number))
    try:
        read, numbers = model.diffusers_names(state), model.diffusers_names(numbered)
    except Exception as error:  # whatever its many converters raise on keys they did not expect
        raise UserError(
            f"its layers are named in a way that diffusers cannot read for this model ({in_one_line(error)}; first: "
            f"{next(iter(pairs))}); it was made for another model or format"
        ) from error
    arrived = {int(number) for layer in lora_layers(numbers).values() for number in numbers[layer.down].unique()}
    lost = [name for number, name in enumerate(pairs, start=1) if number not in arrived]
    if lost:
        raise UserError(
            f"{2 * len(lost)} of {2 * len(pairs)} tensors match no weight of {model.path} "
            f"(first: {lost[0]}); it was made for another model or format"
        )
    return {name: (read[layer.down], read[layer.up]) for name, layer in lora_layers(read).items()}


def _shaped(module: nn.Module | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two matrices in the shapes that a layer takes; None if it cannot take them."""
    if len(down) != up.shape[1] or not all(size == 1 for size in up.shape[2:]):
        return None
    if isinstance(module, nn.Linear):
        # Not by its weights: quantized ones are packed.
        fits = (module.out_features, module.in_features) == (up.shape[0], down.shape[1:].numel())
        return (down.flatten(1), up.flatten(1)) if fits else None
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        kernel = (len(down), module.in_channels, *module.kernel_size)
        fits = module.out_channels == up.shape[0] and down.numel() == math.prod(kernel)
        return (down.reshape(kernel), up.reshape(*up.shape[:2], 1, 1)) if fits else None
    return None


def _attach_convolution(layer: nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> RemovableHandle:
    """As :func:`~dgpo_plugin.models.low_rank.attach` for a convolution: down with its stride and padding, up pointwise.

    As peft (peft/tuners/lora/layer.py, ``Conv2d``) and kohya (networks/lora.py) do it.
    """
    down, up = down.to(layer.weight.device), up.to(layer.weight.device)

    def add(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = given[0].to(out.dtype)
        inner = nn.functional.conv2d(x, down.to(x), stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        return out + scale * nn.functional.conv2d(inner, up.to(x))

    return layer.register_forward_hook(add)
