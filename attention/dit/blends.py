"""Classes as the tensor of a CONDITIONING, which ComfyUI's nodes may zero, scale and average, and back.

Each image of the batch has a row: a one for its class. So a weighted mean of conditionings (ConditioningAverage) has each
class's share in it, and whatever has no share left is the null class.
"""

from __future__ import annotations

import torch
from torch import Tensor

NULL = -1  # "no class", whose index depends on the model
MOST_CLASSES = 32768
_NULL_SHARE, _LENGTH, _FIRST = 0, 1, 2  # columns: of the null class, the number of labels in the list, the classes
_NEAR = 1e-4  # shares are sums of a few float32


def to_rows(labels: list[int]) -> Tensor:
    """Return (1, n, columns) float32: a row for each of n labels."""
    rows = torch.zeros(1, len(labels), _FIRST + MOST_CLASSES)
    rows[0, :, _LENGTH] = len(labels)
    for row, label in enumerate(labels):
        rows[0, row, _NULL_SHARE if label == NULL else _FIRST + label] = 1
    return rows


def from_rows(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return classes and their shares.

    Args:
        rows: (1, n, columns), as nodes have left them.
        labels: (n,) int64, as they were chosen.

    Returns:
        (n,) classes and None; or (n, K) classes and (n, K) float32 shares, where some are blends.

    Raises:
        ValueError: lists of different lengths were averaged, or two were joined.
    """
    if rows.shape[1:] != (len(labels), _FIRST + MOST_CLASSES):
        raise ValueError(
            "Labels were joined with another conditioning (ConditioningConcat), which works for prompts only. For several images "
            "write all classes into one DiT Class Label; for a blend of two classes use ConditioningAverage."
        )
    row = rows[0].float().cpu()
    shares = torch.cat([row[:, :1], row[:, _FIRST:]], 1)  # (n, null and classes)
    total = shares.sum(1)
    if ((row[:, _LENGTH] - len(labels) * total).abs() > _NEAR * len(labels)).any():
        raise ValueError(
            "ConditioningAverage was given lists of labels of different lengths. Write the same number of classes in both DiT "
            "Class Labels (repeat a class if need be)."
        )
    shares[:, 0] += 1 - total  # what a node took away, such as ConditioningZeroOut
    count = int((shares.abs() > _NEAR).sum(1).max())
    strongest = shares.abs().topk(max(count, 1), dim=1).indices
    weights = shares.gather(1, strongest)
    weights = torch.where(weights.abs() > _NEAR, weights, 0)
    classes = strongest - 1  # the null class is -1
    classes = torch.where(weights != 0, classes, classes[:, :1])  # what has no share must not be taken for the null class
    if count == 1 and torch.allclose(weights, torch.ones(()), atol=_NEAR):
        return classes[:, 0], None
    return classes, weights
