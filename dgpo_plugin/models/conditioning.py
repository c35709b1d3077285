"""What the text encoders said, kept beside the denoiser so that they run once over a prompt set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        """(N, ...) each."""
        rows = self._rows
        return self.table if rows is None else {name: tensor[rows] for name, tensor in self.table.items()}

    @property
    def _index(self) -> Tensor:
        first = next(iter(self.table.values()))
        return torch.arange(len(first), device=first.device) if self._rows is None else self._rows

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Conditioning:
        index = self._index
        if isinstance(rows, slice):
            return Conditioning(self.table, index[rows])
        return Conditioning(self.table, index[torch.as_tensor(rows, dtype=torch.int64, device=index.device)])

    def __len__(self) -> int:
        return len(next(iter(self.table.values()))) if self._rows is None else len(self._rows)

    def on(self, device: torch.device) -> Conditioning:
        """The rows alone, each once, on a device."""
        if self._rows is None:
            return Conditioning({name: tensor.to(device) for name, tensor in self.table.items()})
        used, place = torch.unique(self._rows, return_inverse=True)
        return Conditioning({name: tensor[used].to(device) for name, tensor in self.table.items()}, place.to(device))

    def replaced(self, where: Tensor, row: Conditioning) -> Conditioning:
        """Another text's one row in the place of those that ``where``, (N,), boolean, is true for."""
        last = len(next(iter(self.table.values())))
        table = {name: torch.cat([tensor, row.tensors[name]]) for name, tensor in self.table.items()}
        return Conditioning(table, self._index.masked_fill(where, last))

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """One after the other; parts of one table stay in it."""
        first = parts[0]
        if all(part.table is first.table for part in parts):
            return Conditioning(first.table, torch.cat([part._index for part in parts]))
        written = [part.tensors for part in parts]
        return Conditioning({name: torch.cat([tensors[name] for tensors in written]) for name in first.table})
