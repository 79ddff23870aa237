"""The losses of Attention Distillation, its colour statistics, and its regions.

Zhou et al., "Attention Distillation: A Unified Approach to Visual Characteristics Transfer" (arXiv:2502.20235, CVPR 2025).
A layer's own self-attention should give what it would give if it looked at the reference: L_AD = |SA(Q, K, V) - SA(Q, Ks, Vs)|,
where only the first term has a gradient. The content loss keeps the queries, |Q - Qc|. Both are means over a layer's elements
and sums over layers, and never divided by the number of pictures: every picture has its own loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradient import AttentionCall, Measurements
from .sites import CaptureLayer, Grid

CallKey = tuple[str, int]  # layer, and which of its attention calls

# A grey value of an 8 bit mask; more labels than this are the soft edges of a picture.
_GREY_LEVELS = 255
MAX_LABELS = 32


def call_key(layer: CaptureLayer, call: AttentionCall) -> CallKey:
    return layer.name, call.index


@dataclass(frozen=True)
class Features:
    """Keys and values of all references in one attention call: (1, heads, tokens of all references, channels)."""

    k: Tensor
    v: Tensor


@dataclass
class DistillObjective:
    """The loss of one optimisation step, an ``Objective`` of ``ModelPass.gradient``.

    Attributes:
        features: of the references, for every call.
        content: queries of the content picture, (batch, heads, tokens, channels).
        attn_scale: sharpens what the reference's attention picks.
        style_loss, content_loss: each picture's own losses of the last pass, without weights, summed over layers.
    """

    features: Mapping[CallKey, Features]
    content: Mapping[CallKey, Tensor] | None = None
    content_weight: float = 0.0
    attn_scale: float = 1.0
    regions: Regions | None = None
    style_loss: dict[int, Tensor] = field(default_factory=dict)
    content_loss: dict[int, Tensor] = field(default_factory=dict)

    def measure(self, layer: CaptureLayer, call: AttentionCall, rows: Tensor) -> Tensor:
        """(2, pictures): style and content loss of one call."""
        key = call_key(layer, call)
        features, inputs = self.features[key], call.inputs
        if self.regions is None:
            with torch.no_grad():
                ideal = _look_at(inputs.q * self.attn_scale, features.k, features.v, inputs.scale)
            style = _mean_distance(call.output, ideal, len(rows))
        else:
            style = self._style_by_region(layer, call, features, rows)
        if self.content is None:
            return torch.stack([style, torch.zeros_like(style)])
        queries = self.content[key]
        return torch.stack([style, _mean_distance(inputs.q, queries[rows] if len(rows) < len(queries) else queries, len(rows))])

    def _style_by_region(self, layer: CaptureLayer, call: AttentionCall, features: Features, rows: Tensor) -> Tensor:
        """The same, where every query may look at its own label only, one unmasked attention for each label."""
        assert self.regions is not None
        output, q = call.output, call.inputs.q
        losses = []
        for picture, row in enumerate(rows.tolist()):
            distance, queries = (output[picture] * 0).float().sum(), 0
            for of_target, of_reference in self.regions.pairs(layer.name, row, output.device):
                with torch.no_grad():
                    own = q[picture : picture + 1, :, of_target] * self.attn_scale
                    ideal = _look_at(own, features.k[:, :, of_reference], features.v[:, :, of_reference], call.inputs.scale)
                distance = distance + (output[picture, :, of_target].float() - ideal[0].float()).abs().sum()
                queries += len(of_target)
            losses.append(distance / max(queries * output.shape[1] * output.shape[3], 1))
        return torch.stack(losses)

    def loss(self, measurements: Measurements, rows: Tensor) -> Tensor:
        """(pictures,): style + content_weight * content."""
        style, content = torch.stack([losses for _, losses in measurements]).sum(0)
        for picture, row in enumerate(rows.tolist()):
            self.style_loss[row], self.content_loss[row] = style[picture].detach(), content[picture].detach()
        return style + self.content_weight * content


def _look_at(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch = (len(q), -1, -1, -1)
    return F.scaled_dot_product_attention(q, k.to(q.dtype).expand(batch), v.to(q.dtype).expand(batch), scale=scale)


def _mean_distance(x: Tensor, y: Tensor, pictures: int) -> Tensor:
    """(pictures,): mean |x - y|, in float32. (Frames of a video may be rows of their own.)"""
    return (x.float() - y.float()).abs().reshape(pictures, -1).mean(1)


# --- regions -------------------------------------------------------------------------------------------------------------


def labels_of(mask: Tensor) -> Tensor:
    """Grey values of a MASK (n, height, width) as whole numbers."""
    return (mask.detach().cpu().float() * _GREY_LEVELS).round().long()


class Regions:
    """Which tokens of the target may look at which tokens of the references: those of the same label.

    The published code gives the attention a (queries, keys) mask of equal labels. Here every label's queries and keys are
    gathered instead, which is the same attention and never as large.

    Args:
        target: labels (1 or pictures, height, width); references: one (height, width) for each reference.
        grids: for each layer, the grid of the target and of every reference, in tokens.
    """

    def __init__(self, target: Tensor, references: Sequence[Tensor], grids: Mapping[str, tuple[Grid, Sequence[Grid]]]) -> None:
        self.target = target
        self.references = list(references)
        self.grids = grids
        self._pairs: dict[tuple[str, int, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def pairs(self, layer: str, picture: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Indices of the queries and of the keys of every label that both have."""
        picture = picture if len(self.target) > 1 else 0
        found = self._pairs.get((layer, picture, device))
        if found is None:
            own, others = self.grids[layer]
            queries = token_labels(self.target[picture], own)
            keys = torch.cat([token_labels(labels, grid) for labels, grid in zip(self.references, others, strict=True)])
            common = sorted(set(queries.tolist()) & set(keys.tolist()))
            found = [(_where(queries, label, device), _where(keys, label, device)) for label in common]
            self._pairs[layer, picture, device] = found
        return found

    def missing(self) -> set[int]:
        """Labels of the target that no reference has."""
        return set(self.target.unique().tolist()) - {label for labels in self.references for label in labels.unique().tolist()}


