"""Blocks with a self- and a cross-attention of their own, and the attention modules in them (*sites*).

The table knows the blocks whose text enters through a cross-attention of its own; joint-attention networks (SD3, Flux,
Qwen-Image, ...) have no such site, and a class that is not in the table is treated as having none, never guessed from
attribute names (SD3's ``attn2`` is a self-attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .lookup import entry_of

Kind = Literal["self", "cross"]


@dataclass(frozen=True)
class BlockLayout:
    """The attention modules of one class of block.

    Attributes:
        self_attention, cross_attention: attribute names of the attention modules; each is called with the image tokens
            (batch, tokens, channels) as its first argument.
        projection: name of the last layer of such a module; its output is the module's result.
        returns_tuple: the module returns ``(result,)``.
        guided: it is also called for the tokens of a guide (a pose video), which are another number than the image's.
    """

    self_attention: tuple[str, ...]
    cross_attention: tuple[str, ...]
    projection: str
    returns_tuple: bool = False
    guided: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a network; ``returns_tuple`` and ``guided`` as in ``BlockLayout``."""

    name: str
    kind: Kind
    module: torch.nn.Module
    projection: torch.nn.Module
    returns_tuple: bool = False
    guided: bool = False

    def result(self, output: torch.Tensor) -> Any:
        """Return ``output`` in the form in which the module returns it."""
        return (output,) if self.returns_tuple else output


_WAN = BlockLayout(("self_attn",), ("cross_attn",), "o")

_LAYOUTS: dict[str, BlockLayout | None] = {
    "comfy.ldm.modules.attention.BasicTransformerBlock": BlockLayout(("attn1",), ("attn2",), "to_out"),  # SD1, SD2, SDXL, SVD
    "comfy.ldm.pixart.pixartms.PixArtMSBlock": BlockLayout(("attn",), ("cross_attn",), "proj"),
    "comfy.ldm.hydit.models.HunYuanDiTBlock": BlockLayout(("attn1",), ("attn2",), "out_proj", returns_tuple=True),
    "comfy.ldm.wan.model.WanAttentionBlock": _WAN,
    "comfy.ldm.wan.model.VaceWanAttentionBlock": _WAN,
    "comfy.ldm.wan.model.WanAttentionBlockAudio": _WAN,
    # Its self-attention is called in other ways than as a module, for each frame of the video.
    "comfy.ldm.wan.model_animate2.WanAnimate2Block": BlockLayout((), ("cross_attn",), "o", guided=True),
    "comfy.ldm.wan.ar_model.CausalWanAttentionBlock": None,  # its attention writes a key/value cache that a skip would miss
    "comfy.ldm.lightricks.model.BasicTransformerBlock": BlockLayout(("attn1",), ("attn2",), "to_out"),  # LTX-Video
    "comfy.ldm.lightricks.av_model.BasicAVTransformerBlock": BlockLayout(
        ("attn1", "audio_attn1"), ("attn2", "audio_attn2"), "to_out"
    ),
    "comfy.ldm.cosmos.predict2.Block": BlockLayout(("self_attn",), ("cross_attn",), "output_proj"),  # Cosmos-Predict2, Anima
}


def block_layout(block: torch.nn.Module) -> BlockLayout | None:
    """Return the layout of a block, or None where its class is not known."""
    return entry_of(type(block), _LAYOUTS, "block_layout")


def attention_sites(network: torch.nn.Module) -> list[AttentionSite]:
    """Return every self- and cross-attention of a network, in module order; empty for joint-attention and unknown networks."""
    sites = []
    layouts: dict[type, BlockLayout | None] = {}  # a network of a thousand modules has twenty classes
    for block_name, block in network.named_modules():
        if type(block) not in layouts:
            layouts[type(block)] = block_layout(block)
        layout = layouts[type(block)]
        if layout is None:
            continue
        by_kind: tuple[tuple[tuple[str, ...], Kind], ...] = ((layout.self_attention, "self"), (layout.cross_attention, "cross"))
        for names, kind in by_kind:
            for name in names:
                module = getattr(block, name, None)
                if module is None:
                    continue
                site_kind = actual_kind(block, name, kind)
                projection = getattr(module, layout.projection)
                special = layout.returns_tuple, layout.guided
                sites.append(AttentionSite(f"{block_name}.{name}", site_kind, module, projection, *special))
    return sites


def actual_kind(block: torch.nn.Module, name: str, usual: Kind) -> Kind:
    """U-Net blocks can be built with the two exchanged (``disable_self_attn``, ``switch_temporal_ca_to_sa``)."""
    if name == "attn1" and getattr(block, "disable_self_attn", False):
        return "cross"
    if name == "attn2" and getattr(block, "switch_temporal_ca_to_sa", False):
        return "self"
    return usual
