"""MASK and IMAGE inputs, in every form in which nodes give them."""

from __future__ import annotations

from torch import Tensor

_BRIGHTEST = 4.0  # sharpening and upscaling leave 0 to 1 a little; an image with more than this counts to 255


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


def colour_images(images: Tensor, name: str, smallest: int) -> Tensor:
    """Return an IMAGE as (n, height, width, 3), as a VAE takes it: nodes also give grey ones, and an alpha channel.

    Args:
        smallest: side of what a VAE makes one latent pixel of.

    Raises:
        ValueError: another shape, too small, or values that are no colours from 0 to 1.
    """
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"{name} is an image of shape {tuple(images.shape)}: use (images, height, width, channels).")
    height, width, channels = images.shape[1:]
    if min(height, width) < smallest:
        raise ValueError(
            f"{name} is {width} x {height} pixels, which is less than one latent pixel ({smallest} x {smallest}). Use a larger "
            "image: 256 pixels or more."
        )
    if not images.is_floating_point():
        raise ValueError(f"{name} holds whole numbers ({images.dtype}), not colours from 0 to 1. Divide the image by 255.")
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name} holds values that are no numbers (NaN). Check the nodes that made the image.")
    if float(images.max()) > _BRIGHTEST:
        raise ValueError(f"{name} holds values up to {float(images.max()):g}, not colours from 0 to 1. Divide the image by 255.")
    return images[..., :3] if channels > 2 else images[..., :1].repeat(1, 1, 1, 3)
