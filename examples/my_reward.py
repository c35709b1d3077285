"""Rewards of your own: a function, and a class with options. Higher is better.

    dgpo score pictures/ --reward examples/my_reward.py:warmth --prompt "a sunset"
    dgpo serve-reward examples/my_reward.py:Exposure --set options.target=0.6

In training name them as you name the others, `examples/my_reward.py:warmth`; paths are from where you stand. The file's
hash is kept in the run: one that was changed since is refused when the run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dgpo_plugin import Prompt


def warmth(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """How much redder than blue each picture is, in [-1, 1].

    Args:
        images: (N, 3, H, W), float32 in [0, 1].
        prompts: N of them; a prompt has a ``text`` and ``metadata``, what else its line in a ``.jsonl`` file says.

    Returns:
        (N,), one finite number for each picture.
    """
    red, _, blue = images.mean((2, 3)).unbind(1)
    return red - blue


class Exposure:
    """How near each picture's brightness is to a target: 1 where it meets it, lower elsewhere.

    A class is made once, with its options as arguments; load networks here.

    Args:
        target: mean of all channels, in [0, 1].
    """

    def __init__(self, target: float = 0.5) -> None:
        self.target = target

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N,) for pictures (N, 3, H, W)."""
        return 1 - (images.mean((1, 2, 3)) - self.target).abs()
