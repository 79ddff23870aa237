"""Grids of image tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import interpolate

from .table import NetworkLayout, network_layout

Grid = tuple[int, int, int]  # frames, height, width in tokens


def token_grid(network: torch.nn.Module, layout: NetworkLayout | None, latent: Sequence[int], tokens: int) -> Grid | None:
    """Return the grid of image tokens for a latent (batch, channels, [frames,] height, width).

    Of a network that is convolutional or not in the table: the reduction that gives ``tokens`` tokens, or None.
    """
    *frames, height, width = latent[2:]
    if len(frames) > 1 or not latent[2:]:
        return None
    if layout is None or layout.patch is None:
        grids = (_patched(frames, height, width, (1, patch, patch)) for patch in (1, 2, 4, 8, 16, 32))
        return next((grid for grid in grids if math.prod(grid) == tokens), None)
    patch = getattr(network, layout.patch) if layout.patch else 1
    if isinstance(patch, int):
        length = getattr(network, "patch_temporal", None) or getattr(network, "patch_size_t", None) or 1
        return _patched(frames, height, width, (length, patch, patch))
    return _patched(frames, height, width, (1, 1, *patch)[-3:])


def image_tokens(network: torch.nn.Module, latent: Sequence[int]) -> int | None:
    """Return how many tokens of a transformer are the image's, for a latent as in ``token_grid``; None where it is not known."""
    layout = network_layout(network)
    grid = token_grid(network, layout, latent, 0) if layout is not None and layout.patch is not None else None
    return None if grid is None else math.prod(grid)


def layer_grid(network: torch.nn.Module, layout: NetworkLayout | None, name: str, latent: Sequence[int]) -> Grid | None:
    """Return the grid of image tokens in one named layer, known before it runs; None for networks where it is not."""
    if layout is None:
        return None
    if layout.family == "U-Net":
        size = unet_sizes(network, latent[-2], latent[-1]).get(unet_block(name))
        return None if size is None else (1, *size)
    return token_grid(network, layout, latent, 0) if layout.patch is not None else None


def scaled_grid(grid: Grid, tokens: int) -> Grid | None:
    """Return the grid of that many tokens, of the shape of ``grid``, in a layer whose features another node scales (Deep Shrink);
    None where no grid of that many tokens is shaped alike."""
    frames, height, width = grid
    if tokens == math.prod(grid):
        return grid
    if tokens <= 0 or tokens % frames:
        return None
    area = tokens // frames
    off, rows = min((abs(math.log(rows * rows * width / (area * height))), rows) for rows in _divisors(area))
    return (frames, rows, area // rows) if off <= _SAME_SHAPE else None


# How far (in the logarithm of height to width) a scaled grid may be from the shape that it was, since sides are rounded.
_SAME_SHAPE = math.log(1.25)


def _divisors(number: int) -> list[int]:
    small = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return small + [number // value for value in small]


def unet_block(name: str) -> str:
    """Return the block of a U-Net that a named layer is in."""
    return "middle" if name.startswith("middle") else ".".join(name.split(".")[:2])


def unet_sizes(network: torch.nn.Module, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Return the height and width in each block of a U-Net; every level halves the one before, rounding up."""
    sizes: list[tuple[int, int]] = []
    for halves in _halvings(network):
        if halves:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        sizes.append((height, width))
    named = {f"input.{index}": size for index, size in enumerate(sizes)}
    return {**named, "middle": sizes[-1], **{f"output.{index}": size for index, size in enumerate(reversed(sizes))}}


_halving_blocks: WeakKeyDictionary[torch.nn.Module, list[bool]] = WeakKeyDictionary()


def _halvings(network: torch.nn.Module) -> list[bool]:
    """Return which input blocks of a U-Net halve the size; looked up once, as SDXL has two thousand modules."""
    found = _halving_blocks.get(network)
    if found is None:
        blocks = cast(Iterable[torch.nn.Module], network.input_blocks)
        found = [any(type(module).__name__ == "Downsample" for module in block.modules()) for block in blocks]
        _halving_blocks[network] = found
    return found


def _patched(frames: Sequence[int], height: int, width: int, patch: Sequence[int]) -> Grid:
    length = frames[0] if frames else 1
    return math.ceil(length / patch[0]), math.ceil(height / patch[1]), math.ceil(width / patch[2])


def resize_maps(maps: torch.Tensor, size: Sequence[int], mode: str = "bicubic", *, antialias: bool = False) -> torch.Tensor:
    """Return maps (..., height, width) at (..., *size), in their own dtype.

    Args:
        mode: "bicubic", whose undershoot below 0 is cut off as DAAM does; "area", the mean over cells; "bilinear"; "nearest",
            for labels.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    height, width = size
    flat = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
    if mode == "bicubic" and not antialias:
        flat = _bicubic(flat.reshape(-1, *maps.shape[-2:]), height, width).clamp_(min=0)
    else:
        flat = interpolate(flat.reshape(-1, 1, *maps.shape[-2:]), size=(height, width), mode=mode, antialias=antialias)
        flat = flat.clamp_(min=0) if mode == "bicubic" else flat
    flat = flat if flat.dtype == maps.dtype else flat.to(maps.dtype)
    return flat.view(*maps.shape[:-2], height, width)


def _bicubic(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return maps (n, h, w) at (n, height, width), as two products: torch's own function takes one number after another."""
    if maps.shape[-1] != width:
        maps = maps @ _bicubic_weights(maps.shape[-1], width, maps.dtype, maps.device).T
    if maps.shape[-2] != height:
        maps = _bicubic_weights(maps.shape[-2], height, maps.dtype, maps.device) @ maps
    return maps


@lru_cache(maxsize=64)
def _bicubic_weights(old: int, new: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what torch's bicubic interpolation makes of every number of a line: (new, old)."""
    with torch.inference_mode(False), torch.no_grad():
        return interpolate(torch.eye(old, dtype=dtype)[None, None], size=(new, old), mode="bicubic")[0, 0].to(device)
