"""Making a ``TokenMap``: where the tokens of a text are once a CLIP has encoded it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .alignment import Piece, agreement, align, piece_reader, template_around
from .encoder_rows import HostTokens, RawToken, UnknownEncoder, context_rows, raw_tokens
from .syntax import Reading, Span, embedding_names, readings
from .token_map import Token, TokenMap


def tokenize(clip: Any, text: str) -> TokenMap:
    """Return where the tokens of ``text`` are once ``clip`` has encoded it.

    Raises:
        UnknownEncoder: that cannot be told for this encoder.
    """
    return token_map(clip, _host_tokens(clip, text), text)


def token_map(clip: Any, host_tokens: HostTokens, text: str, parts: Mapping[str, tuple[int, str]] | None = None) -> TokenMap:
    """Return where the tokens of ``text`` are once ``clip`` has encoded ``host_tokens`` (with word ids).

    Args:
        parts: what each encoder reads of the text, and where it begins; none: all of it.

    Raises:
        UnknownEncoder: that cannot be told for this encoder.
    """
    rows = context_rows(clip.cond_stage_model, host_tokens)
    raw = raw_tokens(host_tokens)
    seen = {raw[index].encoder for row in rows.rows for index in row}
    known: dict[int, tuple[str, Span | None, str]] = {}
    for encoder in seen:
        first, part = (parts or {}).get(encoder, (0, text))
        for index, (label, span, kind) in _described(clip, encoder, raw, part).items():
            known[index] = label, span and (span[0] + first, span[1] + first), kind
    tokens: list[Token] = []
    for position, row in enumerate(rows.rows):
        same: set[tuple[Any, ...]] = set()
        for index in reversed(row):  # SDXL: the small encoder's padding has the better name
            label, span, kind = known[index]
            start, end = span or (0, 0)
            if (start, end, kind) not in same:
                same.add((start, end, kind))
                tokens.append(Token(position, label, start, end, kind, raw[index].encoder))
    return TokenMap(text, tuple(tokens), len(rows.rows), rows.conditioning_length)


def _host_tokens(clip: Any, text: str) -> HostTokens:
    tokens = clip.tokenize(text, return_word_ids=True)
    return tokens if isinstance(tokens, dict) else {"": tokens}


def _sub_tokenizer(clip: Any, encoder: str) -> Any:
    tokenizer = clip.tokenizer
    for name in (encoder, f"clip_{encoder}"):
        if name and hasattr(getattr(tokenizer, name, None), "inv_vocab"):
            return getattr(tokenizer, name)
    if hasattr(tokenizer, "inv_vocab"):
        return tokenizer
    raise UnknownEncoder(
        f"The tokenizer of this text encoder ({type(tokenizer).__name__}) has no vocabulary Fovea can read, so the words of a "
        "prompt cannot be found. Use views that need no words, or a model with another text encoder."
    )


def _described(clip: Any, encoder: str, raw: list[RawToken], text: str) -> dict[int, tuple[str, Span | None, str]]:
    """Return for each raw token of one encoder its readable text, span and kind."""
    tokenizer = _sub_tokenizer(clip, encoder)
    read = piece_reader(tokenizer)
    kinds = _special_kinds(tokenizer, [(i, token) for i, token in enumerate(raw) if token.encoder == encoder])
    described: dict[int, tuple[str, Span | None, str]] = {
        index: (f"<{kind}>", None, kind) for index, kind in kinds.items() if kind in ("start", "end", "pad")
    }
    written = [index for index, kind in kinds.items() if kind == "text"]
    vectors = [index for index, kind in kinds.items() if kind == "embedding"]
    pieces = [read(raw[index].value) for index in written]
    template = _template(clip, encoder, read, tokenizer, pieces, text)
    groups = _groups(raw, vectors)
    reading = max(readings(text), key=lambda r: agreement(pieces, _without_names(r, tokenizer, groups)[0], template))
    remaining, origin, names = _without_names(reading, tokenizer, groups)

    for index, piece, span in zip(written, pieces, align(pieces, remaining, template), strict=True):
        if span is None:
            kind = "space" if piece is not None and not piece.strip() else "template" if any(template) else "text"
            described[index] = (_readable(piece), None, kind)
        else:
            covered = (origin[span[0]], _after(text, origin[span[1] - 1]))
            described[index] = (_readable(piece) or text[slice(*covered)], covered, "text")
    for group, name in zip(groups, names, strict=True):
        covered_name = None if name is None else (reading.origin[name[0]], reading.origin[name[1] - 1] + 1)
        label = "<embedding>" if name is None else reading.chars[slice(*name)]
        described.update({index: (label, covered_name, "embedding") for index in group})
    return described


def _after(text: str, char: int) -> int:
    return char + 2 if text[char : char + 2] in ("\\(", "\\)") else char + 1


def _readable(piece: Piece) -> str:
    try:
        return (piece or b"").decode().strip()
    except UnicodeDecodeError:  # a part of a character
        return ""


def _special_kinds(tokenizer: Any, tokens: list[tuple[int, RawToken]]) -> dict[int, str]:
    """Raw index -> start, end, pad, text or embedding."""
    kinds: dict[int, str] = {}
    chunk, ended = -1, False
    for index, token in tokens:
        if token.chunk != chunk:
            chunk, ended, first = token.chunk, False, True
        special = {tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token}
        if torch.is_tensor(token.value):
            kind = "embedding"
        elif token.group or (token.group is None and token.value not in special):
            kind = "text"
        elif token.value == tokenizer.start_token and first:
            kind = "start"
        elif token.value == tokenizer.end_token and not ended:
            kind, ended = "end", True
        else:
            kind = "pad"
        kinds[index], first = kind, False
    return kinds


def _template(clip: Any, encoder: str, read: Any, tokenizer: Any, pieces: Sequence[Piece], text: str) -> tuple[str, str]:
    """Return what the tokenizer writes around every prompt: chat templates of language models."""
    if any(agreement(pieces, reading.chars, ("", "")) == 1.0 for reading in readings(text)):
        return "", ""
    spelt = []
    for sentinel in ("7", "x"):
        raw = raw_tokens({encoder: _host_tokens(clip, sentinel)[encoder]})
        kinds = _special_kinds(tokenizer, list(enumerate(raw)))
        spelt.append([read(token.value) for index, token in enumerate(raw) if kinds[index] == "text"])
    return template_around(*spelt)


def _groups(raw: list[RawToken], vectors: list[int]) -> list[list[int]]:
    """Vectors of one embedding together."""
    groups: list[list[int]] = []
    for index in vectors:
        if groups and groups[-1][-1] == index - 1 and raw[index - 1].group == raw[index].group:
            groups[-1].append(index)
        elif groups and raw[index].group is not None and raw[groups[-1][-1]].group == raw[index].group:
            groups[-1].append(index)  # cut in two by the end of a chunk
        else:
            groups.append([index])
    return groups


def _without_names(reading: Reading, tokenizer: Any, groups: list[list[int]]) -> tuple[str, list[int], list[Span | None]]:
    """Return the text that is left beside the embeddings that were found, its origin, and each embedding's name."""
    names: list[Span | None] = list(_found_names(reading, tokenizer, len(groups)))
    if len(names) != len(groups):
        names = [None] * len(groups)
    inside = {char for name in names if name for char in range(*name)}
    kept = [char for char in range(len(reading.chars)) if char not in inside]
    return "".join(reading.chars[char] for char in kept), [reading.origin[char] for char in kept], names


def _found_names(reading: Reading, tokenizer: Any, count: int) -> list[Span]:
    if count == 0:
        return []
    written = embedding_names(reading)
    if len(written) == count:
        return written
    return [name for name in written if _is_embedding(tokenizer, reading.chars[slice(*name)])]


def _is_embedding(tokenizer: Any, name: str) -> bool:
    """Return whether ComfyUI has this embedding; one it has not is left out of the prompt."""
    return any(torch.is_tensor(token[0]) for chunk in tokenizer.tokenize_with_weights(name) for token in chunk)
