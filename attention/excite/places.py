"""Where in the image each subject should be, and the loss of subjects that are elsewhere.

Source: BoxDiff (Xie et al., ICCV 2023, arXiv:2307.10816), its inner-box and outer-box constraints, here with masks of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .. import host
from ..networks.grids import resize_maps
from .subjects import GuidedPrompt

# Shares of a place, and of what is around it, that count: a subject need not fill its place.
_INSIDE, _OUTSIDE = 0.3, 0.2


class Layout(Enum):
    """Name where subjects should be."""

    FREE = "free"
    OWN_PLACES = "own places"


@dataclass(frozen=True)
class PlaceSettings:
    """Say where the subjects should be.

    Attributes:
        masks: (subjects, height, width), white where each subject should be, in their order; they come before ``layout``.
        strength: weight of the loss of subjects that are elsewhere.

    Raises:
        ValueError: masks of another shape, one that is black, or a strength that is no weight.
    """

    layout: Layout = Layout.FREE
    masks: Tensor | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"layout_strength is {self.strength}: a weight is 0 or more (1 is the default).")
        if self.masks is None:
            return
        masks = host.mask_images(self.masks, "subject_masks").detach().float().cpu()
        for number, mask in enumerate(masks, start=1):
            if not bool((mask >= 0.5).any()):
                raise ValueError(
                    f"subject_masks: mask {number} is black everywhere, so its subject has no place. White is where the subject "
                    "should be."
                )
        object.__setattr__(self, "masks", masks)

    @property
    def active(self) -> bool:
        return self.strength > 0 and (self.masks is not None or self.layout is not Layout.FREE)


def check_places(settings: PlaceSettings, prompts: Sequence[GuidedPrompt | None], areas: bool = False) -> None:
    """Raise ``ValueError`` where subjects cannot be placed: several prompts, areas, or masks of another number.

    Args:
        areas: whether a prompt has an area of its own.
    """
    guided = [prompt for prompt in prompts if prompt is not None]
    if not settings.active or not guided:
        return
    name = "layout" if settings.masks is None else "subject_masks"
    if len(guided) > 1 or areas:
        raise ValueError(
            f"{name} places the subjects of one prompt in the whole image, but 'positive' has areas or several prompts with "
            "subjects, which place them already. Set layout to 'free' and disconnect subject_masks."
        )
    subjects = guided[0].subjects
    if settings.masks is not None and len(settings.masks) != len(subjects):
        listed = ", ".join(subject.name for subject in subjects)
        raise ValueError(
            f"subject_masks holds {len(settings.masks)} masks for {len(subjects)} subjects ({listed}): connect one mask for "
            "each, in this order, joined to a batch."
        )


class Places:
    """Where the subjects of one run should be.

    With masks, the same for every image. Without, the image is divided into equal parts, and each image's subjects get those
    where they are strongest together when they are first seen.
    """

    def __init__(self, settings: PlaceSettings, images: int, tokens: Sequence[int]) -> None:
        self._settings = settings
        self._tokens = tokens  # how many each subject has
        self._parts: list[Tensor | None] = [None] * images  # (subjects, height, width) of each image

    def loss(self, subjects: Tensor, rows: Tensor) -> Tensor:
        """Return how far the subjects of some images are from their places, (images,), weighted.

        Args:
            subjects: their maps, (images, subjects, height, width), see ``subject_maps``.
            rows: numbers of the images.
        """
        parts = [self._part(int(row), maps) for row, maps in zip(rows, subjects.detach(), strict=True)]
        return self._settings.strength * misplaced(subjects, torch.stack(parts), self._tokens)

    def _part(self, row: int, maps: Tensor) -> Tensor:
        part = self._parts[row]
        if part is None or part.shape != maps.shape:
            masks = self._settings.masks
            part = _assigned(maps) if masks is None else _on_grid(masks, (maps.shape[-2], maps.shape[-1]))
            part = self._parts[row] = part.to(maps)
        return part


def misplaced(subjects: Tensor, places: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return, summed over subjects, what the strongest points inside their places lack and what those outside have, (images,).

    Args:
        subjects, places: (images, subjects, height, width); places are 0 or 1.
        tokens: how many each subject has; its loss is divided by them, see ``losses.neglect``.
    """
    inside = _strongest(subjects, places, _INSIDE)
    outside = _strongest(subjects, 1 - places, _OUTSIDE)
    return (((1 - inside).clamp(min=0) + outside) / torch.tensor(tokens, device=subjects.device)).sum(1)


def _strongest(subjects: Tensor, places: Tensor, share: float) -> Tensor:
    """Return the mean of the strongest points of an area, of a share of its size, (images, subjects); 0 for no area."""
    area = places.flatten(2).sum(-1, keepdim=True)
    count = torch.where(area > 0, (area * share).floor().clamp(min=1), torch.zeros_like(area))
    points = (subjects * places).flatten(2).sort(-1, descending=True).values
    taken = torch.arange(points.shape[-1], device=points.device) < count
    return (points * taken).sum(-1) / count.squeeze(-1).clamp(min=1)


def _on_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return masks as 0 and 1 on a grid; of a mask smaller than a cell, its strongest cells."""
    coarse = resize_maps(masks, grid, "area")
    return (coarse >= coarse.amax((-1, -2), keepdim=True).clamp(max=0.5)).float()


def equal_parts(count: int, grid: tuple[int, int]) -> Tensor:
    """Return parts of an image for so many subjects, (count, height, width): rows of near-square parts of one size, each row in
    the middle. A single subject gets everything."""
    height, width = grid
    rows = min(max(round(math.sqrt(count * height / width)), 1), count)
    columns = math.ceil(count / rows)
    rows = math.ceil(count / columns)
    parts = torch.zeros(count, height, width)
    for number in range(count):
        row, column = divmod(number, columns)
        spare = columns - min(columns, count - row * columns)
        top, bottom = round(row * height / rows), round((row + 1) * height / rows)
        left, right = (round((column + spare / 2 + edge) * width / columns) for edge in (0, 1))
        parts[number, top : max(bottom, top + 1), left : max(right, left + 1)] = 1
    return parts


def _assigned(maps: Tensor) -> Tensor:
    """Return the part of each subject, (subjects, height, width), so that together they are strongest there."""
    from scipy.optimize import linear_sum_assignment

    parts = equal_parts(len(maps), (maps.shape[-2], maps.shape[-1]))
    strength = maps.float().cpu().flatten(1) @ parts.flatten(1).T
    _, order = linear_sum_assignment(strength.numpy(), maximize=True)
    return parts[torch.from_numpy(order)]
