"""Layers, iterations and learning rates of the authors' code for SD1.5, SDXL and Flux (arXiv:2502.20235)."""

from __future__ import annotations

import torch

from ..networks.layer_names import parse_layers
from ..networks.layers import AttentionLayer, attention_layers, check_differentiable
from ..networks.table import network_layout
from .settings import Method

# Self-attentions at the end of the network: 10 to 15 of 16 (SD1.5), 64 to 69 of 70 (SDXL); 50 to 56 of 57 (Flux), an eighth.
_UNET_LAYERS = 6
_SHARE_OF_TRANSFORMER = 1 / 8
_LEAST_LAYERS = 3
_SD1_LAYERS = 16


def distilled_layers(network: torch.nn.Module, text: str = "") -> list[AttentionLayer]:
    """Return the layers that ``text`` names, or the published ones for the network; by their rule where none were published.

    Raises:
        ValueError: a name that the network does not have, or a network whose self-attention is not known.
    """
    layers = [layer for layer in attention_layers(network) if layer.kind in ("self", "joint")]
    if not layers:
        raise ValueError(
            f"Attention Distillation does not know where {type(network).__name__} attends to the image. It works with "
            "SD1.5, SD2, SDXL and Flux, and as an experiment with the other models that Capture Attention Maps can show."
        )
    layout = network_layout(network)
    check_differentiable(network, "Attention Distillation")
    if text.strip():
        names = set(parse_layers(text, list(dict.fromkeys(layer.name for layer in layers))))
        return [layer for layer in layers if layer.name in names]
    if layout is not None and layout.family == "U-Net":
        return [layer for layer in layers if layer.name.startswith("output")][-_UNET_LAYERS:]
    return layers[-max(round(len(layers) * _SHARE_OF_TRANSFORMER), _LEAST_LAYERS) :]


def published(network: torch.nn.Module, method: Method, *, flow: bool) -> tuple[int, float]:
    """Return iterations per step and learning rate: the authors' defaults for SD1.5, SDXL and Flux, and of these the nearest."""
    if method is Method.OPTIMISE:
        return 1, 0.05
    if flow:
        return 2, 0.01
    layout = network_layout(network)
    attentions = sum(layer.kind == "self" for layer in attention_layers(network))
    small = layout is not None and layout.family == "U-Net" and attentions <= _SD1_LAYERS
    return (3 if small else 2), 0.015
