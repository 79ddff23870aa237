"""The losses of Attention Distillation.

Zhou et al., "Attention Distillation: A Unified Approach to Visual Characteristics Transfer" (arXiv:2502.20235, CVPR 2025).
A layer's own self-attention should give what it would give with the reference's keys and values:
L_AD = |SA(Q, K, V) - SA(Q, Ks, Vs)|, where only the first term has a gradient. The content loss keeps the queries, |Q - Qc|.
Both are means over a layer's elements and sums over layers, and never divided by the number of images: every image has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gradient.watch import AttentionCall, Measurements
from ..networks.layers import AttentionLayer
from .regions import Regions

CallKey = tuple[str, int]  # layer, and which of its attention calls


def call_key(layer: AttentionLayer, call: AttentionCall) -> CallKey:
    return layer.name, call.index


@dataclass(frozen=True)
class Features:
    """Keys and values of all references in one attention call: (1, heads, tokens of all references, channels).

    Attributes:
        bias: added to the logits of each token, (tokens,): the logarithm of its reference's weight; None: all count alike.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None

    def of(self, tokens: Tensor) -> Features:
        """Return the same of some tokens."""
        return Features(self.k[:, :, tokens], self.v[:, :, tokens], None if self.bias is None else self.bias[tokens])


@dataclass
class DistillObjective:
    """The loss of one optimisation step, an ``Objective`` of ``ModelPass.gradient``.

    Attributes:
        features: of the references, for every call: one mapping for all images, or one for each image of the batch.
        content: queries of the content image, (batch, heads, tokens, channels).
        attn_scale: sharpens what the reference's attention picks.
        style_loss, content_loss: each image's own losses of the last pass, without weights, summed over layers.
    """

    features: Sequence[Mapping[CallKey, Features]]
    content: Mapping[CallKey, Tensor] | None = None
    content_weight: float = 0.0
    attn_scale: float = 1.0
    regions: Regions | None = None
    style_loss: dict[int, Tensor] = field(default_factory=dict)
    content_loss: dict[int, Tensor] = field(default_factory=dict)

    def measure(self, layer: AttentionLayer, call: AttentionCall, rows: Tensor) -> Tensor:
        """Return (2, images): style and content loss of one call."""
        key, inputs = call_key(layer, call), call.inputs
        if self.regions is not None:
            style = self._style_by_region(layer, call, rows)
        else:
            with torch.no_grad():
                ideal = self._ideal(key, inputs.q * self.attn_scale, inputs.scale, rows)
            style = _mean_distance(call.output, ideal, len(rows))
        if self.content is None:
            return torch.stack([style, torch.zeros_like(style)])
        queries = self.content[key]
        return torch.stack([style, _mean_distance(inputs.q, queries[rows] if len(rows) < len(queries) else queries, len(rows))])

    def _features(self, key: CallKey, image: int) -> Features:
        return self.features[image if len(self.features) > 1 else 0][key]

    def _ideal(self, key: CallKey, q: Tensor, scale: float, rows: Tensor) -> Tensor:
        """Return what the queries would get from the references of their image, (images * frames, heads, tokens, channels)."""
        if len(self.features) == 1:
            return _attention(q, self.features[0][key], scale)
        parts = zip(q.chunk(len(rows)), rows.tolist(), strict=True)
        return torch.cat([_attention(part, self._features(key, row), scale) for part, row in parts])

    def _style_by_region(self, layer: AttentionLayer, call: AttentionCall, rows: Tensor) -> Tensor:
        """Return (images,): the style loss where a query attends to its own label only, one unmasked attention per label."""
        assert self.regions is not None
        output, q = call.output, call.inputs.q
        losses = []
        for image, row in enumerate(rows.tolist()):
            features = self._features(call_key(layer, call), row)
            distance, queries = (output[image] * 0).float().sum(), 0
            for of_target, of_reference in self.regions.pairs(layer.name, row, output.device):
                with torch.no_grad():
                    own = q[image : image + 1, :, of_target] * self.attn_scale
                    ideal = _attention(own, features.of(of_reference), call.inputs.scale)
                distance = distance + (output[image, :, of_target].float() - ideal[0].float()).abs().sum()
                queries += len(of_target)
            losses.append(distance / max(queries * output.shape[1] * output.shape[3], 1))
        return torch.stack(losses)

    def loss(self, measurements: Measurements, rows: Tensor) -> Tensor:
        """Return (images,): style + content_weight * content."""
        style, content = torch.stack([losses for _, losses in measurements]).sum(0)
        for image, row in enumerate(rows.tolist()):
            self.style_loss[row], self.content_loss[row] = style[image].detach(), content[image].detach()
        return style + self.content_weight * content


def _attention(q: Tensor, features: Features, scale: float) -> Tensor:
    batch = (len(q), -1, -1, -1)
    k, v = features.k.to(q.dtype).expand(batch), features.v.to(q.dtype).expand(batch)
    bias = None if features.bias is None else features.bias.to(q)[None, None, None]
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def _mean_distance(x: Tensor, y: Tensor, images: int) -> Tensor:
    """Return (images,): mean |x - y|, in float32. (Frames of a video may be rows of their own.)"""
    return (x.float() - y.float()).abs().reshape(images, -1).mean(1)
