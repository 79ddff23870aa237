"""Where text and image tokens stand in the joint attention of each family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch


@dataclass(frozen=True)
class JointCall:
    """The lengths a joint attention call is cut by.

    Attributes:
        keys, queries: numbers of tokens in the attention; image: of them the image's own; text: rows of the context.
        network: for what only it knows (registers, padding, order).
        arguments: the other conditioning of the model call.
    """

    keys: int
    queries: int
    image: int
    text: int
    network: torch.nn.Module
    arguments: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return self.arguments.get(name) is not None


@dataclass(frozen=True)
class JointSpans:
    """Where text and image are among the keys.

    Attributes:
        repeated_text: a second copy of the last text tokens (HiDream's Llama features of one block).
        rows: the image among the queries, where not all tokens look and it is not the first of those that do.
    """

    text: slice
    image: slice
    repeated_text: slice | None = None
    rows: slice | None = None


JointOrder = Callable[[JointCall], JointSpans | None]


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def text_first(call: JointCall) -> JointSpans:
    """Place text, image, reference images."""
    return JointSpans(_span(0, call.text), _span(call.text, call.image))


def registers_first(call: JointCall) -> JointSpans:
    """Place the tokens of AuraFlow: registers, text, image."""
    registers = cast(torch.Tensor, call.network.register_tokens).shape[1]
    return JointSpans(_span(registers, call.text), _span(registers + call.text, call.image))


def padded_text_first(call: JointCall) -> JointSpans | None:
    """Place Lumina 2's and Z-Image's text and image, each padded to a multiple; unknown with reference images."""
    if call.has("ref_latents"):
        return None
    multiple = getattr(call.network, "pad_tokens_multiple", None) or 1
    return JointSpans(_span(0, call.text), _span(math.ceil(call.text / multiple) * multiple, call.image))


def image_last(call: JointCall) -> JointSpans:
    """Place the tokens of OmniGen2: text, reference images, image. MiniMax H3: text, reference images and sound, sound, image."""
    return JointSpans(_span(0, call.text), _span(call.keys - call.image, call.image))


def image_then_text(call: JointCall) -> JointSpans:
    """Place the tokens of Stable Cascade's keys: image, text, pooled text, images. (Its queries are image tokens only.)"""
    return JointSpans(_span(call.image, call.text), _span(0, call.image))


def text_last(call: JointCall) -> JointSpans:
    """Place the tokens of ERNIE-Image, Lens, JoyImage: image, reference images, text."""
    return JointSpans(_span(call.keys - call.text, call.text), _span(0, call.image))


def cut_text_last(call: JointCall) -> JointSpans:
    """Place the tokens of Mochi: image, and the text without its padding."""
    return JointSpans(_span(call.image, call.keys - call.image), _span(0, call.image))


def boogu(call: JointCall) -> JointSpans | None:
    """Place Boogu's text and image. With reference images a second attention, of images only, looks the same."""
    return None if call.has("ref_latents") else image_last(call)


def pixeldit(call: JointCall) -> JointSpans:
    """Place PixelDiT's text, cut to the length that the network was made for, and image."""
    text = min(call.text, cast(int, call.network.txt_max_length))
    return JointSpans(_span(0, text), _span(text, call.image))


def hidream(call: JointCall) -> JointSpans | None:
    """Place HiDream's image, T5 text, the last Llama layer's text, and that of the block's own Llama layer."""
    llama = call.arguments.get("encoder_hidden_states_llama3")
    if llama is None or call.has("image_cond"):
        return None
    text = call.text + llama.shape[-2]
    return JointSpans(_span(call.image, text), _span(0, call.image), _span(call.image + text, llama.shape[-2]))


def hunyuan_video(call: JointCall) -> JointSpans | None:
    """Place the tokens of HunyuanVideo: text and image; 0.3.75 has the image first.

    Version 1.5 puts vision and glyph tokens before the text, 2.1 glyphs behind it.
    """
    blocks = cast(torch.nn.ModuleList, call.network.double_blocks)
    others_first = getattr(call.network, "cond_type_embedding", None) is not None
    if not getattr(blocks[0], "flipped_img_txt", False):
        start = call.keys - call.image
        reference = call.has("ref_latent")
        if others_first and reference:
            return None
        return JointSpans(_span(start - call.text if others_first else 0, call.text), _span(start, call.image))
    if call.has("ref_latent"):
        return None
    return JointSpans(_span(call.keys - call.text if others_first else call.image, call.text), _span(0, call.image))


def cached_text_first(call: JointCall) -> JointSpans:
    """Place HiDream-O1's text, image, reference images. Most of the causal text is kept over the steps and does not look."""
    return JointSpans(
        _span(0, call.text), _span(call.text, call.image), rows=_span(call.text - (call.keys - call.queries), call.image)
    )
