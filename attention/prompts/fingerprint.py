"""Telling from the rows of a conditioning which prompt was encoded.

A fingerprint is a sketch of each row: its direction seen from a few fixed angles, in whole steps of a 24th. Rows that were
encoded anew (in another dtype, with weights offloaded) differ by far less than ``_TOLERANCE``, rows of other words by far
more. The length of a row does not matter, so a conditioning multiplied by a number is still known.
"""

from __future__ import annotations

import base64
import math
from functools import lru_cache

import torch
from torch import Tensor

_ANGLES = 8
_STEPS = 24.0  # of one unit; a sketch of random rows has a spread of 1
_TOLERANCE = 0.12  # root mean square over the angles
_VERSION = "1"
_ROUNDING = 0.01  # of a row's length, between images that were encoded one by one or together


def encoded_fingerprint(rows: Tensor, angles: int = _ANGLES) -> str:
    """Return what is known again of the rows of a conditioning, as text of about 11 characters a row.

    Args:
        rows: a conditioning tensor (1, rows, ...) on any device, of any dtype.
        angles: more of them tell rows apart more finely, and make the text longer.
    """
    sketch = (row_sketches(rows, angles) * _STEPS).round().to(torch.int8)
    return f"{_VERSION}:{base64.b64encode(sketch.numpy().tobytes()).decode()}"


def read_fingerprint(fingerprint: str, angles: int = _ANGLES) -> Tensor | None:
    """Return the sketches that a fingerprint was made of, (rows, angles); None where it is of a kind not known here."""
    version, _, coded = fingerprint.partition(":")
    try:
        steps = bytearray(base64.b64decode(coded, validate=True))
    except ValueError:
        return None
    if version != _VERSION or not steps or len(steps) % angles:
        return None
    return torch.frombuffer(steps, dtype=torch.int8).view(-1, angles).float() / _STEPS


def row_sketches(rows: Tensor, angles: int = _ANGLES) -> Tensor:
    """Return (rows, angles), each value in steps of a 24th and at most 5; a row of zeros has zeros."""
    flat = rows.detach()[0].float().cpu().flatten(1)
    norms = flat.norm(dim=1, keepdim=True)
    directions = flat / norms.clamp(min=torch.finfo(torch.float32).tiny)
    seen = (directions @ _angles(flat.shape[1], angles)).nan_to_num(0.0, 0.0, 0.0).clamp(-5, 5)
    return (seen * _STEPS).round() / _STEPS


@lru_cache(maxsize=8)
def _angles(features: int, angles: int) -> Tensor:
    """Return (features, angles): fixed directions of length sqrt(features), without any random generator."""
    index = torch.arange(1, features * angles + 1, dtype=torch.float64).view(features, angles)
    scattered = (index * (math.sqrt(5) - 1) / 2).frac() * 2 * math.pi * index.sqrt()
    return (math.sqrt(2) * scattered.sin()).float()


def same_for_all_images(rows: Tensor) -> bool:
    """Return whether a conditioning (batch, rows, ...) has the same rows for each image of a batch, but for rounding."""
    flat = rows.detach().float().flatten(2)
    return len(flat) < 2 or bool(((flat - flat[:1]).norm(dim=2) <= _ROUNDING * flat[:1].norm(dim=2)).all())


def same_rows(one: Tensor, other: Tensor) -> bool:
    """Return whether two sketches of as many rows are of the same rows."""
    if one.shape != other.shape:
        return False
    return bool(((one - other).square().mean(1) <= _TOLERANCE**2).all())


def find_rows(part: Tensor, whole: Tensor, start: int = 0) -> int | None:
    """Return the first row, from ``start`` on, at which ``whole`` has all rows of ``part``; None where it has them nowhere."""
    if not len(part):
        return None
    for at in range(start, len(whole) - len(part) + 1):
        if same_rows(part[:1], whole[at : at + 1]) and same_rows(part, whole[at : at + len(part)]):
            return at
    return None
