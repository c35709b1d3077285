"""The policy: a base model with a LoRA adapter, run with it, without it, or with an older copy of it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import peft
import torch
from torch import Tensor, nn

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.seeding import derive_seed
from dgpo_plugin.config.fields import LoraConfig
from dgpo_plugin.models.attention import attention_to_differentiate
from dgpo_plugin.models.base import Model, Sigma, empty_rows, guided_passes, guided_velocity
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.low_rank import updated

ADAPTER = "policy"


class AdapterLinear(peft.tuners.lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer with its update done in the base's precision and added as it is multiplied.

    The numbers are those of autocast: float32 weights, rounded to the base's type where they are used. peft's own
    forward goes through float32 and over the output five times, a quarter of a small model's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # for the adapter's own product; the base sees to its own
        out: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return out
        return updated(out, x, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER])


@dataclass(eq=False)
class Evaluations:
    """Denoiser evaluations, the unit of cost: images through the denoiser; a forward counts 1, a backward 2.

    Attributes:
        total: all of them.
        differentiated: those of passes with a backward.
        kept: of the differentiated ones, forwards of a rollout whose graphs were kept.
    """

    total: int = 0
    differentiated: int = 0
    kept: int = 0

    def add(self, passes: int, *, differentiated: bool) -> None:
        """Count a pass."""
        self.total += passes
        if differentiated:
            self.differentiated += passes


class Policy:
    """A model whose denoiser carries a trainable adapter.

    Args:
        unconditional: the empty prompt's conditioning, if it is at hand.

    Attributes:
        model: the base; its own weights stay frozen.
        unconditional: the empty prompt's conditioning, one row.
        parameters: the adapter's, float32, by ``<module>.lora_A`` / ``<module>.lora_B``.
    """

    def __init__(self, model: Model, config: LoraConfig, seed: int, unconditional: Conditioning | None = None) -> None:
        self.model = model
        self.config = config
        found = adapted_layers(model, config.target_modules)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "lora"))
            start = "gaussian" if config.init == "gaussian" else True  # peft's word for its default, Kaiming's
            lora = peft.LoraConfig(
                r=config.rank, lora_alpha=config.alpha, target_modules=found, init_lora_weights=start
            )
            # peft has no public way for a single kind of layer. Packed ones are of this kind too: with peft's own they
            # would be trained with other roundings than :mod:`~dgpo_plugin.models.low_rank` applies the adapter with.
            lora._register_custom_module({nn.Linear: AdapterLinear})  # noqa: SLF001
            peft.inject_adapter_in_model(lora, model.denoiser, adapter_name=ADAPTER)
        trainable = {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}
        for parameter in trainable.values():
            parameter.data = parameter.data.float()
        self.parameters: dict[str, nn.Parameter] = {
            name.replace(f".{ADAPTER}.weight", ""): parameter for name, parameter in trainable.items()
        }
        self._layers = [m for m in model.denoiser.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        self.unconditional = (unconditional or model.encode([""])).on(model.device)
        weight = model.denoiser.get_submodule(found[0]).weight  # the base's; packed ones have another type
        assert isinstance(weight, Tensor)
        self._dtype = weight.dtype
        self._updating = False
        self._counts: list[Evaluations] = []

    @property
    def device(self) -> torch.device:
        return self.model.device

    def velocity(
        self, latents: Tensor, sigma: Sigma, conditioning: Conditioning, guidance: float = 1.0, *, keep: bool = False
    ) -> Tensor:
        """The (guided) velocity under whichever weights are in place, (N, ...) float32.

        Args:
            sigma: of all of them, or N rows of the model's ``levels``.
            keep: with a graph for later, or never: its backward is counted by :meth:`count_kept`.
        """
        passes = _passes(latents, guidance)
        differentiated = torch.is_grad_enabled() and not keep
        for count in self._counts:
            count.add(3 * passes if differentiated else passes, differentiated=differentiated)
        graphs = keep or self._updating
        kernel = attention_to_differentiate(latents, self._dtype) if graphs else contextlib.nullcontext()
        with torch.set_grad_enabled(keep or torch.is_grad_enabled()), kernel:
            return guided_velocity(self.model, latents, sigma, conditioning, self.unconditional, guidance)

    def half_guided(
        self,
        latents: Tensor,
        sigma: Sigma,
        conditioning: Conditioning,
        guidance: float,
        half: Literal["conditional", "unconditional"],
    ) -> Tensor:
        """The guided velocity, (N, ...) float32, with a gradient through its pass with or without the prompt alone."""
        graph = torch.is_grad_enabled()
        with torch.set_grad_enabled(graph and half == "unconditional"):
            without = self.velocity(latents, sigma, empty_rows(self.unconditional, latents))
        with torch.set_grad_enabled(graph and half == "conditional"):
            with_prompt = self.velocity(latents, sigma, conditioning)
        return self.model.guided(without, with_prompt, guidance)

    def count_kept(self, velocity: Tensor, guidance: float) -> None:
        """Count that a velocity's graph, which was kept, is differentiated."""
        passes = _passes(velocity, guidance)
        for count in self._counts:
            count.total += 2 * passes  # its forward is counted
            count.differentiated += 3 * passes
            count.kept += passes

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Run as the frozen base, without gradient."""
        # peft's own switch also flips requires_grad, which a graph that is still to be differentiated must keep.
        for layer in self._layers:
            layer._disable_adapters = True  # noqa: SLF001
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False  # noqa: SLF001

    @contextlib.contextmanager
    def with_weights(self, copy: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with another copy of the adapter, by the names of ``parameters``, without gradient."""
        live = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = copy[name]
        try:
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = live[name]

    def copy_weights(self) -> dict[str, Tensor]:
        """The adapter as it is now, by the names of ``parameters``."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """An update's passes: those of the frozen base too are computed as those that are differentiated.

        By another kernel they would differ by rounding even where the adapter changes nothing, and an optimizer that
        divides by the gradient's size makes whole steps of that.
        """
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    @contextlib.contextmanager
    def counting(self) -> Iterator[Evaluations]:
        """Count the denoiser evaluations of the block; blocks may lie in each other."""
        count = Evaluations()
        self._counts.append(count)
        try:
            yield count
        finally:
            self._counts.remove(count)


def _passes(images: Tensor, guidance: float) -> int:
    """Images through the denoiser for a guided velocity of as many as there are rows."""
    return len(images) * guided_passes(guidance)


def adapted_layers(model: Model, targets: Sequence[str] | None) -> list[str]:
    """The names of a denoiser's linear layers that get an adapter, in its order.

    Args:
        targets: ends of such names, each of which must be one; None for the family's, not all of which a variant has.

    Raises:
        UserError: there are none, or one matches no linear layer; with the near names of layers that there are.
    """
    linear = [name for name, module in model.denoiser.named_modules() if isinstance(module, nn.Linear)]
    if targets is not None:
        if not targets:
            raise UserError("lora.target_modules is empty, so nothing would be trained; leave it out, or name layers")
        if missing := [target for target in targets if not any(_ends_with(name, target) for name in linear)]:
            told = "; ".join(_no_such_layer(target, linear, model) for target in missing)
            raise UserError(f"lora.target_modules: {told}")
    wanted = model.lora_targets if targets is None else targets
    found = [name for name in linear if any(_ends_with(name, target) for target in wanted)]
    if not found:
        raise UserError(f"lora.target_modules: no linear layer of the denoiser ends with any of {list(wanted)}")
    return found


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_such_layer(target: str, linear: Sequence[str], model: Model) -> str:
    """What is wrong with a target, and what may have been meant."""
    others = [type(module).__name__ for name, module in model.denoiser.named_modules() if _ends_with(name, target)]
    if target and others:
        return f"{target!r} is {others[0]}, and adapters are for linear layers; leave it out"
    # The ends of layers' names, of as many parts as the target has, the numbers of blocks aside.
    parts = target.count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in linear)
    near = difflib.get_close_matches(target, list(ends), n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(list(ends)[:12])}"
    return f"no linear layer of the denoiser ends with {target!r}; {meant}"
