"""How present each subject is in cross-attention, and the losses that make it more so.

Sources: Attend-and-Excite (Chefer et al., SIGGRAPH 2023, section 3 and its code), Divide & Bind (Li et al., BMVC 2023,
eq. 4), A-STAR (Agarwal et al., ICCV 2023, eq. 2: overlap) and InitNO (Guo et al., CVPR 2024, eq. 5: self-attention).

Maps are (pictures, height, width, text tokens), subjects' maps (pictures, subjects, height, width), float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from .gradient import AttentionCall, Measurements
from .placement import text_placement
from .sites import CaptureLayer

# The published code sharpens the share of each token before they compete.
_SHARPNESS = 100.0


class Loss(Enum):
    """What is made smaller."""

    ATTEND_EXCITE = "attend-and-excite"
    DIVIDE_BIND = "divide-and-bind"


@dataclass(frozen=True)
class LossSettings:
    """How subjects are measured.

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


@dataclass(frozen=True)
class Subject:
    """A thing that must be seen: its name and the positions of its tokens among the text tokens."""

    name: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class GuidedPrompt:
    """One entry of the positive conditioning.

    Attributes:
        columns: the text tokens that compete for a place, in order; it has every subject's positions.
    """

    subjects: tuple[Subject, ...]
    columns: tuple[int, ...]


def smoothing_kernel(sigma: float, size: int) -> Tensor:
    """(size, size), sums to 1. As published exp(-(d / 2 sigma)^2), which is wider than a Gaussian of that sigma."""
    distance = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    line = torch.exp(-((distance / (2 * sigma)) ** 2))
    kernel = line[:, None] * line[None]
    return kernel / kernel.sum()


def smoothed(maps: Tensor, sigma: float, size: int) -> Tensor:
    """Subjects' maps smoothed; at the border they are mirrored, as far as they are large enough for that."""
    margin = size // 2
    mode = "reflect" if min(maps.shape[-2:]) > margin else "replicate"
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kernel = smoothing_kernel(sigma, size).to(maps)[None, None]
    return conv2d(pad(flat, (margin,) * 4, mode=mode), kernel).view_as(maps)


def subject_maps(maps: Tensor, prompt: GuidedPrompt, settings: LossSettings) -> Tensor:
    """Each subject's share of every place, (pictures, subjects, height, width): a softmax over the competing tokens."""
    column = {position: index for index, position in enumerate(prompt.columns)}
    shares = (maps[..., list(prompt.columns)] * _SHARPNESS).softmax(-1)
    own = [shares[..., [column[position] for position in subject.positions]].mean(-1) for subject in prompt.subjects]
    stacked = torch.stack(own, 1)
    return smoothed(stacked, settings.sigma, settings.kernel_size) if settings.smoothing else stacked


def strengths(subjects: Tensor) -> Tensor:
    """Each subject's maximum, (pictures, subjects)."""
    return subjects.flatten(2).amax(-1)


def neglect(subjects: Tensor) -> Tensor:
    """What the most neglected subject lacks of a full maximum, (pictures,): the paper's loss (eq. 1)."""
    return (1 - strengths(subjects)).clamp(min=0).amax(1)


def variation(subjects: Tensor) -> Tensor:
    """Minus the total variation of the subject with the least, (pictures,): Divide & Bind's attendance loss."""
    down = (subjects[..., 1:, :] - subjects[..., :-1, :]).abs().sum((2, 3))
    across = (subjects[..., :, 1:] - subjects[..., :, :-1]).abs().sum((2, 3))
    return -(down + across).amin(1)


def overlap(subjects: Tensor) -> Tensor:
    """Mean over pairs of sum(min) / sum(both), (pictures,): 0 apart, 0.5 the same. 0 for a single subject."""
    flat = subjects.flatten(2)
    pairs = list(combinations(range(flat.shape[1]), 2))
    if not pairs:
        return flat.new_zeros(len(flat))
    one, other = (flat[:, [pair[side] for pair in pairs]] for side in (0, 1))
    return (torch.minimum(one, other).sum(-1) / (one + other).sum(-1).clamp(min=1e-8)).mean(1)


