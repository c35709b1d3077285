"""The text encoders' output, kept beside the denoiser so that they run once over a prompt set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import ModelConfig

NOT_FINITE_TEXTS = {
    "fp16": "set it to bf16 or fp32",
    "bf16": "set it to fp32, or fetch their folders again",
    "fp32": "their weights are damaged; fetch their folders again",
}
"""What to do where text encoders give no numbers, by the precision that they computed in."""


class Conditioning:
    """Named tensors, each with a leading prompt axis, seen through an index.

    Indexing copies nothing: ``conditioning[torch.tensor([0, 0, 1])]`` is prompt 0 twice and prompt 1, one row an image,
    and a group's hundred images still cost one prompt's memory. Only :attr:`tensors` writes the rows out, for a
    micro-batch.

    The index is a tensor beside the table, so that picking rows with one on the same device waits for nothing.

    Args:
        table: (prompts, ...) each.
        rows: N indices into the table, (N,), int64; None for all of it in order.
    """

    def __init__(self, table: dict[str, Tensor], rows: Tensor | None = None) -> None:
        self.table = table
        self._rows = rows

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The rows written out, (N, ...) each, by name."""
        rows = self._rows
        return self.table if rows is None else {name: tensor[rows] for name, tensor in self.table.items()}

    @property
    def index(self) -> Tensor:
        """Which row of the table each of the N is, (N,), int64."""
        first = next(iter(self.table.values()))
        return torch.arange(len(first), device=first.device) if self._rows is None else self._rows

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Conditioning:
        index = self.index
        if isinstance(rows, slice):
            return Conditioning(self.table, index[rows])
        return Conditioning(self.table, index[torch.as_tensor(rows, dtype=torch.int64, device=index.device)])

    def __len__(self) -> int:
        return len(next(iter(self.table.values()))) if self._rows is None else len(self._rows)

    def on(self, device: torch.device) -> Conditioning:
        """These rows on a device, each that is used once; the table's others stay behind."""
        if self._rows is None:
            return Conditioning({name: tensor.to(device) for name, tensor in self.table.items()})
        used, index = torch.unique(self._rows, return_inverse=True)
        return Conditioning({name: tensor[used].to(device) for name, tensor in self.table.items()}, index.to(device))

    def replaced(self, where: Tensor, row: Conditioning) -> Conditioning:
        """The same with another text's row in some places.

        Args:
            where: the places, (N,), boolean.
            row: one row.
        """
        last = len(next(iter(self.table.values())))
        table = {name: torch.cat([tensor, row.tensors[name]]) for name, tensor in self.table.items()}
        return Conditioning(table, self.index.masked_fill(where, last))

    @staticmethod
    def concatenate(conditionings: Sequence[Conditioning]) -> Conditioning:
        """The rows of several, one after the other; those of one table stay in it."""
        first = conditionings[0]
        if all(each.table is first.table for each in conditionings):
            return Conditioning(first.table, torch.cat([each.index for each in conditionings]))
        written = [each.tensors for each in conditionings]
        return Conditioning({name: torch.cat([tensors[name] for tensors in written]) for name in first.table})


def finite(encoded: Conditioning, config: ModelConfig) -> Conditioning:
    """What text encoders gave, if it is numbers.

    Raises:
        UserError: it is not; which precision to change.
    """
    if not all(tensor.isfinite().all() for tensor in encoded.table.values()):
        raise UserError(
            f"model.precision {config.precision}: the text encoders' output is NaN or infinite; "
            f"{NOT_FINITE_TEXTS[config.precision]}"
        )
    return encoded


def as_chat(tokenizer: Any, text: str, *, thinking: bool) -> str:
    """A text as what a user says to a language model, and the beginning of its answer."""
    messages = [{"role": "user", "content": text}]
    chat: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return chat
