"""MASK inputs, in every form in which nodes give them."""

from __future__ import annotations

from torch import Tensor


def mask_images(mask: Tensor, name: str) -> Tensor:
    """Return a MASK as (n, height, width): nodes also give (height, width), (n, 1, height, width) and (n, height, width, 1).

    Raises:
        ValueError: another shape, no pixels, or values that are no numbers.
    """
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    elif mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 4 and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim != 3 or not mask.numel():
        raise ValueError(f"{name} has the shape {shape}: use a mask of (height, width) or (images, height, width).")
    if not bool(mask.isfinite().all()):
        raise ValueError(f"{name} holds values that are no numbers (NaN). Make the mask again.")
    return mask