def self_overlap(subjects: Tensor, looks: Tensor) -> Tensor:
    """``overlap`` of where each subject's strongest place looks, (pictures,).

    Args:
        looks: image tokens attending to image tokens, (pictures, places, places).
    """
    places = subjects.flatten(2).argmax(-1)
    rows = looks.gather(1, places[..., None].expand(-1, -1, looks.shape[-1]))
    return overlap(rows[..., None])


# --- from attention calls ------------------------------------------------------------------------------------------------


@dataclass
class ExciteObjective:
    """Measures one entry of the conditioning in a differentiable pass; see ``gradient.Objective``.

    Attributes:
        grid: what maps are averaged down to where a network's own are finer; None keeps them.
        rows_of_text: rows of the conditioning; some models pad it in front.
        strengths: of every picture after a pass, (batch, subjects), filled row by row.
    """

    prompt: GuidedPrompt
    settings: LossSettings
    grid: tuple[int, int] | None
    batch: int
    strengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.strengths = torch.zeros(self.batch, len(self.prompt.subjects))

    def measure(self, layer: CaptureLayer, call: AttentionCall, rows: Tensor) -> dict[str, Tensor]:
        place = text_placement(layer, call.context, call.inputs.keys, call.inputs.queries)
        found: dict[str, Tensor] = {}
        if place is None:
            return found
        inputs = call.inputs
        queries = inputs.q[:, :, place.rows].float() * inputs.scale
        if place.text is not None:
            logits = queries @ inputs.k[:, :, place.text].float().transpose(-1, -2)
            maps = _masked(logits, inputs.mask, place.rows, place.text).softmax(-1)
            found["text"] = maps.sum(1).unflatten(1, place.grid).mean(1)  # of a video: over its frames
        looks = self.settings.self_overlap and layer.kind in ("self", "joint") and place.grid[0] == 1
        if place.image is not None and looks:
            logits = queries @ inputs.k[:, :, place.image].float().transpose(-1, -2)
            found["image"] = _masked(logits, inputs.mask, place.rows, place.image).softmax(-1).sum(1)
        if found:
            found["heads"] = torch.tensor(inputs.heads)
        return found

    def loss(self, measurements: Measurements, rows: Tensor) -> Tensor:
        maps = _mean([found for _, found in measurements], "text")
        if maps is None:
            raise RuntimeError("No attention to the text was seen, so there is nothing to guide. Another node may replace it.")
        if self.grid is not None and self.grid != tuple(maps.shape[1:3]):
            maps = interpolate(maps.movedim(-1, 1), size=self.grid, mode="area").movedim(1, -1)
        subjects = subject_maps(maps, self.prompt, self.settings)
        self.strengths[rows.cpu()] = strengths(subjects).detach().float().cpu()
        loss = neglect(subjects) if self.settings.loss is Loss.ATTEND_EXCITE else variation(subjects)
        if self.settings.overlap:
            loss = loss + self.settings.overlap * overlap(subjects)
        looks = _mean([found for _, found in measurements], "image")
        if self.settings.self_overlap and looks is not None:
            whole = subjects if looks.shape[1] == subjects[0, 0].numel() else _resized(subjects, looks.shape[1])
            loss = loss + self.settings.self_overlap * self_overlap(whole, looks)
        return loss


def _masked(logits: Tensor, mask: Tensor | None, rows: slice, columns: slice) -> Tensor:
    if mask is None:
        return logits
    mask = (mask[..., rows, :] if mask.shape[-2] > 1 else mask)[..., columns]
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask


def _mean(measured: Sequence[dict[str, Tensor]], name: str) -> Tensor | None:
    """The plain mean over all heads of all layers."""
    found = [entry for entry in measured if name in entry]
    if not found:
        return None
    return torch.stack([entry[name] for entry in found]).sum(0) / sum(int(entry["heads"]) for entry in found)


def _resized(subjects: Tensor, places: int) -> Tensor:
    """Subjects' maps on the finer grid of the self-attention (the same shape, ``places`` in all)."""
    height, width = subjects.shape[-2:]
    factor = math.sqrt(places / (height * width))
    size = round(height * factor), round(width * factor)
    return interpolate(subjects, size=size, mode="bilinear")
