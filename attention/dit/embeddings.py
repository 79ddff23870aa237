"""What enters a DiT: patches and their positions, the timestep, and the class."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

FREQUENCIES = 256  # channels of the sinusoidal timestep embedding


def _sines(positions: int, channels: int, device: torch.device) -> Tensor:
    """Return (positions, channels): sines, then cosines, of the position at channels/2 frequencies from 1 down to 1/10000."""
    # In double precision on the CPU, where it equals the table in the published files bit for bit.
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return torch.cat([angles.sin(), angles.cos()], -1).float().to(device)


def position_table(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Return (height * width, channels): the positions of a grid of tokens, the column in the first half, the row in the second.

    There is nothing learned in it, so it is computed for the grid at hand and need not be square.
    """
    device = device or torch.device("cpu")
    columns = _sines(width, channels // 2, device).expand(height, -1, -1)
    rows = _sines(height, channels // 2, device)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


def timestep_features(t: Tensor, shift: int = 0) -> Tensor:
    """Return (B, 256) float32: cosines, then sines, of ``t`` (B,) in the unit of training (0..999, or 0..1 for SiT).

    ``shift`` is subtracted from the number of frequencies that spread over 1..10000: 0 in the paper's code, 1 in diffusers.
    """
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, shift: int, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.shift = shift
        first, second = (operations.Linear(size, width, **layers) for size in (FREQUENCIES, width))
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_features(t, self.shift).to(dtype))


class LabelEmbedder(nn.Module):
    """One row per class, and a last one for "no class", which classifier-free guidance needs (section 3.2)."""

    def __init__(self, rows: int, width: int, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.embedding_table = operations.Embedding(rows, width, **layers)

    def forward(self, y: Tensor, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """Return (B, D): the embeddings of classes (B,), or sums of those of (B, K) with ``weights`` (B, K)."""
        embedded: Tensor = self.embedding_table(y, out_dtype=dtype).to(dtype)
        return embedded if weights is None else (embedded * weights.to(dtype)[..., None]).sum(1)


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, patch: int, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.proj = operations.Conv2d(channels, width, kernel_size=patch, stride=patch, **layers)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")
