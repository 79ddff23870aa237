"""What a CONDITIONING carries about its prompt: metadata that ``Prompt with Subjects`` leaves there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from .encoder_rows import UnknownEncoder
from .syntax import Span
from .token_map import Token, TokenMap, WordTokens
from .tokenizing import tokenize

METADATA = "fovea"
_VERSION = 1


@dataclass(frozen=True)
class PromptInfo:
    """What is known of one entry of a CONDITIONING."""

    tokens: TokenMap
    subjects: list[WordTokens] = field(default_factory=list)
    length: int = 0  # rows of the conditioning now; more than the map's where a node joined something behind it


def metadata(clip: Any, text: str, subjects: Sequence[Span], conditioning_length: int) -> dict[str, Any]:
    """Return plain data for the dict of a conditioning of that many rows, under the key ``METADATA``."""
    info: dict[str, Any] = {"version": _VERSION, "text": text, "subjects": [list(span) for span in subjects]}
    try:
        tokens = tokenize(clip, text)
        if tokens.conditioning_length != conditioning_length:
            raise UnknownEncoder(
                f"This text encoder gave {conditioning_length} tokens where {tokens.conditioning_length} were expected, so "
                "words cannot be found. Another node may have changed how 'clip' encodes: connect it without that node."
            )
    except UnknownEncoder as error:
        return {**info, "error": str(error)}
    for span in subjects:
        tokens.within(span)  # a subject that has no tokens is the user's to know now
    info["tokens"] = [list(astuple(token)) for token in tokens.tokens]
    return {**info, "length": tokens.length, "conditioning_length": tokens.conditioning_length}


def prompt_infos(conditioning: Sequence[Any], clip: Any = None, text: str | None = None) -> list[PromptInfo]:
    """Return what is known of each entry of a CONDITIONING (or of the sampler's list of conds).

    It is read from the entry's metadata, else from ``clip`` and the ``text`` that was encoded with it.

    Raises:
        ValueError: nothing is known of an entry, or it was changed since; ``UnknownEncoder`` where its tokens cannot be told.
    """
    typed = tokenize(clip, text) if clip is not None and text else None
    return [_entry_info(entry, typed) for entry in conditioning]


def _entry_info(entry: Any, typed: TokenMap | None) -> PromptInfo:
    tensor, options = (entry.get("cross_attn"), entry) if isinstance(entry, dict) else entry
    stored = options.get(METADATA)
    if stored is not None:
        tokens, subjects = _restored(stored)
    elif typed is not None:
        tokens, subjects = typed, []
    else:
        raise ValueError(
            "Nothing is known of this prompt's words. Encode it with 'Prompt with Subjects', or connect 'clip' and write the "
            "same prompt in 'text'."
        )
    length = tokens.conditioning_length if tensor is None else tensor.shape[1]
    if length != tokens.conditioning_length:
        _check_changed_length(tokens, length, made_here=stored is not None)
    return PromptInfo(tokens, [tokens.within((start, end)) for start, end in subjects], length)


def _check_changed_length(tokens: TokenMap, length: int, made_here: bool) -> None:
    """Nodes that join text or image tokens put them behind, which moves nothing unless the model joins more itself."""
    if made_here and length > tokens.conditioning_length and tokens.length == tokens.conditioning_length:
        return
    raise ValueError(
        f"The conditioning has {length} tokens, but its prompt has {tokens.conditioning_length}. "
        + (
            "A node after 'Prompt with Subjects' changed its length; connect the prompt without that node."
            if made_here
            else "Write the prompt in 'text' exactly as it was encoded, with the same clip, or use 'Prompt with Subjects'."
        )
    )


def _restored(stored: dict[str, Any]) -> tuple[TokenMap, list[list[int]]]:
    if "error" in stored:
        raise UnknownEncoder(stored["error"])
    tokens = tuple(Token(*token) for token in stored["tokens"])
    return TokenMap(stored["text"], tokens, stored["length"], stored["conditioning_length"]), stored["subjects"]
