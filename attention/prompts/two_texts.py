"""SDXL's two texts: one for each of its encoders, whose tokens share the rows of the conditioning."""

from __future__ import annotations

from typing import Any

from .conditioning import METADATA, metadata
from .syntax import parse_subjects
from .token_map import TokenMap
from .tokenizing import token_map

_ENCODERS = {"g", "l"}


def encode_two_texts(clip: Any, text_g: str, text_l: str, **sizes: int) -> list[Any]:
    """Return the CONDITIONING of ComfyUI's CLIPTextEncodeSDXL for the texts without brackets, with ``METADATA``.

    Its words are those of both texts. Its subjects are those marked in ``text_g``; where it has none, those of ``text_l``: a row
    has a token of each text, so that a subject of both would be two.

    Args:
        sizes: ``width``, ``height``, ``crop_w``, ``crop_h``, ``target_width``, ``target_height`` in pixels.

    Raises:
        ValueError: brackets that cannot be read, or a text encoder that is not SDXL's.
    """
    plain_g, marked_g = parse_subjects(text_g)
    plain_l, marked_l = parse_subjects(text_l)
    conditioning = clip.encode_from_tokens_scheduled(_tokens(clip, plain_g, plain_l), add_dict=sizes)
    rows = conditioning[0][0]
    if plain_g == plain_l:
        known = metadata(clip, plain_g, marked_g or marked_l, rows.shape[1], rows)
    else:
        both, begin = _together(plain_g, plain_l)
        marked = marked_g or [(start + begin, end + begin) for start, end in marked_l]

        def read(clip: Any, text: str) -> TokenMap:
            parts = {"g": (0, plain_g), "l": (begin, plain_l)}
            return token_map(clip, _tokens(clip, plain_g, plain_l, return_word_ids=True), text, parts)

        known = metadata(clip, both, marked, rows.shape[1], rows, read)
    return [[encoded, {**options, METADATA: known}] for encoded, options in conditioning]


def _together(text_g: str, text_l: str) -> tuple[str, int]:
    """Return both texts as one, and where the second one begins."""
    return f"{text_g}\n{text_l}", len(text_g) + 1


def _tokens(clip: Any, text_g: str, text_l: str, **options: Any) -> dict[str, Any]:
    """Return the tokens of both texts, in as many chunks each."""
    tokens = clip.tokenize(text_g, **options)
    if not isinstance(tokens, dict) or set(tokens) != _ENCODERS:
        raise ValueError(
            "clip: this text encoder does not read two texts as SDXL's does. Use 'Prompt with Subjects', or connect the clip of "
            "an SDXL checkpoint."
        )
    tokens["l"] = clip.tokenize(text_l, **options)["l"]
    empty = clip.tokenize("", **options)
    for name in _ENCODERS:
        while len(tokens[name]) < max(len(chunks) for chunks in tokens.values()):
            tokens[name] = tokens[name] + empty[name]
    return tokens
