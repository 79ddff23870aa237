"""A model call cut into windows, some of which run over the edge of the image and come in on the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from comfy.conds import CONDNoiseShape
from comfy.patcher_extension import WrappersMP
from torch import Tensor

_KEY = "fovea.circular_windows"
Area = tuple[int, int, int, int]  # height, width, top, left in latent pixels


def part(x: Tensor, area: Area) -> Tensor:
    """Return an area of (..., height, width): a view, or a copy where the area goes over an edge."""
    height, width, top, left = area
    if top + height > x.shape[-2] or left + width > x.shape[-1]:
        x, top, left = x.roll((-top, -left), (-2, -1)), 0, 0
    return x[..., top : top + height, left : left + width]


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
def calls_in_circular_windows(options: dict[str, Any], areas: Sequence[Area], in_window: Callable[[int], None]) -> Iterator[None]:
    """Let every model call of a sampler work in each area of its latent and average them (MultiDiffusion), in the block.

    Args:
        options: model options that the sampler hands to its model.
        areas: what goes over the bottom or right edge comes in at the other one.
        in_window: called with the place of each area before it is worked on.
    """
    # Prompts of each area are prompts of their own to whatever keeps something of them.
    names: dict[tuple[Any, int], Any] = {}

    def own(cond: Mapping[str, Any], place: int) -> dict[str, Any]:
        moved = {
            name: value._copy_with(part(value.cond, areas[place])) if isinstance(value, CONDNoiseShape) else value
            for name, value in cond["model_conds"].items()
        }
        found = {**cond, "model_conds": moved, "uuid": names.setdefault((cond.get("uuid"), place), uuid4())}
        if isinstance(cond.get("mask"), Tensor):
            found["mask"] = part(cond["mask"], areas[place])
        return found

    def wrapper(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
        totals = [torch.zeros_like(x) for _ in conds]
        count = torch.zeros_like(x[:1, :1])
        for place, area in enumerate(areas):
            in_window(place)
            here = [None if kind is None else [own(cond, place) for cond in kind] for kind in conds]
            for total, found in zip(totals, executor(model, here, part(x, area), timestep, model_options), strict=True):
                add_part(total, found, area)
            add_part(count, torch.ones_like(count[..., :1, :1]), area)
        return [total / count for total in totals]

    wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {}).setdefault(WrappersMP.CALC_COND_BATCH, {})
    wrappers[_KEY] = [wrapper]
    try:
        yield
    finally:
        del wrappers[_KEY]
