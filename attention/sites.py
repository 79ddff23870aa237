"""Where a network attends: its attention modules, by family.

A *site* is one attention module inside one block. The table knows the blocks whose text enters through a cross-attention
of its own; joint-attention networks (SD3, Flux, Qwen-Image, ...) have no such site, and a class that is not in the table
is treated as having none, never guessed from attribute names (SD3's ``attn2`` is a self-attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["self", "cross"]


@dataclass(frozen=True)
class BlockLayout:
    """The attention modules of one class of block.

    Attributes:
        self_attention, cross_attention: attribute names of the attention modules; each is called with the image tokens
            (batch, tokens, channels) as its first argument.
        projection: name of the last layer of such a module; its output is the module's result.
        returns_tuple: the module returns ``(result,)``.
    """

    self_attention: tuple[str, ...]
    cross_attention: tuple[str, ...]
    projection: str
    returns_tuple: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a network."""

    name: str
    kind: Kind
    module: torch.nn.Module
    projection: torch.nn.Module
    returns_tuple: bool = False

    def result(self, output: torch.Tensor) -> Any:
        """``output`` in the form in which the module returns it."""
        return (output,) if self.returns_tuple else output


# Keyed by the class's module and name, so that the table imports no model code; subclasses are found through the MRO.
_LAYOUTS: dict[str, BlockLayout | None] = {
    "comfy.ldm.modules.attention.BasicTransformerBlock": BlockLayout(("attn1",), ("attn2",), "to_out"),  # SD1, SD2, SDXL, SVD
    "comfy.ldm.pixart.pixartms.PixArtMSBlock": BlockLayout(("attn",), ("cross_attn",), "proj"),
    "comfy.ldm.hydit.models.HunYuanDiTBlock": BlockLayout(("attn1",), ("attn2",), "out_proj", returns_tuple=True),
    "comfy.ldm.wan.model.WanAttentionBlock": BlockLayout(("self_attn",), ("cross_attn",), "o"),
    "comfy.ldm.wan.ar_model.CausalWanAttentionBlock": None,  # its attention writes a key/value cache that a skip would miss
    "comfy.ldm.lightricks.model.BasicTransformerBlock": BlockLayout(("attn1",), ("attn2",), "to_out"),  # LTX-Video
    "comfy.ldm.lightricks.av_model.BasicAVTransformerBlock": BlockLayout(
        ("attn1", "audio_attn1"), ("attn2", "audio_attn2"), "to_out"
    ),
    "comfy.ldm.cosmos.predict2.Block": BlockLayout(("self_attn",), ("cross_attn",), "output_proj"),  # Cosmos-Predict2, Anima
}


def block_layout(block: torch.nn.Module) -> BlockLayout | None:
    """The layout of a block, or None where the table does not know its class."""
    for cls in type(block).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in _LAYOUTS:
            return _LAYOUTS[name]
    return None


def attention_sites(network: torch.nn.Module) -> list[AttentionSite]:
    """Every self- and cross-attention of a network, in module order; empty for joint-attention and unknown networks."""
    sites = []
    for block_name, block in network.named_modules():
        layout = block_layout(block)
        if layout is None:
            continue
        for names, kind in ((layout.self_attention, "self"), (layout.cross_attention, "cross")):
            for name in names:
                module = getattr(block, name, None)
                if module is None:
                    continue
                site_kind = _actual_kind(block, name, kind)
                projection = getattr(module, layout.projection)
                sites.append(AttentionSite(f"{block_name}.{name}", site_kind, module, projection, layout.returns_tuple))
    return sites


def _actual_kind(block: torch.nn.Module, name: str, usual: Kind) -> Kind:
    """U-Net blocks can be built with the two exchanged (``disable_self_attn``, ``switch_temporal_ca_to_sa``)."""
    if name == "attn1" and getattr(block, "disable_self_attn", False):
        return "cross"
    if name == "attn2" and getattr(block, "switch_temporal_ca_to_sa", False):
        return "self"
    return usual


def has_cross_attention(network: torch.nn.Module) -> bool:
    """Whether text enters this network through cross-attention modules that the table knows."""
    return any(site.kind == "cross" for site in attention_sites(network))
