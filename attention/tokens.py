"""Words of a prompt -> positions of their tokens among the text tokens that a model attends to.

``tokenize`` makes a ``TokenMap`` for one prompt and one CLIP. A position is a row of the conditioning (its dimension 1);
models that join more text behind it (HunyuanDiT's mT5, HiDream's Llama) count on from there. A word of a prompt that
several encoders read one after the other (SD3) has positions in each of them. Spans are characters of the prompt as it is
encoded, see ``prompt_text``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch

from .prompt_text import (
    EMBEDDING,
    Reading,
    Span,
    atoms,
    embedding_names,
    joined_words,
    key,
    parse_subjects,
    readings,
)
from .token_rows import HostTokens, RawToken, UnknownEncoder, context_rows, raw_tokens
from .token_text import Piece, agreement, align, piece_reader, template_around

__all__ = [
    "METADATA",
    "PromptInfo",
    "Token",
    "TokenMap",
    "UnknownEncoder",
    "WordTokens",
    "fold",
    "metadata",
    "parse_subjects",
    "prompt_info",
    "prompt_infos",
    "tokenize",
]

METADATA = "fovea"
_VERSION = 1
_LISTED_WORDS = 40

# --- what is where ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One text token in the context. ``kind``: text, space, embedding, template (not the user's words), start, end, pad."""

    position: int
    text: str
    start: int
    end: int  # == start where it covers nothing of the prompt
    kind: str
    encoder: str