def _where(labels: Tensor, label: int, device: torch.device) -> Tensor:
    return (labels == label).nonzero()[:, 0].to(device)


def token_labels(labels: Tensor, grid: Grid) -> Tensor:
    """(tokens,): labels (height, width) at the nearest pixel of each token, the same for every frame."""
    resized = F.interpolate(labels[None, None].float(), size=grid[1:], mode="nearest")[0, 0].long()
    return resized.flatten().repeat(grid[0])


# --- colour statistics ---------------------------------------------------------------------------------------------------


def adain(x: Tensor, references: Sequence[Tensor], *, epsilon: float = 1e-6, mask: Tensor | None = None) -> Tensor:
    """``x`` with the mean and spread of each channel over all references (Huang and Belongie, arXiv:1703.06868, eq. 8).

    Args:
        x: (batch, channels, ...): each picture has its own statistics; references: (n, channels, ...), of any size.
        mask: what of ``x`` is changed, 0 to 1, broadcastable to it; statistics are those of this part.
    """
    places = tuple(range(2, x.ndim))
    values = torch.cat([reference.movedim(1, 0).flatten(1) for reference in references], dim=1)
    shape = (1, -1, *[1] * len(places))
    mean_to, std_to = values.mean(1).view(shape), values.std(1).view(shape)
    if mask is None:
        mean, std = x.mean(places, keepdim=True), x.std(places, keepdim=True)
        return (x - mean) / (std + epsilon) * std_to + mean_to
    mask = mask.to(x).expand_as(x)
    size = mask.sum(places, keepdim=True)
    mean = (x * mask).sum(places, keepdim=True) / size.clamp(min=1)
    variance = (mask * (x - mean).square()).sum(places, keepdim=True) / (size - 1).clamp(min=1)
    moved = (x - mean) / (variance.sqrt() + epsilon) * std_to + mean_to
    return x + mask * (moved - x)
