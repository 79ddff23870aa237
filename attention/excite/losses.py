"""How present each subject is in cross-attention, and the losses that make it more so.

Sources: Attend-and-Excite (Chefer et al., SIGGRAPH 2023, section 3 and its code), Divide & Bind (Li et al., BMVC 2023,
eq. 4), A-STAR (Agarwal et al., ICCV 2023, eq. 2: overlap) and InitNO (Guo et al., CVPR 2024, eq. 5: self-attention).

Maps are (images, height, width, text tokens), subjects' maps (images, subjects, height, width), float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .subjects import GuidedPrompt

# The published code sharpens the share of each token before they compete.
_SHARPNESS = 100.0


class Loss(Enum):
    """Name what is made smaller."""

    ATTEND_EXCITE = "attend-and-excite"
    DIVIDE_BIND = "divide-and-bind"


@dataclass(frozen=True)
class LossSettings:
    """Say how subjects are measured.

    Attributes:
        smoothing, sigma, kernel_size: maps are smoothed before their maximum is taken, see ``smoothing_kernel``.
        overlap, self_overlap: weights of the terms that keep subjects apart.
    """

    loss: Loss = Loss.ATTEND_EXCITE
    smoothing: bool = True
    sigma: float = 0.5
    kernel_size: int = 3
    overlap: float = 0.0
    self_overlap: float = 0.0

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: a kernel has a middle, so use 1, 3, 5, ... (paper: 3).")
        if self.smoothing and not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}: it is the width of the smoothing, above 0 (paper: 0.5). To leave smoothing "
                             "out, switch 'smoothing' off.")  # fmt: skip
        for name in ("overlap", "self_overlap"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a weight is 0 or more.")


def smoothing_kernel(sigma: float, size: int) -> Tensor:
    """Return (size, size), sums to 1. As published exp(-(d / 2 sigma)^2), which is wider than a Gaussian of that sigma."""
    distance = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    line = torch.exp(-((distance / (2 * sigma)) ** 2))
    kernel = line[:, None] * line[None]
    return kernel / kernel.sum()


def smoothed(maps: Tensor, sigma: float, size: int) -> Tensor:
    """Return subjects' maps smoothed; at the border they are mirrored, as far as they are large enough for that."""
    margin = size // 2
    mode = "reflect" if min(maps.shape[-2:]) > margin else "replicate"
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kernel = smoothing_kernel(sigma, size).to(maps)[None, None]
    return conv2d(pad(flat, (margin,) * 4, mode=mode), kernel).view_as(maps)


def subject_maps(maps: Tensor, prompt: GuidedPrompt, settings: LossSettings) -> Tensor:
    """Return each subject's share of every place, (images, subjects, height, width), from 0 to 1.

    The tokens compete in one softmax, and a subject has what its tokens get together: subjects of one token are measured as in
    the paper, and one of several tokens can be as strong as they.
    """
    column = {position: index for index, position in enumerate(prompt.columns)}
    shares = (maps[..., list(prompt.columns)] * _SHARPNESS).softmax(-1)
    own = [shares[..., [column[position] for position in subject.positions]].sum(-1) for subject in prompt.subjects]
    stacked = torch.stack(own, 1)
    return smoothed(stacked, settings.sigma, settings.kernel_size) if settings.smoothing else stacked


def strengths(subjects: Tensor) -> Tensor:
    """Return each subject's maximum, (images, subjects)."""
    return subjects.flatten(2).amax(-1)


def lack(strengths: Tensor) -> Tensor:
    """Return what the most neglected subject lacks of a full maximum, (images,), from strengths (images, subjects)."""
    return (1 - strengths).clamp(min=0).amax(1)


def neglect(subjects: Tensor, tokens: Sequence[int] = ()) -> Tensor:
    """Return what the most neglected subject lacks of a full maximum, (images,): the paper's loss (eq. 1).

    Args:
        tokens: how many each subject has (none given: one). Its loss is divided by them, so that a nudge is as far for a phrase
            as for a word: shares that grow together would push that many times as hard.
    """
    found = strengths(subjects)
    if not tokens:
        return lack(found)
    weakest = (1 - found).clamp(min=0).argmax(1)
    return lack(found) / torch.tensor(tokens, device=found.device)[weakest]


def variation(subjects: Tensor) -> Tensor:
    """Return minus the total variation of the subject with the least, (images,): Divide & Bind's attendance loss."""
    down = (subjects[..., 1:, :] - subjects[..., :-1, :]).abs().sum((2, 3))
    across = (subjects[..., :, 1:] - subjects[..., :, :-1]).abs().sum((2, 3))
    return -(down + across).amin(1)


def overlap(subjects: Tensor) -> Tensor:
    """Return mean over pairs of sum(min) / sum(both), (images,): 0 apart, 0.5 the same. 0 for a single subject."""
    flat = subjects.flatten(2)
    pairs = list(combinations(range(flat.shape[1]), 2))
    if not pairs:
        return flat.new_zeros(len(flat))
    one, other = (flat[:, [pair[side] for pair in pairs]] for side in (0, 1))
    return (torch.minimum(one, other).sum(-1) / (one + other).sum(-1).clamp(min=1e-8)).mean(1)


def self_overlap(subjects: Tensor, looks: Tensor) -> Tensor:
    """Return ``overlap`` of where each subject's strongest place looks, (images,).

    Args:
        looks: image tokens attending to image tokens, (images, places, places).
    """
    places = subjects.flatten(2).argmax(-1)
    rows = looks.gather(1, places[..., None].expand(-1, -1, looks.shape[-1]))
    return overlap(rows[..., None])
