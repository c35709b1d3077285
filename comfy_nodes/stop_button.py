"""ComfyUI's stop button, as a training run looks at it."""

from __future__ import annotations

import comfy.model_management

from dgpo_plugin.common.errors import StopNow


class StopButton:
    """ComfyUI's stop button, looked at without letting it go; remembers that it was pressed."""

    def __init__(self) -> None:
        self.pressed = False

    def press(self) -> None:
        """Remember it, and let go of the button: what stops the prompt is raised once everything is saved."""
        self.pressed = True
        comfy.model_management.interrupt_current_processing(False)

    def check(self, *_: object) -> None:
        """Stop the iteration under way if the button is pressed; also a hook before any module's forward.

        Raises:
            StopNow: it is, or was.
        """
        if comfy.model_management.processing_interrupted():
            self.press()
        if self.pressed:
            raise StopNow
