"""The box around what a mask marks, for nodes that crop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import host

_Span = tuple[int, int]  # the first pixel, and the one after the last


@dataclass(frozen=True)
class BoxSettings:
    """How a box is laid around a mask.

    Attributes:
        margin: added on each side, as a share of the longer side of what is marked.
        threshold: pixels of at least this value are marked.
        multiple_of: width and height are multiples of this number of pixels.
        square: width and height are the same, where the image has room for it.
    """

    margin: float = 0.25
    threshold: float = 0.5
    multiple_of: int = 8
    square: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin is {self.margin:g}. Use 0 or more: a share of the longer side of what the mask marks.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold:g}. Use a value above 0, up to 1.")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}. Use 1 or more pixels.")


@dataclass(frozen=True)
class Box:
    """A box inside an image, in pixels.

    Attributes:
        notes: what it is not that the settings ask for.
    """

    x: int
    y: int
    width: int
    height: int
    notes: tuple[str, ...] = ()


def box_around(mask: Tensor, settings: BoxSettings) -> Box:
    """Return the box around what a mask marks; of several masks, around everything that they mark together.

    It lies inside the image and holds the marked pixels. Only where the image is no multiple of ``multiple_of`` and the marks
    leave no other room, it misses less than that number of pixels at their edges. A margin stops at the edge of the image.

    Args:
        mask: a MASK in any form, 0..1; its size is that of the image.

    Raises:
        ValueError: nothing is marked, the image is smaller than ``multiple_of``, or the mask holds no numbers.
    """
    masks = host.mask_images(mask, "mask").float()
    marked = (masks >= settings.threshold).any(0)
    if not bool(marked.any()):
        raise ValueError(
            f"mask marks nothing, so there is no box: its highest value is {float(masks.max()):.3g}, and threshold is "
            f"{settings.threshold:g}. Lower threshold, or give a mask of something that is in the image."
        )
    image = (marked.shape[1], marked.shape[0])
    multiple = settings.multiple_of
    if multiple > min(image):
        raise ValueError(
            f"multiple_of is {multiple}, and the image has {image[0]} x {image[1]} pixels. Use {min(image)} or less."
        )
    marks = _span(marked.any(0)), _span(marked.any(1))
    grow = round(min(settings.margin * max(map(_length, marks)), max(image)))
    spans = [(max(start - grow, 0), min(end + grow, side)) for (start, end), side in zip(marks, image, strict=True)]
    room = [side // multiple * multiple for side in image]
    wanted = [-(-_length(span) // multiple) * multiple for span in spans]
    if settings.square:
        square = max(wanted)
        if max(map(_length, marks)) <= min(room):
            square = min(square, *room)
        wanted = [square, square]
    width, height = (min(size, most) for size, most in zip(wanted, room, strict=True))
    x = _start(spans[0], marks[0], width, image[0])
    y = _start(spans[1], marks[1], height, image[1])
    notes = []
    if settings.square and width != height:
        notes.append("not square: the image has no room for it")
    missed = max(_length(marks[0]) - width, _length(marks[1]) - height)
    if missed > 0:
        notes.append(f"{missed} marked pixels at the edge are left out: the image is no multiple of {multiple}")
    return Box(x, y, width, height, tuple(notes))


def _length(span: _Span) -> int:
    return span[1] - span[0]


def _span(marked: Tensor) -> _Span:
    """Return where the marks of one axis begin and end."""
    places = marked.nonzero()
    return int(places[0]), int(places[-1]) + 1


def _start(span: _Span, marks: _Span, size: int, side: int) -> int:
    """Return where a box begins: around the middle of the marks with their margin, or of the marks if that does not fit."""
    middle = span if size >= _length(span) else marks
    return min(max((sum(middle) - size) // 2, 0), side - size)