@dataclass(frozen=True)
class WordTokens:
    """A word or phrase where it occurs in the prompt. ``occurrence`` counts from 1."""

    word: str
    occurrence: int
    start: int
    end: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one prompt in context order. SDXL's two encoders share positions, so a position may come twice."""

    text: str
    tokens: tuple[Token, ...]
    length: int  # text tokens in the context
    conditioning_length: int  # of them, rows of the conditioning tensor

    def find(self, words: str) -> list[WordTokens]:
        """Every occurrence of a word or phrase; ``cat#2`` is the second one. Case and punctuation do not matter."""
        phrase, number = _split_number(words)
        found = self._occurrences(phrase)
        if not found:
            raise ValueError(self._missing(phrase))
        if number is None:
            return found
        if not 1 <= number <= len(found):
            raise ValueError(
                f"'{words}' asks for occurrence {number}, but '{phrase}' occurs {_times(len(found))} in the prompt. "
                f"Write a number from 1 to {len(found)}, or leave '#{number}' out to use every occurrence."
            )
        return [found[number - 1]]

    def words(self) -> list[str]:
        """The words that have tokens, in order, each once."""
        words: dict[str, str] = {}
        for word in joined_words(self.text, self._atoms):
            name = self.text[word[0][0] : word[-1][1]]
            words.setdefault(key(name), name)
        return list(words.values())

    def resolve(self, words: str, *, allow_positions: bool = False) -> list[WordTokens]:
        """A comma separated list of words and phrases or, where allowed, of token positions such as ``2, 5``."""
        wanted = [item.strip() for item in words.split(",") if item.strip()]
        if allow_positions and wanted and all(item.isdecimal() for item in wanted):
            return [self.at(int(item)) for item in wanted]
        return [occurrence for item in wanted for occurrence in self.find(item)]

    def at(self, position: int) -> WordTokens:
        """The token at one position."""
        if not 0 <= position < self.length:
            raise ValueError(
                f"Token position {position} is outside this prompt, which has {self.length} tokens (0 to {self.length - 1}). "
                f"Use words instead: {self._listing()}"
            )
        token = next((token for token in self.tokens if token.position == position), None)
        if token is None:
            return WordTokens(f"#{position}", 1, 0, 0, (position,))
        return WordTokens(token.text, 1, token.start, token.end, (position,))

    def within(self, span: Span) -> WordTokens:
        """The words inside a span of the prompt (a marked subject), taken together."""
        start, end = span
        inside = [atom for atom in self._atoms if atom[0] < end and atom[1] > start]
        name = " ".join(self.text[word[0][0] : word[-1][1]] for word in joined_words(self.text, inside))
        positions = self._positions(inside or [span])
        if not positions:
            raise ValueError(self._missing(self.text[start:end]))
        same = self._occurrences(name)
        occurrence = sum(other.start <= (inside[0][0] if inside else start) for other in same)
        return WordTokens(name or self.text[start:end], max(occurrence, 1), start, end, positions)

    @cached_property
    def _covering(self) -> list[Token]:
        return [token for token in self.tokens if token.end > token.start and token.kind in ("text", "embedding")]

    @cached_property
    def _atoms(self) -> list[Span]:
        """The smallest words that have tokens: a weight's digits are in the prompt's text but have none."""
        return [span for span in self._all_atoms if self._positions([span])]

    @cached_property
    def _all_atoms(self) -> list[Span]:
        names = {token.start for token in self._covering if token.kind == "embedding"}
        return [span for span in atoms(self.text) if span[0] not in names or not self.text.startswith(EMBEDDING, span[0])]

    @cached_property
    def _touching(self) -> dict[int, list[int]]:
        """Character -> positions of the tokens that cover it."""
        touching: dict[int, list[int]] = {}
        for token in self._covering:
            for char in range(token.start, token.end):
                touching.setdefault(char, []).append(token.position)
        return touching

    def _positions(self, spans: Iterable[Span]) -> tuple[int, ...]:
        chars = (char for start, end in spans for char in range(start, end))
        return tuple(sorted({position for char in chars for position in self._touching.get(char, ())}))

    def _occurrences(self, phrase: str) -> list[WordTokens]:
        return [
            WordTokens(phrase, number, spans[0][0], spans[-1][1], self._positions(spans))
            for number, spans in enumerate(_search(self.text, self._atoms, phrase), 1)
        ]

    def _missing(self, phrase: str) -> str:
        if _search(self.text, self._all_atoms, phrase):
            return (
                f"'{phrase}' is written in the prompt, but the text encoder has no token for it: it lies beyond the length that "
                f"is read, is a weight, or is an embedding that was not found. Words it reads: {self._listing()}"
            )
        if not self._atoms:
            return f"'{phrase}' is not in the prompt: the prompt has no words."
        close = get_close_matches(key(phrase), [key(word) for word in self.words()], 1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"'{phrase}' is not in the prompt.{hint} Words in the prompt: {self._listing()}"

    def _listing(self) -> str:
        words = self.words()
        more = f" ... and {len(words) - _LISTED_WORDS} more" if len(words) > _LISTED_WORDS else ""
        return ", ".join(words[:_LISTED_WORDS]) + more


def _split_number(words: str) -> tuple[str, int | None]:
    numbered = re.fullmatch(r"(.*\S)\s*#(\d+)", words.strip(), re.DOTALL)
    return (numbered[1], int(numbered[2])) if numbered else (words.strip(), None)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _search(text: str, spans: Sequence[Span], phrase: str) -> list[list[Span]]:
    phrase = phrase.removeprefix(EMBEDDING)
    wanted = [key(phrase[start:end]) for start, end in atoms(phrase)]
    keys = [key(text[start:end]) for start, end in spans]
    size = len(wanted)
    return [list(spans[at : at + size]) for at in range(len(keys) - size + 1) if size and keys[at : at + size] == wanted]


def fold(columns: torch.Tensor, length: int) -> torch.Tensor:
    """Attention columns (..., n * length) -> (..., length).

    Where prompts of different length are sampled in one batch, the host repeats the shorter one up to a common length;
    the attention of a token is then spread over its copies.
    """
    if length < 1 or columns.shape[-1] % length:
        raise ValueError(
            f"{columns.shape[-1]} attention columns are no multiple of the prompt's {length} tokens: the conditioning was "
            "changed after the prompt was encoded, or the columns are not those of the text."
        )
    return columns.unflatten(-1, (-1, length)).sum(dim=-2)


# --- making the map ---------------------------------------------------------------------------------------------------


def tokenize(clip: Any, text: str) -> TokenMap:
    """Where the tokens of ``text`` are once ``clip`` has encoded it. Raises ``UnknownEncoder`` where that cannot be told."""
    host_tokens = _host_tokens(clip, text)
    rows = context_rows(clip.cond_stage_model, host_tokens)
    raw = raw_tokens(host_tokens)
    seen = {raw[index].encoder for row in rows.rows for index in row}
    known: dict[int, tuple[str, Span | None, str]] = {}
    for encoder in seen:
        known.update(_described(clip, encoder, raw, text))
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
    """For each raw token of one encoder: readable text, span, kind."""
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
    """What the tokenizer writes around every prompt: chat templates of language models."""
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
    """The text that is left beside the embeddings that were found, its origin, and each embedding's name."""
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
    """Whether the host has this embedding; one it has not is left out of the prompt."""
    return any(torch.is_tensor(token[0]) for chunk in tokenizer.tokenize_with_weights(name) for token in chunk)


# --- metadata in conditionings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptInfo:
    """What is known of one entry of a CONDITIONING."""

    tokens: TokenMap
    subjects: list[WordTokens] = field(default_factory=list)
    length: int = 0  # rows of the conditioning now; more than the map's where a node joined something behind it


def metadata(clip: Any, text: str, subjects: Sequence[Span], conditioning_length: int) -> dict[str, Any]:
    """Plain data for the dict of a conditioning of that many rows, under the key ``METADATA``."""
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
    """One for each entry of a CONDITIONING (or of the sampler's list of conds), see ``prompt_info``."""
    typed = tokenize(clip, text) if clip is not None and text else None
    return [_entry_info(entry, typed) for entry in conditioning]


def prompt_info(conditioning: Sequence[Any], clip: Any = None, text: str | None = None) -> PromptInfo:
    """Tokens and marked subjects of a conditioning: from its metadata, else from ``clip`` and the ``text`` it was made of."""
    infos = prompt_infos(conditioning, clip, text)
    if not infos:
        raise ValueError("This conditioning is empty. Connect the output of 'Prompt with Subjects'.")
    if any(info.tokens != infos[0].tokens for info in infos):
        raise ValueError(
            "This conditioning combines several prompts, so a word may mean several places. Connect one prompt at a time, "
            "without Conditioning (Combine)."
        )
    return infos[0]


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
