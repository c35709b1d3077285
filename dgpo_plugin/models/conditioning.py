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

    Args:
        table: (prompts, ...) each.
        rows: N indices into the table; None for all of it in order.
    """

    def __init__(self, table: dict[str, Tensor], rows: Sequence[int] | None = None) -> None:
        self.table = table
        self._rows = range(len(next(iter(table.values())))) if rows is None else rows

    @property
    def tensors(self) -> dict[str, Tensor]:
        """(N, ...) each."""
        rows = list(self._rows)
        return {name: tensor[torch.tensor(rows, device=tensor.device)] for name, tensor in self.table.items()}

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Conditioning:
        if isinstance(rows, slice):
            return Conditioning(self.table, self._rows[rows])
        return Conditioning(self.table, [self._rows[n] for n in (rows.tolist() if isinstance(rows, Tensor) else rows)])

    def __len__(self) -> int:
        return len(self._rows)

    def on(self, device: torch.device) -> Conditioning:
        """The rows alone, each once, on a device."""
        used = sorted(set(self._rows))
        place = {row: n for n, row in enumerate(used)}
        table = {
            name: tensor[torch.tensor(used, device=tensor.device)].to(device) for name, tensor in self.table.items()
        }
        return Conditioning(table, [place[row] for row in self._rows])

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """One after the other; parts of one table stay in it."""
        first = parts[0]
        if all(part.table is first.table for part in parts):
            return Conditioning(first.table, [row for part in parts for row in part._rows])
        written = [part.tensors for part in parts]
        return Conditioning({name: torch.cat([tensors[name] for tensors in written]) for name in first.table})
