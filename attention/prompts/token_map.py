"""Words of a prompt -> positions of their tokens among the text tokens that a model attends to.

``tokenize`` makes a ``TokenMap`` for one prompt and one CLIP. A position is a row of the conditioning (its dimension 1);
models that join more text behind it (HunyuanDiT's mT5, HiDream's Llama) count on from there. A word of a prompt that
several encoders read one after the other (SD3) has positions in each of them. Spans are characters of the prompt as it is
encoded, see ``prompt_text``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

from .syntax import EMBEDDING, Span, atoms, joined_words, key

_LISTED_WORDS = 40


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
        """Return every occurrence of a word or phrase; ``cat#2`` is the second one. Case and punctuation do not matter."""
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
        """Return the words that have tokens, in order, each once."""
        words: dict[str, str] = {}
        for word in self._whole_words(joined_words(self.text, self._atoms)):
            name = self.text[word[0][0] : word[-1][1]]
            words.setdefault(key(name), name)
        return list(words.values())

    def _whole_words(self, words: Sequence[list[Span]]) -> list[list[Span]]:
        """Return words of scripts without spaces as the encoder reads them: characters of one token are one word."""
        whole: list[list[Span]] = []
        for word in words:
            if whole and whole[-1][-1][1] == word[0][0] and self._inseparable(whole[-1][-1], word[0]):
                whole[-1] += word
            else:
                whole.append(list(word))
        return whole

    def _inseparable(self, one: Span, other: Span) -> bool:
        """Return whether every encoder that reads both has a token for them together."""
        tokens = [token for token in self._covering if token.start < other[1] and token.end > one[0]]
        apart = {token.encoder for token in tokens}
        together = {token.encoder for token in tokens if token.start < one[1] and token.end > other[0]}
        return bool(together) and together == apart

    def at(self, position: int) -> WordTokens:
        """Return the token at one position."""
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
        """Return the words inside a span of the prompt (a marked subject), taken together."""
        start, end = span
        inside = [atom for atom in self._atoms if atom[0] < end and atom[1] > start]
        name = self._name(joined_words(self.text, inside))
        positions = self._positions(inside or [span])
        if not positions:
            raise ValueError(self._missing(self.text[start:end]))
        same = self._occurrences(name)
        occurrence = sum(other.start <= (inside[0][0] if inside else start) for other in same)
        return WordTokens(name or self.text[start:end], max(occurrence, 1), start, end, positions)

    def _name(self, words: Sequence[list[Span]]) -> str:
        """Return words without what stands between them, weights for example; with spaces where something does."""
        name, end = "", 0
        for word in words:
            name += (" " if name and word[0][0] > end else "") + self.text[word[0][0] : word[-1][1]]
            end = word[-1][1]
        return name

    @cached_property
    def _covering(self) -> list[Token]:
        return [token for token in self.tokens if token.end > token.start and token.kind in ("text", "embedding")]

    @cached_property
    def _atoms(self) -> list[Span]:
        """Return the smallest words that have tokens: a weight's digits are in the prompt's text but have none."""
        return [span for span in self._all_atoms if self._positions([span])]

    @cached_property
    def _all_atoms(self) -> list[Span]:
        names = {token.start for token in self._covering if token.kind == "embedding"}
        return [span for span in atoms(self.text) if span[0] not in names or not self.text.startswith(EMBEDDING, span[0])]

    @cached_property
    def _touching(self) -> dict[int, list[int]]:
        """Return character -> positions of the tokens that cover it."""
        touching: dict[int, list[int]] = {}
        for token in self._covering:
            for char in range(token.start, token.end):
                touching.setdefault(char, []).append(token.position)
        return touching

    def _positions(self, spans: Iterable[Span]) -> tuple[int, ...]:
        chars = (char for start, end in spans for char in range(start, end))
        return tuple(sorted({position for char in chars for position in self._touching.get(char, ())}))

    def _occurrences(self, phrase: str) -> list[WordTokens]:
        """Return where a phrase is. Places where it is only a part of a token count where there are no others."""
        found = _search(self.text, self._atoms, phrase)
        found = [spans for spans in found if self._is_whole(spans)] or found
        return [
            WordTokens(phrase, number, spans[0][0], spans[-1][1], self._positions(spans)) for number, spans in enumerate(found, 1)
        ]

    def _is_whole(self, spans: Sequence[Span]) -> bool:
        """Return whether no token of these words reads the words before or behind them as well."""
        (start, _), (_, end) = spans[0], spans[-1]
        first = bisect_left(self._atoms, (start, 0))
        neighbours = [*self._atoms[max(first - 1, 0) : first], *self._atoms[first + len(spans) : first + len(spans) + 1]]
        beside = [(one, other) for one, other in neighbours if one == end or other == start]
        return not any(self._inseparable(*sorted((span, spans[0] if span[1] == start else spans[-1]))) for span in beside)

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
