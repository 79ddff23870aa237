"""Which characters of a prompt each of an encoder's tokens covers.

The tokens' texts come from the tokenizer's own vocabulary; they are laid along the prompt after both sides were reduced
to the same form (case, width and white space do not matter), so nothing here knows how a tokenizer splits words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from os.path import commonprefix
from typing import Any

from .syntax import Span

Piece = bytes | None  # the UTF-8 bytes of a token's text; None where the vocabulary has only "unknown"

# How vocabularies write a space: what SentencePiece and byte-level BPE are told by.
_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_LEVEL_SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"


def piece_reader(tokenizer: Any) -> Callable[[int], Piece]:
    """Return token id -> its bytes, for one of ComfyUI's ``SDTokenizer`` objects."""
    vocabulary: dict[int, str] = tokenizer.inv_vocab
    marks = {_SENTENCEPIECE_SPACE, _BYTE_LEVEL_SPACE, "[UNK]"}.intersection(vocabulary.values())
    if _SENTENCEPIECE_SPACE in marks:
        decode = _sentencepiece
    elif _BYTE_LEVEL_SPACE in marks:
        decode = _byte_level
    elif "[UNK]" in marks:
        decode = _wordpiece
    else:
        decode = _plain
    return lambda token: decode(vocabulary[token]) if token in vocabulary else None


def _plain(piece: str) -> Piece:
    return piece.encode()


def _sentencepiece(piece: str) -> Piece:
    if piece == "<unk>":
        return None
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_SENTENCEPIECE_SPACE, " ").encode()


def _wordpiece(piece: str) -> Piece:
    return None if piece == "[UNK]" else piece.removeprefix("##").encode()


def _byte_level(piece: str) -> Piece:
    table = _byte_alphabet()
    return b"".join(bytes([table[char]]) if char in table else char.encode() for char in piece.removesuffix("</w>"))


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the printable stand-ins that byte-level vocabularies (GPT-2's scheme) use for bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in printable]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _comparable(text: str) -> tuple[str, list[int]]:
    """Return ``text`` without case, width and white space, and the index of the character that each result comes from."""
    chars: list[str] = []
    origin: list[int] = []
    for index, char in enumerate(text):
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
        kept = [c for c in folded if not c.isspace() and unicodedata.category(c) != "Cc"]
        chars += kept
        origin += [index] * len(kept)
    return "".join(chars), origin


def _decode(pieces: Sequence[Piece]) -> tuple[str, list[Span]]:
    """Return the pieces' text, and for each character the range of pieces that its bytes come from."""
    stream = [(byte, index) for index, piece in enumerate(pieces) if piece for byte in piece]
    chars: list[str] = []
    owners: list[Span] = []
    at = 0
    while at < len(stream):
        size = _utf8_length(stream[at][0])
        try:
            char = bytes(byte for byte, _ in stream[at : at + size]).decode()
        except UnicodeDecodeError:
            char, size = "\ufffd", 1
        chars.append(char)
        owners.append((stream[at][1], stream[min(at + size, len(stream)) - 1][1] + 1))
        at += size
    return "".join(chars), owners


def _utf8_length(lead: int) -> int:
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def comparable_text(pieces: Sequence[Piece]) -> str:
    return _comparable(_decode(pieces)[0])[0]


def template_around(one: Sequence[Piece], other: Sequence[Piece]) -> tuple[str, str]:
    """Return what an encoder writes before and after every prompt, in comparable form, from the tokens of two unlike prompts."""
    texts = [comparable_text(one), comparable_text(other)]
    before = commonprefix(texts)
    after = commonprefix([text[len(before) :][::-1] for text in texts])[::-1]
    return before, after


def agreement(pieces: Sequence[Piece], text: str, template: tuple[str, str]) -> float:
    """Return how well the pieces spell ``text``: 1 is exactly."""
    theirs = _without(comparable_text(pieces), template)
    ours = _comparable(text)[0]
    return 1.0 if theirs == ours else SequenceMatcher(None, theirs, ours, autojunk=False).ratio()


def _without(text: str, template: tuple[str, str]) -> str:
    before, after = template
    text = text.removeprefix(before)
    return text.removesuffix(after) if after else text


def align(pieces: Sequence[Piece], text: str, template: tuple[str, str] = ("", "")) -> list[Span | None]:
    """Return the span of ``text`` that each piece covers; None for white space and for the template."""
    decoded, owners = _decode(pieces)
    theirs, their_origin = _comparable(decoded)
    ours, our_origin = _comparable(text)
    body = _without(theirs, template)
    skipped = len(template[0]) if theirs.startswith(template[0]) else 0

    covered: list[list[int]] = [[] for _ in pieces]
    for their_start, our_start, size in _matches(body, ours):
        for offset in range(size):
            char = our_origin[our_start + offset]
            for piece in range(*owners[their_origin[skipped + their_start + offset]]):
                covered[piece].append(char)
    inside = [index for place in range(skipped, skipped + len(body)) for index in range(*owners[their_origin[place]])]
    unspelt = sorted({*inside, *(index for index, piece in enumerate(pieces) if piece is None)})
    spans: list[Span | None] = [(min(chars), max(chars) + 1) if chars else None for chars in covered]
    return _fill_gaps(spans, [index for index in unspelt if spans[index] is None], text)


def _matches(theirs: str, ours: str) -> list[tuple[int, int, int]]:
    if theirs == ours:
        return [(0, 0, len(ours))]
    blocks = SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks()
    return [(block.a, block.b, block.size) for block in blocks]


def _fill_gaps(spans: list[Span | None], unspelt: list[int], text: str) -> list[Span | None]:
    """Give pieces whose text is not the prompt's (unknown or rewritten characters) what lies between their neighbours."""
    filled = list(spans)
    for index in unspelt:
        start = max((span[1] for span in spans[:index] if span), default=0)
        end = min((span[0] for span in spans[index + 1 :] if span), default=len(text))
        gap = text[start:end]
        if gap.strip():
            filled[index] = (start + len(gap) - len(gap.lstrip()), start + len(gap.rstrip()))
    return filled
