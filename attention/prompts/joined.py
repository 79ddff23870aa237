"""Prompts that a node joined behind one another (ConditioningConcat; BREAK of other programs).

Such nodes keep what the first prompt carries and only the rows of the others. The others are found again by their rows,
among the prompts that were encoded last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from .fingerprint import find_rows
from .syntax import Span
from .token_map import Token, TokenMap

_REMEMBERED = 256
_BETWEEN = "\n"


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt's tokens, the spans of its subjects, and the sketches of its rows (None where they are not asked for)."""

    tokens: TokenMap
    subjects: list[Span] = field(default_factory=list)
    rows: Tensor | None = None


_recent: OrderedDict[bytes, KnownPrompt] = OrderedDict()


def remember(prompt: KnownPrompt) -> None:
    """Keep a prompt among the last that were encoded in this process; of those with the same rows, the latest."""
    assert prompt.rows is not None
    key = prompt.rows.numpy().tobytes()
    _recent.pop(key, None)
    _recent[key] = prompt
    while len(_recent) > _REMEMBERED:
        _recent.popitem(last=False)


def recent_prompts() -> list[KnownPrompt]:
    """Return the prompts that were encoded last, the latest first."""
    return list(reversed(_recent.values()))


class JoinedPrompts:
    """Known prompts at their places among the rows of one conditioning."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._parts: list[tuple[int, KnownPrompt]] = []

    def add(self, row: int, prompt: KnownPrompt) -> None:
        """Put a prompt at a row."""
        self._parts.append((row, prompt))

    def search(self, encoded: Tensor, candidates: Iterable[KnownPrompt]) -> list[KnownPrompt]:
        """Add every candidate whose rows are found among those that are not taken yet; return those that were.

        Args:
            encoded: sketches of the conditioning's rows.
        """
        usable = [p for p in candidates if p.rows is not None and p.tokens.length == p.tokens.conditioning_length]
        usable.sort(key=lambda p: p.tokens.length, reverse=True)  # stable: typed ones and later ones come first
        found = []
        for prompt in usable:
            assert prompt.rows is not None
            at = find_rows(prompt.rows, encoded)
            while at is not None:
                if not self._taken(at, prompt.tokens.length):
                    self.add(at, prompt)
                    found.append(prompt)
                at = find_rows(prompt.rows, encoded, at + prompt.tokens.length)
        return found

    def _taken(self, row: int, length: int) -> bool:
        return any(row < at + part.tokens.conditioning_length and at < row + length for at, part in self._parts)

    def together(self) -> KnownPrompt:
        """Return one prompt of all parts, in order, with the tokens at the rows where they are now."""
        text, tokens, subjects = "", [], []
        for row, part in sorted(self._parts, key=lambda entry: entry[0]):
            text = text + _BETWEEN if text else text
            tokens += _moved(part.tokens.tokens, row, len(text))
            subjects += [(start + len(text), end + len(text)) for start, end in part.subjects]
            text += part.tokens.text
        return KnownPrompt(TokenMap(text, tuple(tokens), self._rows, self._rows), subjects)


def _moved(tokens: Sequence[Token], rows: int, chars: int) -> list[Token]:
    return [replace(token, position=token.position + rows, start=token.start + chars, end=token.end + chars) for token in tokens]
