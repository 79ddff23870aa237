"""The layers whose maps are guided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..networks.grids import layer_grid
from ..networks.layer_names import parse_layers
from ..networks.layers import AttentionLayer, attention_layers, check_differentiable
from ..networks.table import network_layout
from .settings import ExciteSettings

# Levels of a network are the same for every size of image.
_NOMINAL_LATENT = (64, 64)


def check_network(network: torch.nn.Module) -> None:
    """Raises ``ValueError`` where there is no attention to text that could be guided."""
    layout = network_layout(network)
    if layout is None or layout.patch is None and layout.family != "U-Net":
        raise ValueError(
            f"Attend-and-Excite cannot guide {type(network).__name__}: it is not known where this model looks at its text. "
            "Use a U-Net (SD1.5, SD2, SDXL), PixArt, HunyuanDiT, SD3, Flux, Lumina 2 or Qwen-Image model."
        )
    check_differentiable(network, "Attend-and-Excite")
    if not any(layer.kind in ("cross", "joint") for layer in attention_layers(network)):
        raise ValueError(
            f"Attend-and-Excite cannot guide {type(network).__name__}: this model has no attention to text (it draws classes, "
            "not prompts). Use a model with a text prompt."
        )


@dataclass(frozen=True)
class GuidedLayers:
    """The layers to look at, and the grid that their maps are averaged down to (None: they have it)."""

    layers: list[AttentionLayer]
    grid: tuple[int, int] | None


def guided_layers(network: torch.nn.Module, latent: Sequence[int], settings: ExciteSettings) -> GuidedLayers:
    """U-Nets: every cross-attention of the wanted level. Transformers, whose layers all have one grid: their middle half.

    Where no level has the wanted grid, the next finer one is averaged down to it (or the finest there is is taken). Settings
    can name the layers that are left to choose from.
    """
    check_network(network)
    layout = network_layout(network)
    every = attention_layers(network)
    grids = {layer.name: layer_grid(network, layout, layer.name, latent) for layer in every if layer.kind in ("cross", "joint")}
    sides = {name: max(grid[1:]) for name, grid in grids.items() if grid is not None}
    if not sides:
        raise ValueError(f"Attend-and-Excite cannot guide a latent of shape {tuple(latent)} in {type(network).__name__}.")
    allowed = parse_layers(settings.layers, list(sides))
    wanted = settings.attention_grid or math.ceil(max(latent[-2:]) / 4)
    side = min((sides[name] for name in allowed if sides[name] >= wanted), default=max(sides[name] for name in allowed))
    names = [name for name in allowed if sides[name] == side]
    if layout is not None and layout.family != "U-Net" and not settings.layers.strip():
        names = names[len(names) // 4 : max(math.ceil(len(names) * 3 / 4), 1)]
    kinds = ("cross", "joint", "self") if settings.losses.self_overlap else ("cross", "joint")
    layers = [layer for layer in every if layer.name in names and layer.kind in kinds]
    grid = None
    if side > wanted:
        grid = math.ceil(latent[-2] * wanted / max(latent[-2:])), math.ceil(latent[-1] * wanted / max(latent[-2:]))
    return GuidedLayers(layers, grid)


def guided_names(network: torch.nn.Module, settings: ExciteSettings) -> str:
    """Return the layers that are guided, in the syntax of ``layer_names``; all candidates where the latent's size decides.

    Raises:
        ValueError: ``layers`` names one that the network does not have.
    """
    layers = guided_layers(network, (1, 4, *_NOMINAL_LATENT), settings).layers
    return settings.layers if settings.attention_grid else ", ".join(dict.fromkeys(layer.name for layer in layers))
