"""The heat of words in one image of a run: the share of attention that a place gives them, the mean over steps, 0..1.

A word's heat is the mean over its tokens, as in DAAM, and the mean over the entries of the conditioning that have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .attn_maps import AttnMaps
from .words import Word


@dataclass(frozen=True)
class Source:
    """One image of a recorded run: an entry of the batch and, for videos, a latent frame."""

    maps: AttnMaps
    prompt: str
    batch: int
    frame: int | None = None

    def step_heat(self, word: Word, step: int) -> torch.Tensor:
        """Return the word's heat in one step: (height, width); 0 where no entry of the conditioning was active in it."""
        return combined(word, [self._step_heat(part, step) for part in word.parts])

    def _step_heat(self, word: Word, step: int) -> torch.Tensor:
        found = [
            self.maps.heat(self.prompt, self.batch, cond=cond, positions=positions, frame=self.frame, step=step).mean(0)
            for cond, positions in word.places.items()
            if step in self.maps.recorded_steps(self.prompt, cond)
        ]
        return torch.stack(found).mean(0) if found else torch.zeros(self.maps.grid)

    def steps(self, words: Sequence[Word]) -> list[int]:
        """Return steps in which any of the words was recorded."""
        conds = {cond for word in words for part in word.parts for cond in part.places}
        return sorted({step for cond in conds for step in self.maps.recorded_steps(self.prompt, cond)})

    def heats(self, words: Sequence[Word]) -> list[torch.Tensor]:
        """Return the heat of each word; one request per entry of the conditioning, since resizing layers is what costs."""
        parts = [part for word in words for part in word.parts]
        own = iter(self._heats(parts))
        return [combined(word, [next(own) for _ in word.parts]) for word in words]

    def _heats(self, words: Sequence[Word]) -> list[torch.Tensor]:
        sums = [torch.zeros(self.maps.grid) for _ in words]
        for cond in sorted({cond for word in words for cond in word.places}):
            here = [index for index, word in enumerate(words) if cond in word.places]
            positions = sorted({position for index in here for position in words[index].places[cond]})
            heat = self.maps.heat(self.prompt, self.batch, cond=cond, positions=positions, frame=self.frame)
            heat /= max(len(self.maps.recorded_steps(self.prompt, cond)), 1)
            row = {position: at for at, position in enumerate(positions)}
            for index in here:
                sums[index] += heat[[row[position] for position in words[index].places[cond]]].mean(0)
        return [total / max(len(word.places), 1) for total, word in zip(sums, words, strict=True)]

    def layer_heat(self, word: Word, layer: str, head: int | None = None) -> torch.Tensor | None:
        """Return the word's heat in one layer on the layer's own grid, in the first entry that has both; None where none has."""
        found = [self._layer_heat(part, layer, head) for part in word.parts]
        if found[0] is None:
            return None
        return combined(word, [torch.zeros_like(found[0]) if heat is None else heat for heat in found])

    def _layer_heat(self, word: Word, layer: str, head: int | None) -> torch.Tensor | None:
        for cond, positions in word.places.items():
            maps = self.maps.of(self.prompt, cond)
            if layer in maps.layers:
                chosen = maps.tokens_of(maps.layers[layer].maps[self.batch], positions, 1)
                heat = chosen.float().mean(1)  # heads, frames, height, width
                heat = heat.mean(0) if head is None else heat[head]
                heat = heat.mean(0) if self.frame is None else heat[min(self.frame, heat.shape[0] - 1)]
                return heat / max(len(maps.steps), 1)
        return None

    def convergence(self, word: Word) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Return steps, change from step to step and share of attention of a word, in the first entry that has it.

        Of several words joined by + or -, those of the first.
        """
        if not word.places:
            return [], torch.zeros(0), torch.zeros(0)
        cond, positions = next(iter(word.places.items()))
        steps, change, mass = self.maps.convergence([positions], prompt=self.prompt, batch=self.batch, cond=cond)
        return steps, change[0], mass[0]


def combined(word: Word, heats: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the heat of words joined by + and -, in the units of the first one.

    Args:
        heats: of the parts of ``word``, (height, width) each. All are brought to the first one's maximum: a weak word is not
            drowned by a strong one. + takes the higher heat at each place, - takes away the other's.
    """
    total = heats[0]
    most = float(total.max())
    for (adds, _), heat in zip(word.others, heats[1:], strict=True):
        high = float(heat.max())
        if most <= 0:
            total, most = (heat, high) if adds else (total, most)
        elif high > 0:
            other = heat * (most / high)
            total = torch.maximum(total, other) if adds else (total - other).clamp(min=0)
    return total
