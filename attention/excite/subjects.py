"""Subjects: which tokens of each entry of the positive conditioning are guided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts.conditioning import METADATA, prompt_infos
from ..prompts.encoder_rows import UnknownEncoder
from ..prompts.token_map import TokenMap


@dataclass(frozen=True)
class Subject:
    """A thing that must be seen: its name and the positions of its tokens among the text tokens."""

    name: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class GuidedPrompt:
    """One entry of the positive conditioning.

    Attributes:
        columns: the text tokens that compete for a place, in order; it has every subject's positions.
    """

    subjects: tuple[Subject, ...]
    columns: tuple[int, ...]


# CLIP's tokens 1 to 75 compete (the start token and the last position do not); of OpenCLIP-H's and of other encoders' only
# the prompt's own, whose padding says nothing.
_PADDING_COMPETES = {"", "l", "g"}


def guided_prompts(conditioning: Sequence[Any], subjects: str, clip: Any = None, text: str = "") -> list[GuidedPrompt | None]:
    """Return what to guide in each entry of the positive conditioning; None where an entry has none of the subjects.

    Raises:
        ValueError: no subjects, or one that no entry has.
    """
    wanted = list(dict.fromkeys(item.strip() for item in subjects.split(",") if item.strip()))
    if not conditioning:
        raise ValueError("'positive' is empty. Connect the output of 'Prompt with Subjects'.")
    if wanted and all(item.isdecimal() for item in wanted):
        return [_at_positions(entry, [int(item) for item in wanted], clip, text) for entry in conditioning]
    infos = prompt_infos(conditioning, clip, text.strip() or None)
    found: list[GuidedPrompt | None] = []
    missing: dict[str, ValueError] = {}
    seen: set[str] = set()
    for info in infos:
        chosen = [Subject(_numbered(word, info.subjects), word.positions) for word in info.subjects] if not wanted else []
        for item in wanted:
            try:
                words = info.tokens.find(item)
            except ValueError as error:
                missing.setdefault(item, error)
            else:
                chosen.append(Subject(item, tuple(sorted({p for word in words for p in word.positions}))))
                seen.add(item)
        found.append(GuidedPrompt(tuple(chosen), _columns(info.tokens, chosen)) if chosen else None)
    for item in wanted:
        if item not in seen:
            raise ValueError(f"subjects: {missing[item]}") from missing[item]
    if not any(found):
        listed = ", ".join(dict.fromkeys(word for info in infos for word in info.tokens.words()))
        raise ValueError(
            "No subjects are given. Write words of the prompt in 'subjects', separated by commas, or put them in square "
            f"brackets in 'Prompt with Subjects'. Words in the prompt: {listed}"
        )
    return found


def _numbered(word: Any, subjects: Sequence[Any]) -> str:
    return f"{word.word}#{word.occurrence}" if [other.word for other in subjects].count(word.word) > 1 else word.word


def _at_positions(entry: Any, positions: list[int], clip: Any, text: str) -> GuidedPrompt:
    """Return what to guide in one entry for subjects given as token positions, which need no known words."""
    tensor, options = (entry["cross_attn"], entry) if isinstance(entry, dict) else entry
    known: TokenMap | None = None
    if METADATA in options or (clip is not None and text.strip()):
        try:
            known = prompt_infos([entry], clip, text.strip() or None)[0].tokens
        except UnknownEncoder:
            known = None
    length = known.length if known is not None else int(tensor.shape[1])
    for position in positions:
        if not 0 <= position < length:
            raise ValueError(
                f"subjects: token position {position} is outside this prompt, which has {length} tokens (0 to {length - 1})."
            )
    chosen = [Subject(_name_at(known, position), (position,)) for position in positions]
    if known is not None:
        return GuidedPrompt(tuple(chosen), _columns(known, chosen))
    return GuidedPrompt(tuple(chosen), tuple(sorted({*range(1, length - 1), *positions})))


def _name_at(known: TokenMap | None, position: int) -> str:
    return known.at(position).word if known is not None else f"token {position}"


def _columns(tokens: TokenMap, subjects: Sequence[Subject]) -> tuple[int, ...]:
    """Return the tokens that compete for a place, see ``_PADDING_COMPETES``."""
    padding = {token.encoder for token in tokens.tokens} <= _PADDING_COMPETES
    left_out = ("start",) if padding else ("start", "end", "pad", "template")
    kept = {token.position for token in tokens.tokens if token.kind not in left_out}
    if padding:
        kept.discard(tokens.length - 1)
    return tuple(sorted(kept.union(position for subject in subjects for position in subject.positions)))
