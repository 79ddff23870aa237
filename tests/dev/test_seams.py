"""``python dev eval seams``: what it measures, and that its rows run."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import evaluate, evaluate_seams

pytestmark = pytest.mark.newest


def waves(periods: float, side: int = 64) -> torch.Tensor:
    """An image of so many waves from left to right, which repeats from top to bottom."""
    across = torch.sin(torch.arange(side) / side * periods * 2 * math.pi) / 2 + 0.5
    return across.view(1, 1, side, 1).expand(1, side, side, 3) + 1e-3 * (torch.arange(side) % 2).view(1, side, 1, 1)


def test_a_seam_is_a_step_that_is_larger_than_those_inside():
    assert evaluate_seams.across_edges(waves(2))[0] < 2 < 5 < evaluate_seams.across_edges(waves(2.25))[0]
    assert evaluate_seams.across_edges(waves(2.25))[1] == pytest.approx(1, abs=1e-3)
    turned = evaluate_seams.across_edges(waves(2.25).transpose(1, 2))
    assert turned == pytest.approx(evaluate_seams.across_edges(waves(2.25))[::-1])


def test_rows_are_measured(pack, capsys):
    tiles = evaluate_seams.Tiles(*evaluate.load(), images=1, steps=2)
    rows = ["plain", "Seamless Tiling, both", "tile enlarged and sharpened", "the same between Wrap Tile and Crop Tile"]
    report, images = evaluate_seams.measure(tiles, rows)
    assert list(report) == rows and [one.shape[1] for one in images] == [256, 256, 512, 512]
    assert report[rows[3]]["left and right"] < report[rows[2]]["left and right"]
    assert all(row in capsys.readouterr().out for row in rows[:1])
