"""MASK inputs brought to labels: their shapes, and greys that were blurred or compressed on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host

_GREY_LEVELS = 255  # of an 8 bit mask

# More labels than this are the soft edges of an image.
MAX_LABELS = 32

# A grey is a level of its own where it fills this share of a mask, or 3 x 3 pixels anywhere.
_LEAST_SHARE = 0.05
_LEAST_BLOCK = 3
_LEAST_REGION = 0.001  # of a mask with soft edges
# Compression moves flat greys this far, and rings this far around them.
_SAME_GREY = 4
_NEAR_GREY = 8
_FEW = 1 / 4


def labels_of(mask: Tensor) -> Tensor:
    """Return grey values of a MASK (n, height, width) as whole numbers."""
    return (mask.detach().cpu().float() * _GREY_LEVELS).round().long()


@dataclass(frozen=True)
class Marks:
    """What the masks of a run mark.

    Attributes:
        reference, target: labels (1 or n, height, width): what has the same one belongs together.
        part: (1 or n, height, width), bool: what of the references is followed, where there is no target mask; else None.
        notes: how greys were changed, for the log and the report.
    """

    reference: Tensor
    target: Tensor
    part: Tensor | None = None
    notes: list[str] = field(default_factory=list)


def marks_of(
    reference_mask: Tensor | None, target_mask: Tensor | None, references: int, used: Sequence[int], images: int
) -> Marks | None:
    """Return what the masks of references and images mark; None where neither is connected.

    Args:
        used: places of the references, of so many, that count.

    Raises:
        ValueError: ``target_mask`` alone, masks of another number than images, or masks that mark nothing.
    """
    if reference_mask is None and target_mask is None:
        return None
    if reference_mask is None:
        raise ValueError(
            "reference_mask is not connected: labels say what of the image follows what of the reference, so connect both. "
            "(reference_mask alone limits what of the reference is followed.)"
        )
    of_reference = _fitting(reference_mask, "reference_mask", references, "reference")
    of_reference = of_reference if len(of_reference) == 1 else of_reference[list(used)]
    if target_mask is None:
        part = of_reference.detach().cpu().float() >= 0.5
        if not bool(part.any()):
            raise ValueError(
                "reference_mask is black everywhere, so nothing of the reference is left. White is what the image follows: "
                "invert the mask."
            )
        return Marks(part.long(), torch.ones(1, 1, 1, dtype=torch.long), part)
    matched = matching_labels(of_reference, _fitting(target_mask, "target_mask", images, "latent_image"))
    return Marks(matched.reference, matched.target, None, matched.notes)


def _fitting(mask: Tensor, name: str, images: int, whose: str) -> Tensor:
    mask = host.mask_images(mask, name)
    if len(mask) not in (1, images):
        raise ValueError(f"{name} holds {len(mask)} masks, but {whose} holds {images} images: use one mask, or as many.")
    return mask


@dataclass
class Labels:
    """Two masks whose equal greys belong together.

    Attributes:
        reference, target: (n, height, width), whole numbers.
        notes: how their greys were changed, for the log and the report.
    """

    reference: Tensor
    target: Tensor
    notes: list[str] = field(default_factory=list)


def matching_labels(reference_mask: Tensor, target_mask: Tensor) -> Labels:
    """Return the labels of two masks (n, height, width), with stray greys at the nearest grey that has an area.

    Masks that are drawn in flat greys stay as they are, but for greys of the target that a compression has moved by a few
    values from a grey of the reference.

    Raises:
        ValueError: a mask with more greys than ``MAX_LABELS``, or masks that have no grey in common.
    """
    reference, target = _Greys.of(reference_mask, "reference_mask"), _Greys.of(target_mask, "target_mask")
    notes: list[str] = []
    found = Labels(reference.at_levels(target, notes), target.at_levels(reference, notes), notes)
    there, here = (set(labels.unique().tolist()) for labels in (found.reference, found.target))
    for grey in sorted(here - there):
        nearest = min(there, key=lambda level: abs(level - grey))
        if abs(nearest - grey) <= _SAME_GREY and nearest not in here:
            found.target = torch.where(found.target == grey, nearest, found.target)
            notes.append(f"grey {grey} of target_mask was taken for {nearest} of reference_mask")
    if not set(found.target.unique().tolist()) & there:
        raise ValueError(
            f"reference_mask has the grey values {sorted(there)[:8]} and target_mask {sorted(here)[:8]}: none is in both. Equal "
            "greys belong together, so paint each region of the image in the grey of the reference's region it follows."
        )
    return found


@dataclass
class _Greys:
    """The greys of one mask.

    Attributes:
        sizes: pixels of each grey.
        large, solid: greys with a large share of the mask, and with a block of pixels somewhere.
        flat: every grey has an area, as in a drawing in flat greys.
    """

    name: str
    labels: Tensor
    sizes: Mapping[int, int]
    large: set[int]
    solid: set[int]
    flat: bool

    @classmethod
    def of(cls, mask: Tensor, name: str) -> _Greys:
        labels = labels_of(mask)
        greys, counts = labels.unique(return_counts=True)
        sizes = dict(zip(greys.tolist(), counts.tolist(), strict=True))
        large = {grey for grey, count in sizes.items() if count >= _LEAST_SHARE * labels[0].numel()}
        solid = _solid_greys(labels)
        found = cls(name, labels, sizes, large, solid, large | solid == set(sizes))
        if found.flat and len(sizes) > MAX_LABELS:
            raise found.too_many()
        return found

    def too_many(self) -> ValueError:
        return ValueError(
            f"{self.name} has {len(self.sizes)} different grey values, each of which would be a region of its own (at most "
            f"{MAX_LABELS}). Draw it with hard edges and a few flat greys, and scale it with nearest-exact."
        )

    def at_levels(self, other: _Greys, notes: list[str]) -> Tensor:
        """Return the labels with every stray grey at the nearest level."""
        strays = set(self.sizes) - self.large - self.solid
        if self.flat or (len(self.sizes) <= MAX_LABELS and strays <= set(other.sizes)):  # thin lines in the other's greys
            return self.labels
        own = self._levels(sorted(other.sizes) if other.flat else [])
        away = sum(count for grey, count in self.sizes.items() if all(abs(grey - level) > _NEAR_GREY for level in own))
        if not own or len(own) > MAX_LABELS or away * 2 > self.labels.numel():
            raise self.too_many()
        levels = torch.tensor(own)
        result = levels[torch.bucketize(self.labels, (levels[1:] + levels[:-1] + 1) // 2, right=True)]
        share = float((result != self.labels).float().mean())
        notes.append(
            f"{share:.1%} of {self.name} lay between its greys {own} (soft edges or compression) and went to the nearest"
        )
        return result

    def _levels(self, others: list[int]) -> list[int]:
        """Return the greys of a mask with soft edges that are regions, as the other mask has them where it is flat."""
        kept: list[int] = []
        for grey in sorted(self.large | self.solid, key=lambda grey: -self.sizes[grey]):
            if not self._stands_out(grey) and grey not in self.large:
                continue
            if not any(self._rings_around(grey, larger) for larger in kept):
                kept.append(grey)
        blurred = [grey for grey in others if all(abs(grey - level) > _NEAR_GREY for level in kept) and self._stands_out(grey)]
        as_there = {level: min(others, key=lambda grey: abs(grey - level)) for level in kept if others}
        return sorted(
            {*blurred, *(grey if abs(grey - level) <= _SAME_GREY else level for level, grey in as_there.items())} or kept
        )

    def _stands_out(self, grey: int) -> bool:
        """Return whether there are more pixels about a grey than farther away, as in a region and not along an edge."""
        near = range(grey - _NEAR_GREY, grey + _NEAR_GREY + 1)
        flanks = [g for g in range(grey - 3 * _NEAR_GREY, grey + 3 * _NEAR_GREY + 1) if g not in near and 0 <= g <= 255]
        pixels, beside = (sum(self.sizes.get(g, 0) for g in greys) for greys in (near, flanks))
        return pixels >= _LEAST_REGION * self.labels[0].numel() and pixels * len(flanks) > 2 * beside * len(near)

    def _rings_around(self, grey: int, larger: int) -> bool:
        small = grey not in self.large or self.sizes[grey] <= _FEW * self.sizes[larger]
        return abs(grey - larger) <= _NEAR_GREY and small


def _solid_greys(labels: Tensor) -> set[int]:
    """Return the greys that fill a block of pixels somewhere."""
    if min(labels.shape[-2:]) < _LEAST_BLOCK:
        return set()
    values = labels.float()
    largest, smallest = F.max_pool2d(values, _LEAST_BLOCK, 1), -F.max_pool2d(-values, _LEAST_BLOCK, 1)
    return set(largest[largest == smallest].long().unique().tolist())
