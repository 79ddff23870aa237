"""What the front end needs to rank words at a place of the preview: small maps of every word, and where they are shown.

The file is JSON. ``maps`` holds, for each image, 8-bit maps of all words one after the other (row by row, base64) and the
share of attention that 255 stands for, word by word; ``pictures`` says for each preview image its size, the map it belongs
to, and the rectangles (x, y, width, height) in which the image is shown.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import torch

from .attn_maps import AttnMaps
from .drawing.pixels import resize_heat
from .heats import Source
from .preview import Drawn
from .words import Word, every_word, read_prompt

_VERSION = 1
_MOST_CELLS = 1_500_000
_MOST_SIDE = 64


def pointing_data(
    maps: AttnMaps, prompt: str, clip: Any, text: str, drawn: Sequence[Drawn], sources: Sequence[Source]
) -> str | None:
    """Return the file's text; None where the words of the prompt are not known or nothing in the preview can be pointed at."""
    if not any(entry.figure.panels for entry in drawn):
        return None
    try:
        words = every_word(read_prompt(maps, prompt, clip, text))
    except ValueError:  # a self-attention view of a model without text, or of a prompt nothing is known of
        return None
    size = _grid(maps.grid, len(words) * len(sources))
    described = {
        "version": _VERSION,
        "prompt": prompt,
        "words": [word.name for word in words],
        "grid": [size[1], size[0]],
        "maps": [_packed(source, words, size) for source in sources],
        "pictures": [_place(entry) for entry in drawn],
    }
    return json.dumps(described, separators=(",", ":"))


def _grid(grid: tuple[int, int], maps: int) -> tuple[int, int]:
    """Return height and width of the maps in the file: their own, or less where that would make the file large."""
    fits = (_MOST_CELLS / (maps * grid[0] * grid[1])) ** 0.5
    factor = min(1.0, fits, _MOST_SIDE / max(grid))
    return max(round(grid[0] * factor), 1), max(round(grid[1] * factor), 1)


def _packed(source: Source, words: Sequence[Word], size: tuple[int, int]) -> dict[str, Any]:
    heats = resize_heat(torch.stack(source.heats(words)), size)
    highest = heats.amax(dim=(1, 2)).clamp(min=1e-12)
    levels = (heats / highest[:, None, None] * 255).round().to(torch.uint8)
    return {
        "highest": [float(f"{value:.4g}") for value in highest.tolist()],
        "levels": base64.b64encode(levels.contiguous().numpy().tobytes()).decode(),
    }


def _place(entry: Drawn) -> dict[str, Any]:
    height, width = entry.figure.image.shape[:2]
    panels = [[panel.x, panel.y, panel.width, panel.height] for panel in entry.figure.panels]
    return {"map": entry.image_index, "size": [width, height], "panels": panels}
