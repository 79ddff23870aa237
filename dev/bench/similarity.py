"""Measure how alike two images are."""

from __future__ import annotations

from piq import multi_scale_ssim
from torch import Tensor


def peak_signal_to_noise(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR in dB of each image of a batch, values in 0..1."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the MS-SSIM of each image of a batch (n, height, width, 3), of at least 161 pixels (Wang et al., 2003)."""
    found: Tensor = multi_scale_ssim(a.movedim(-1, 1), b.movedim(-1, 1), reduction="none")
    return found
