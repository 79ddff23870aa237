"""A model call cut into windows, some of which may run over the edge of the image and come in on the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .window_prompts import Area, PromptsInWindows, part

_KEY = "fovea.window_calls"


def add_part(total: Tensor, values: Tensor, area: Area) -> None:
    """Add ``values``, as large as an area or (..., 1, 1), to that area of ``total`` (..., height, width), in place."""
    height, width, top, left = area
    if top + height <= total.shape[-2] and left + width <= total.shape[-1]:
        part(total, area).add_(values)
        return
    rows, columns = (
        (torch.arange(size, device=total.device) + start) % side
        for size, start, side in zip((height, width), (top, left), total.shape[-2:], strict=True)
    )
    total[..., rows[:, None], columns] += values


@contextmanager
def calls_in_windows(options: dict[str, Any], areas: Sequence[Area], in_window: Callable[[int], None]) -> Iterator[None]:
    """Let every model call of a sampler work in each area of its latent and average them (MultiDiffusion), in the block.

    Prompts for an area or a mask act where a window shows it, and a ControlNet sees the window's part of its image.

    Args:
        options: model options that the sampler hands to its model.
        areas: what goes over the bottom or right edge comes in at the other one.
        in_window: called with the place of each area before it is worked on.
    """
    prompts = PromptsInWindows(areas)

    def wrapper(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
        totals = [torch.zeros_like(x) for _ in conds]
        count = torch.zeros_like(x[:1, :1])
        for place, area in enumerate(areas):
            in_window(place)
            with prompts.at(place, conds, x) as here:
                outputs = executor(model, here, part(x, area), timestep, model_options)
            for total, found in zip(totals, outputs, strict=True):
                add_part(total, found, area)
            add_part(count, torch.ones_like(count[..., :1, :1]), area)
        return [total / count for total in totals]

    wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {}).setdefault(WrappersMP.CALC_COND_BATCH, {})
    wrappers[_KEY] = [wrapper]
    try:
        yield
    finally:
        del wrappers[_KEY]
