"""Which words a view is about, and their heat.

A word may have several tokens, occur several times, and (where prompts are combined) in several entries of the
conditioning. Its heat is the mean over its tokens, as in DAAM, and the mean over the entries that have it, as the share of
attention that a place gives it: the mean over steps, 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..prompts.conditioning import METADATA, PromptInfo, prompt_infos
from .attn_maps import AttnMaps


@dataclass(frozen=True)
class Word:
    """``places``: index of the conditioning's entry -> token positions."""

    name: str
    places: dict[int, list[int]]


def read_prompt(maps: AttnMaps, prompt: str, clip: Any, text: str) -> list[PromptInfo]:
    """Return what is known of the prompt's words, for each entry of its conditioning."""
    maps.of(prompt)  # says what to do where this prompt was not recorded
    if not maps.has_text:
        raise ValueError(
            "This model gave no attention to words (it has no text tokens, or its layers could not be read), so there are no "
            "word maps. Choose the view 'self-attention', with 'self_attention' switched on in Capture Attention Maps."
        )
    try:
        infos = prompt_infos([_entry(stored) for stored in maps.conditioning(prompt)], clip, text)
    except ValueError as error:
        if clip is not None and not text.strip():
            raise ValueError(
                f"'clip' is connected but 'text' is empty: write the {prompt} prompt there, exactly as it was encoded."
            ) from error
        raise ValueError(f"The words of the {prompt} prompt cannot be read. {error}") from error
    for cond, info in enumerate(infos):
        if info.tokens.length > maps.tokens(prompt, cond):
            raise ValueError(
                f"The {prompt} prompt has {info.tokens.length} tokens, but the sampled one had {maps.tokens(prompt, cond)}: "
                "'text' or 'clip' is not what was encoded. Write the prompt exactly as it was sampled, or use "
                "'Prompt with Subjects'."
            )
    return infos


def _entry(stored: dict[str, Any]) -> dict[str, Any]:
    """Return what the encoder left, as it stands in an entry of a conditioning."""
    return {METADATA: stored} if stored and METADATA not in stored else stored


def choose_words(infos: Sequence[PromptInfo], words: str) -> list[Word]:
    """Return the words that were asked for; else the marked subjects; else every word of the prompt."""
    wanted = list(dict.fromkeys(item.strip() for item in words.split(",") if item.strip()))
    if wanted:
        return [_gather(item, infos) for item in wanted]
    if any(info.subjects for info in infos):
        return _subjects(infos)
    return every_word(infos)


def every_word(infos: Sequence[PromptInfo]) -> list[Word]:
    """Return all words of the prompt, each once; tokens of a word that occurs several times are taken together."""
    names = list(dict.fromkeys(name for info in infos for name in info.tokens.words()))
    if not names:
        raise ValueError(
            "This prompt has no words, so there is nothing to show. Look at the other prompt, or write something in it."
        )
    return [_gather(name, infos) for name in names]


def _gather(name: str, infos: Sequence[PromptInfo]) -> Word:
    """Return every occurrence of a word or phrase, taken together."""
    places: dict[int, list[int]] = {}
    missing: ValueError | None = None
    for cond, info in enumerate(infos):
        try:
            found = info.tokens.find(name)
        except ValueError as error:
            missing = missing or error
        else:
            places[cond] = sorted({position for word in found for position in word.positions})
    if not places:
        raise ValueError(f"words: {missing}") from missing
    return Word(name, places)


def _subjects(infos: Sequence[PromptInfo]) -> list[Word]:
    """Return marked subjects, in order; the second of two equal names is called ``name#2``."""
    subjects: dict[str, dict[int, list[int]]] = {}
    for cond, info in enumerate(infos):
        names = [subject.word for subject in info.subjects]
        for subject in info.subjects:
            name = f"{subject.word}#{subject.occurrence}" if names.count(subject.word) > 1 else subject.word
            subjects.setdefault(name, {})[cond] = list(subject.positions)
    return [Word(name, places) for name, places in subjects.items()]


@dataclass(frozen=True)
class Source:
    """One image of a recorded run: an entry of the batch and, for videos, a latent frame."""

    maps: AttnMaps
    prompt: str
    batch: int
    frame: int | None = None

    def step_heat(self, word: Word, step: int) -> torch.Tensor:
        """Return the word's heat in one step: (height, width); 0 where no entry of the conditioning was active in it."""
        found = [
            self.maps.heat(self.prompt, self.batch, cond=cond, positions=positions, frame=self.frame, step=step).mean(0)
            for cond, positions in word.places.items()
            if step in self.maps.recorded_steps(self.prompt, cond)
        ]
        return torch.stack(found).mean(0) if found else torch.zeros(self.maps.grid)

    def steps(self, words: Sequence[Word]) -> list[int]:
        """Return steps in which any of the words was recorded."""
        conds = {cond for word in words for cond in word.places}
        return sorted({step for cond in conds for step in self.maps.recorded_steps(self.prompt, cond)})

    def heats(self, words: Sequence[Word]) -> list[torch.Tensor]:
        """Return the heat of each word; one request per entry of the conditioning, since resizing layers is what costs."""
        sums = [torch.zeros(self.maps.grid) for _ in words]
        for cond in sorted({cond for word in words for cond in word.places}):
            here = [index for index, word in enumerate(words) if cond in word.places]
            positions = sorted({position for index in here for position in words[index].places[cond]})
            heat = self.maps.heat(self.prompt, self.batch, cond=cond, positions=positions, frame=self.frame)
            heat /= max(len(self.maps.recorded_steps(self.prompt, cond)), 1)
            row = {position: at for at, position in enumerate(positions)}
            for index in here:
                sums[index] += heat[[row[position] for position in words[index].places[cond]]].mean(0)
        return [total / len(word.places) for total, word in zip(sums, words, strict=True)]

    def layer_heat(self, word: Word, layer: str, head: int | None = None) -> torch.Tensor | None:
        """Return the word's heat in one layer on the layer's own grid, in the first entry that has both; None where none has."""
        for cond, positions in word.places.items():
            maps = self.maps.of(self.prompt, cond)
            if layer in maps.layers:
                heat = maps.layers[layer].maps[self.batch][:, positions].float().mean(1)  # heads, frames, height, width
                heat = heat.mean(0) if head is None else heat[head]
                heat = heat.mean(0) if self.frame is None else heat[min(self.frame, heat.shape[0] - 1)]
                return heat / max(len(maps.steps), 1)
        return None

    def convergence(self, word: Word) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Return steps, change from step to step and share of attention of a word, in the first entry that has it."""
        cond, positions = next(iter(word.places.items()))
        steps, change, mass = self.maps.convergence([positions], prompt=self.prompt, batch=self.batch, cond=cond)
        return steps, change[0], mass[0]
