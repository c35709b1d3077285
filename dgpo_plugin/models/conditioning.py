"""What the text encoders said, kept beside the denoiser so that they run once over a prompt set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Named tensors, each with a leading prompt (or image) axis.

    Indexing takes rows of all of them: ``conditioning[torch.tensor([0, 0, 1])]`` repeats prompt 0.
    """

    tensors: dict[str, Tensor]

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @staticmethod
    def concatenate(parts: list[Conditioning]) -> Conditioning:
        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})
