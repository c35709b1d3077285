"""A reward that the stop button reaches while it scores."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.rewards import WrappedReward

from .loaded_reward import LoadedReward
from .stop_button import StopButton

POLL = 0.1
"""Seconds between two looks at the button."""


class StoppableReward(WrappedReward):
    """A reward that can be walked away from: it scores in a thread of its own while the button is watched."""

    def __init__(self, reward: LoadedReward, stop: StopButton) -> None:
        super().__init__(reward)
        self._stop = stop

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (N,) of pictures (N, 3, H, W) in [0, 1].

        Raises:
            StopNow: the button was pressed; the scoring is left to end by itself.
        """
        answer: list[Tensor | BaseException] = []

        def work() -> None:
            try:
                with torch.no_grad():
                    answer.append(self.inner(images, prompts))
            except BaseException as error:
                answer.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            self._stop.check()
        if isinstance(answer[0], BaseException):
            raise answer[0]
        return answer[0]
