"""Maps on another grid."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

pytestmark = pytest.mark.newest


@pytest.fixture
def resize_maps(pack):
    from fovea_attention.attention.networks.grids import resize_maps

    return resize_maps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(12, 8), (6, 9), (13, 4), (3, 11), (5, 3), (64, 48)])
def test_bicubic_maps_are_torchs_without_undershoot(resize_maps, size, dtype):
    maps = torch.rand(2, 5, 6, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    maps[0, 0] = (torch.arange(24).view(6, 4) % 2).to(dtype)  # undershoots
    expected = interpolate(maps if dtype == torch.float64 else maps.float(), size=size, mode="bicubic")
    assert bool((expected < -0.01).any())
    resized = resize_maps(maps, size)
    assert resized.dtype == dtype and resized.shape == (2, 5, *size)
    torch.testing.assert_close(resized, expected.clamp(min=0).to(dtype), atol=1e-6, rtol=1e-3 if dtype == torch.float16 else 1e-5)


def test_resized_maps_have_a_gradient_after_a_run_that_had_none(resize_maps):
    maps = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        before = resize_maps(maps, (9, 11))
    maps.requires_grad_()
    after = resize_maps(maps, (9, 11))
    assert torch.equal(before, after.detach())
    (gradient,) = torch.autograd.grad(after.sum(), maps)
    (expected,) = torch.autograd.grad(interpolate(maps[None], size=(9, 11), mode="bicubic").clamp(min=0).sum(), maps)
    torch.testing.assert_close(gradient, expected)
