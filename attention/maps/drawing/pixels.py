"""Images as tensors: (height, width, 3), RGB 0..1, to and from Pillow and at another size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ...networks.grids import resize_maps


def to_pillow(pixels: torch.Tensor) -> Image.Image:
    data = (pixels.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return Image.fromarray(data.numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def resize_heat(heat: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return heat (..., rows, columns) at another size, smooth and never below 0."""
    shrinks = size[0] < heat.shape[-2] or size[1] < heat.shape[-1]
    return resize_maps(heat.float(), size, antialias=shrinks).clamp(min=0)


def resize_image(pixels: torch.Tensor, size: tuple[int, int], *, blocky: bool = False) -> torch.Tensor:
    """Return an image at (height, width); ``blocky`` keeps the edges of its pixels."""
    if tuple(pixels.shape[:2]) == size:
        return pixels
    method = Image.Resampling.NEAREST if blocky else Image.Resampling.LANCZOS
    return to_tensor(to_pillow(pixels).resize((size[1], size[0]), method))


def fitted(pixels: torch.Tensor, side: int) -> tuple[int, int]:
    """Return (height, width) of the image with ``side`` as its longer side."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    return max(round(height * side / longest), 1), max(round(width * side / longest), 1)
