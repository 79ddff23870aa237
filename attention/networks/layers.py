"""Layers: the named attention of a network, and the blocks that can be recomputed from their inputs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, cast

import torch

from .blocks import Kind, actual_kind, block_layout
from .table import blocks_of, network_layout

LayerKind = Literal["self", "cross", "joint", "unknown"]


@dataclass(frozen=True)
class AttentionLayer:
    """A module whose attention calls belong to one named layer.

    Attributes:
        name: in the pack's syntax: "input.4", "output.3.1" (second transformer of the block), "middle", "double.7".
        skip: attention calls at the start of each forward that are not the text's (Wan i2v: image embedding).
    """

    name: str
    kind: LayerKind
    module: torch.nn.Module
    skip: int = 0


def check_differentiable(network: torch.nn.Module, technique: str) -> None:
    """Raises ``ValueError`` where ``technique`` needs a gradient and none can be taken through the network."""
    layout = network_layout(network)
    if layout is not None and layout.no_gradient:
        raise ValueError(
            f"{technique} cannot work with {type(network).__name__}: this model {layout.no_gradient}, so no gradient can be "
            "taken through it. Use another model."
        )


def attention_layers(network: torch.nn.Module) -> list[AttentionLayer]:
    """Return every layer of a network, in its order; a cross-attention block has a "self" and a "cross" one."""
    layout = network_layout(network)
    if layout is None:
        return _unknown_layers(network)
    if layout.family == "U-Net":
        return _unet_layers(network)
    if layout.family == "Stable Cascade":
        return _cascade_layers(network)
    layers: list[AttentionLayer] = []
    for attribute, prefix in layout.lists:
        for index, block in enumerate(blocks_of(network, attribute)):
            name = f"{prefix}.{index}"
            if layout.order is not None:
                layers.append(AttentionLayer(name, "joint", block))
            elif layout.attention is not None:
                to_itself, to_text = (block.get_submodule(attention) for attention in layout.attention)
                layers += [AttentionLayer(name, "self", to_itself), AttentionLayer(name, "cross", to_text)]
            else:
                layers += _block_layers(name, block)
    return layers


def _block_layers(name: str, block: torch.nn.Module) -> list[AttentionLayer]:
    """Return the attention modules of one block. (Of an audio-video block only the video's own, which come first.)"""
    layout = block_layout(block)
    if layout is None:
        return []
    layers = []
    for names, usual in ((layout.self_attention, "self"), (layout.cross_attention, "cross")):
        module = getattr(block, names[0], None) if names else None
        if module is not None:
            kind = actual_kind(block, names[0], cast(Kind, usual))
            if (usual, kind) == ("self", "cross"):
                continue  # it looks at the text a second time; the block's own cross-attention stands for both
            layers.append(AttentionLayer(name, kind, module, skip=int(hasattr(module, "k_img"))))
    return layers


_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.\d+)?\.transformer_blocks\.(\d+)")


def _unet_layers(network: torch.nn.Module) -> list[AttentionLayer]:
    """Return the spatial transformers; the temporal ones of a video U-Net attend between frames, not in the image."""
    found = [(match, block) for name, block in network.named_modules() if (match := _UNET_BLOCK.fullmatch(name))]
    depths = Counter(_unet_block(match) for match, _ in found)
    layers = []
    for match, block in found:
        name = _unet_block(match)
        layers += _block_layers(f"{name}.{match[3]}" if depths[name] > 1 else name, block)
    return layers


def _unet_block(match: re.Match[str]) -> str:
    side = match[1].split("_")[0]
    return side if side == "middle" else f"{side}.{match[2]}"


def _cascade_layers(network: torch.nn.Module) -> list[AttentionLayer]:
    layers = []
    for side in ("down", "up"):
        for name, module in cast(torch.nn.Module, getattr(network, f"{side}_blocks")).named_modules():
            if type(module).__name__ == "Attention2D":
                layers.append(AttentionLayer(f"{side}.{name.removesuffix('.attention')}", "joint", module))
    return layers


def _unknown_layers(network: torch.nn.Module) -> list[AttentionLayer]:
    """Return the longest list of blocks of a network that the table does not know, or the network itself."""
    lists = [(name, child) for name, child in network.named_children() if isinstance(child, torch.nn.ModuleList) and len(child)]
    if not lists:
        return [AttentionLayer("network", "unknown", network)]
    _, blocks = max(lists, key=lambda item: len(item[1]))
    return [AttentionLayer(f"block.{index}", "unknown", block) for index, block in enumerate(blocks)]


_UNET_CHECKPOINTS = ("ResBlock", "VideoResBlock", "BasicTransformerBlock")


def checkpoint_blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks of a network that can be computed again from their inputs, none inside another."""
    layout = network_layout(network)
    if layout is not None and layout.family == "U-Net":
        return [module for module in network.modules() if type(module).__name__ in _UNET_CHECKPOINTS]
    if layout is None or not layout.lists:
        return [layer.module for layer in _unknown_layers(network) if layer.module is not network]
    return [block for attribute, _ in layout.lists for block in blocks_of(network, attribute)]
