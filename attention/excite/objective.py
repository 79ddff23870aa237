"""The loss of one entry of the conditioning, measured in a differentiable pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import host
from ..gradient.watch import AttentionCall, Measurements
from ..networks.grids import resize_maps
from ..networks.layers import AttentionLayer
from ..networks.placement import text_placement
from .losses import Loss, LossSettings, neglect, overlap, self_overlap, strengths, subject_maps, variation
from .own_rows import OwnPrompt, is_unet, own_inputs
from .places import Places
from .subjects import GuidedPrompt


@dataclass
class ExciteObjective:
    """Measures one entry of the conditioning in a differentiable pass; see ``gradient.Objective``.

    Attributes:
        grid: what maps are averaged down to where a network's own are finer; None keeps them.
        own: what the prompt's rows are told by where a node computes several prompts at once.
        places: where the run's subjects should be; None: anywhere.
        mask: where the prompt acts, (1 or batch, height, width), and its subjects are looked for; None: everywhere.
        strengths: of every image after a pass, (batch, subjects), filled row by row.
    """

    prompt: GuidedPrompt
    settings: LossSettings
    grid: tuple[int, int] | None
    batch: int
    own: OwnPrompt = OwnPrompt(None, "")
    places: Places | None = None
    mask: Tensor | None = None
    strengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.strengths = torch.zeros(self.batch, len(self.prompt.subjects))

    def measure(self, layer: AttentionLayer, call: AttentionCall, rows: Tensor) -> dict[str, Tensor]:
        """Return the layer's maps of a call, summed over its heads: "text" (images, height, width, tokens), "image" (images,
        places, places), and the number of "heads"; nothing where its tokens cannot be told apart."""
        inputs = own_inputs(layer, call, rows, self.own)
        place = text_placement(layer, call.context, inputs.keys, inputs.queries)
        found: dict[str, Tensor] = {}
        if place is None or (is_unet(call) and inputs.batch != len(rows)):  # tiles of an image (HyperTile)
            return found
        queries = inputs.q[:, :, place.rows].float() * inputs.scale
        if place.text is not None:
            logits = queries @ inputs.k[:, :, place.text].float().transpose(-1, -2)
            maps = host.masked_logits(logits, inputs.mask, place.rows, place.text).softmax(-1)
            found["text"] = maps.sum(1).unflatten(1, place.grid).mean(1)  # of a video: over its frames
        looks = self.settings.self_overlap and layer.kind in ("self", "joint") and place.grid[0] == 1
        if place.image is not None and looks:
            logits = queries @ inputs.k[:, :, place.image].float().transpose(-1, -2)
            found["image"] = host.masked_logits(logits, inputs.mask, place.rows, place.image).softmax(-1).sum(1)
        if found:
            found["heads"] = torch.tensor(inputs.heads)
        return found

    def loss(self, measurements: Measurements, rows: Tensor) -> Tensor:
        """Return the loss of each image of a pass, (images,), and keep the subjects' strengths.

        Raises:
            RuntimeError: no layer showed its attention to the text.
        """
        maps = _mean(_on_one_grid([found for _, found in measurements]), "text")
        if maps is None:
            raise RuntimeError(
                "No attention to the text was seen, so Attend-and-Excite has nothing to guide: another node replaces or reshapes "
                "this model's attention. Take it out."
            )
        if self.grid is not None and math.prod(self.grid) < maps.shape[1] * maps.shape[2]:
            maps = resize_maps(maps.movedim(-1, 1), self.grid, "area").movedim(1, -1)
        subjects = subject_maps(maps, self.prompt, self.settings)
        if self.mask is not None:
            subjects = subjects * _inside(self.mask, subjects, rows)
        self.strengths[rows.cpu()] = strengths(subjects).detach().float().cpu()
        if self.settings.loss is Loss.ATTEND_EXCITE:
            loss = neglect(subjects, [len(subject.positions) for subject in self.prompt.subjects])
        else:
            loss = variation(subjects)
        if self.places is not None:
            loss = loss + self.places.loss(subjects, rows)
        if self.settings.overlap:
            loss = loss + self.settings.overlap * overlap(subjects)
        looks = _mean([found for _, found in measurements], "image")
        if self.settings.self_overlap and looks is not None:
            whole = subjects if looks.shape[1] == subjects[0, 0].numel() else _resized(subjects, looks.shape[1])
            loss = loss + self.settings.self_overlap * self_overlap(whole, looks)
        return loss


def _inside(mask: Tensor, subjects: Tensor, rows: Tensor) -> Tensor:
    """Return a mask of some images on the grid of their subjects' maps, (rows, 1, height, width); 1 where it is brightest."""
    coarse = resize_maps(mask.to(subjects.device, subjects.dtype), subjects.shape[-2:], "area")
    return (coarse / coarse.amax((1, 2), keepdim=True).clamp(min=1e-6))[rows.to(subjects.device) % len(mask), None]


def _on_one_grid(measured: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the maps of all layers on the finest grid among them: a node may scale the features of some layers only."""
    grids = {tuple(found["text"].shape[1:3]) for found in measured if "text" in found}
    if len(grids) < 2:
        return list(measured)
    finest = max(grids, key=math.prod)
    return [
        {**found, "text": resize_maps(found["text"].movedim(-1, 1), finest, "bilinear").movedim(1, -1)}
        if "text" in found
        else found
        for found in measured
    ]


def _mean(measured: Sequence[dict[str, Tensor]], name: str) -> Tensor | None:
    """Return the plain mean over all heads of all layers."""
    found = [entry for entry in measured if name in entry]
    if not found:
        return None
    return torch.stack([entry[name] for entry in found]).sum(0) / sum(int(entry["heads"]) for entry in found)


def _resized(subjects: Tensor, places: int) -> Tensor:
    """Return subjects' maps on the finer grid of the self-attention (the same shape, ``places`` in all)."""
    height, width = subjects.shape[-2:]
    factor = math.sqrt(places / (height * width))
    size = round(height * factor), round(width * factor)
    return resize_maps(subjects, size, "bilinear")
