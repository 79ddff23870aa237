"""Colours for heat maps and for words.

Turbo is Anton Mikhailov's (Google, Apache-2.0), viridis Stefan van der Walt's and Nathaniel Smith's (matplotlib, CC0): 33 of
their 256 table entries each, with straight lines between, which is within 2/255 of the tables. Jet is the piecewise linear
map that matplotlib and DAAM draw. A palette is (256, 3), RGB 0..1.
"""

from __future__ import annotations

import colorsys
from enum import Enum
from functools import cache

import numpy as np
import torch


class Colormap(str, Enum):
    TURBO = "turbo"
    VIRIDIS = "viridis"
    JET = "jet"
    GRAY = "gray"


_TURBO = """
30123b 392a73 4040a1 4456c7 466be3 467ff6 4293ff 37a7fa 29bbec 1dcdd8 18dcc3 1ee8b0 31f299 4cf97e 6bfd64 8aff4d a3fd3c
b8f735 cced34 dee037 edd03a f8c03a fdae35 fe982c fb8022 f56817 ec520f e04009 d23105 c02302 ac1701 950d01 7a0403
"""
_VIRIDIS = """
440154 470d60 48186a 482374 472d7b 453681 424086 3f4989 3b528b 375a8d 33638d 2f6a8e 2c728e 297a8e 26818e 23898e 21908c
1f988b 1f9f88 21a685 28ae80 31b57b 3ebc74 4cc26c 5dc963 6ece58 82d34c 96d83f abdc32 c0df24 d5e21a eae51a fde725
"""

# Position and value of the corners of each channel.
_JET = (
    ((0, 0), (0.35, 0), (0.66, 1), (0.89, 1), (1, 0.5)),
    ((0, 0), (0.125, 0), (0.375, 1), (0.64, 1), (0.91, 0), (1, 0)),
    ((0, 0.5), (0.11, 1), (0.34, 1), (0.65, 0), (1, 0)),
)

# Colours of words: apart from each other and from a dark ground.
_WORDS = "4cc2ff ff9f43 5fd38d ff6b8b c58cff ffe066 1fa39a ff9ad5 5b7bff a6d930 b5651d d9d9d9"


@cache
def palette(colormap: Colormap) -> torch.Tensor:
    """Return 256 colours from low to high."""
    at = np.linspace(0.0, 1.0, 256)
    if colormap is Colormap.GRAY:
        channels = [at, at, at]
    elif colormap is Colormap.JET:
        channels = [np.interp(at, [x for x, _ in corners], [y for _, y in corners]) for corners in _JET]
    else:
        knots = np.array([hex_color(entry) for entry in (_TURBO if colormap is Colormap.TURBO else _VIRIDIS).split()])
        places = np.linspace(0.0, 1.0, len(knots))
        channels = [np.interp(at, places, knots[:, channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels, axis=1)).float()


def colorize(heat: torch.Tensor, colormap: Colormap) -> torch.Tensor:
    """Colours (..., 3) of a heat map with values 0..1."""
    index = (heat.float().nan_to_num(0).clamp(0, 1) * 255).round().long()
    return palette(colormap).to(heat.device)[index]


def word_color(index: int) -> tuple[float, float, float]:
    """Return the colour of the word at ``index``; beyond the table, hues a golden angle apart."""
    table = _WORDS.split()
    if index < len(table):
        return hex_color(table[index])
    return colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.45 + 0.3 * (index % 2), 0.95 - 0.2 * (index % 3 == 0))


def hex_color(digits: str) -> tuple[float, float, float]:
    red, green, blue = bytes.fromhex(digits)
    return red / 255, green / 255, blue / 255
