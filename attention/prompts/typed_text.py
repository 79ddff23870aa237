"""The prompt typed beside a conditioning that another encoder made, and whether it is the one that was encoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .encoder_rows import JOINED_OUTPUTS
from .fingerprint import row_sketches, same_rows
from .joined import KnownPrompt
from .syntax import Span, marked_subjects, parse_subjects
from .token_map import TokenMap
from .tokenizing import tokenize

_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass
class TypedPrompt:
    """One way to read what was typed.

    Attributes:
        subjects: spans of what stands in square brackets.
        encoded: sketches of the rows that ``clip`` gives (several where the encoder changes during the run).
        beside: of the tensors that models join behind them, by name.
        used: whether an entry of the conditioning turned out to be this prompt.
    """

    tokens: TokenMap
    subjects: list[Span]
    encoded: list[Tensor]
    beside: dict[str, Tensor]
    used: bool = False

    def matches(self, encoded: Tensor, options: dict[str, Any]) -> bool:
        """Return whether a conditioning has these rows and no others; if so, the prompt is ``used``."""
        same = any(same_rows(rows, encoded) for rows in self.encoded)
        for name, rows in self.beside.items():
            if torch.is_tensor(options.get(name)):
                same = same and same_rows(rows, row_sketches(options[name]))
        self.used |= same
        return same

    def known(self) -> KnownPrompt:
        """Return what its words are."""
        return KnownPrompt(self.tokens, self.subjects)


def typed_prompts(clip: Any, text: str) -> list[TypedPrompt]:
    """Return the ways to read ``text``: as ``Prompt with Subjects`` does, as it stands (other encoders read brackets as
    signs like any other), and as several prompts with BREAK between them.

    Raises:
        UnknownEncoder: where this encoder's tokens cannot be told.
    """
    parts = [part for part in _BREAK.split(text) if part.strip()]
    return _readings(clip, text) + (_readings(clip, *parts) if len(parts) > 1 else [])


def _readings(clip: Any, *texts: str) -> list[TypedPrompt]:
    prompts = []
    for text in texts:
        prompts.append(_typed(clip, text, marked_subjects(text)))
        try:
            plain, subjects = parse_subjects(text)
        except ValueError:
            continue
        if plain != text:
            prompts.insert(len(prompts) - 1, _typed(clip, plain, subjects))
    return prompts


def _typed(clip: Any, text: str, subjects: list[Span]) -> TypedPrompt:
    tokens = tokenize(clip, text)
    with torch.no_grad():
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    options = conditioning[0][1]
    beside = {name: row_sketches(options[name]) for name in JOINED_OUTPUTS if torch.is_tensor(options.get(name))}
    return TypedPrompt(tokens, subjects, [row_sketches(rows) for rows, _ in conditioning], beside)
