"""Progress bars, live previews and interrupts."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from tqdm.auto import tqdm


def preview_callback(model: ModelPatcher, steps: int) -> Callable[..., None]:
    """Return the sampler's progress bar with its live preview: ``callback(step, denoised, x, steps)``."""
    import latent_preview

    return latent_preview.prepare_callback(model, steps)


def shows_console_progress() -> bool:
    """Return whether samplers draw a bar in the console."""
    return bool(comfy.utils.PROGRESS_BAR_ENABLED)


def check_interrupted() -> None:
    """Ends the run where the user cancelled it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class Progress:
    """The progress bar of the running node, moved step by step or to a place in between; moving it ends a cancelled run.

    Args:
        total: where the bar ends.
        preview: ``preview_callback``'s, which draws bar and live preview where a model samples.
        console: name of a second bar in the console; empty: none.
    """

    def __init__(self, total: int, *, preview: Callable[..., None] | None = None, console: str = "") -> None:
        self.total = total
        self.done = 0
        self.denoised: torch.Tensor | None = None  # the last one shown
        self._preview = preview
        self._bar = comfy.utils.ProgressBar(total)
        self._console = tqdm(total=total, disable=not console, desc=console)

    def show(self, place: float) -> None:
        """Move the bar to a place between 0 and ``total``."""
        check_interrupted()
        self._bar.update_absolute(place)

    def show_within(self, share: float) -> None:
        """Move the bar to a share, 0 to 1, of the step that has begun."""
        self.show(min(self.done + share, self.total))

    def tick(self, x: torch.Tensor, denoised: torch.Tensor | None) -> None:
        """Count one step of a sampler, whose latent is ``x`` and whose prediction of the finished one is ``denoised``."""
        self.denoised = denoised
        if denoised is not None and self._preview is not None:
            self._preview(self.done, denoised, x, self.total)
        self.done += 1
        self._console.update()

    def close(self) -> None:
        """End the bar in the console."""
        self._console.close()
