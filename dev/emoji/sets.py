"""Name the prompts that are measured: Attend-and-Excite's three sets, with every pair that the vocabulary has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

from emoji.concepts import ANIMALS, COLOURS, OBJECTS

# Set -> the sizes of the paper's own, which has 12 animals and 12 objects (arXiv 2301.13826, section 5).
SETS = {"animal-animal": 66, "animal-object": 144, "object-object": 66}


@dataclass(frozen=True)
class Pair:
    """Hold a prompt of two subjects: concepts, and the colours of objects."""

    kind: str
    subjects: tuple[tuple[str, str | None], tuple[str, str | None]]

    def _write(self, mark: str) -> str:
        written = []
        for concept, colour in self.subjects:
            words = f"{colour} {concept}" if colour else concept
            article = "an" if words[0] in "aeiou" else "a"
            written.append(f"{article} " + mark.format(colour=f"{colour} " if colour else "", concept=concept))
        return " and ".join(written)

    @property
    def text(self) -> str:
        """Return the prompt: a cat and a red car."""
        return self._write("{colour}{concept}")

    @property
    def marked(self) -> str:
        """Return the prompt with its subjects in brackets, for 'Prompt with Subjects': a [cat] and a red [car]."""
        return self._write("{colour}[{concept}]")


def pairs(kind: str, seed: int = 0) -> list[Pair]:
    """Return all pairs of a set: ``animal-animal``, ``animal-object`` or ``object-object``. The seed draws the colours.

    Raises:
        ValueError: there is no such set.
    """
    if kind not in SETS:
        raise ValueError(f"There is no set '{kind}'; the sets are {', '.join(SETS)}.")
    rng, colours = random.Random(f"{kind} {seed}"), list(COLOURS)
    if kind == "animal-animal":
        return [Pair(kind, ((one, None), (other, None))) for one, other in combinations(ANIMALS, 2)]
    if kind == "animal-object":
        return [Pair(kind, ((animal, None), (thing, rng.choice(colours)))) for animal, thing in product(ANIMALS, OBJECTS)]
    chosen = []
    for one, other in combinations(OBJECTS, 2):
        first, second = rng.sample(colours, 2)
        chosen.append(Pair(kind, ((one, first), (other, second))))
    return chosen


def some(kind: str, count: int | None, seed: int = 0) -> list[Pair]:
    """Return ``count`` pairs of a set at random, or all of them, in an order that is always the same."""
    whole = pairs(kind, seed)
    random.Random(seed).shuffle(whole)
    return whole[:count] if count else whole


def texts(chosen: Sequence[Pair]) -> list[str]:
    return [pair.text for pair in chosen]
