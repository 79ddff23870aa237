"""Write captions as rows of the vocabulary, put together on the device.

``words.json`` has the CLIP token ids of every word: the trainers run where there is no ComfyUI to ask. Its tokenizer wrote it:

    cd dev && COMFYUI_PATH=... python -m emoji.captions
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor

from emoji.chance import Chance
from emoji.concepts import COLOURED_GROUNDS, COLOURS, CONCEPTS, GROUNDS, STYLES
from emoji.layout import HERE, layout
from emoji.scene import INK, ITEMS, NEON, Scenes

WORDS = (
    "a an the and with , in on at by of picture drawing style background meadow sea night desert snow "
    "striped dotted checkered flat glossy cartoon sticker ink neon pixel"
).split() + [*COLOURS, *CONCEPTS]
PLACES = {
    "meadow": ("in a meadow", "in the meadow"),
    "sea": ("at sea", "by the sea"),
    "night": ("at night", "in the night"),
    "desert": ("in the desert", "in a desert"),
    "snow": ("in the snow", "in snow"),
}


class Vocabulary:
    """Know the words, their token ids and the rows of the token table that the model keeps."""

    def __init__(self) -> None:
        self.words: dict[str, list[int]] = json.loads((HERE / "words.json").read_text(encoding="utf-8"))
        self.ids = sorted({token for tokens in self.words.values() for token in tokens} | {layout.START_TOKEN, layout.END_TOKEN})
        self.row = {token: number for number, token in enumerate(self.ids)}
        self.start, self.end = self.row[layout.START_TOKEN], self.row[layout.END_TOKEN]

    def rows(self, text: str) -> list[int]:
        """Return the rows of a text without start and end.

        Raises:
            ValueError: a word is not one of the model's.
        """
        found = []
        for word in text.replace(",", " ,").split():
            if word not in self.words:
                raise ValueError(f"The model does not know the word '{word}'. It knows: {' '.join(self.words)}")
            found += [self.row[token] for token in self.words[word]]
        return found

    def __call__(self, prompts: Iterable[str]) -> Tensor:
        """Return rows [B, 77] of whole prompts."""
        found = [[self.start, *self.rows(prompt)] for prompt in prompts]
        return torch.tensor([row + [self.end] * (layout.TOKENS - len(row)) for row in found])

    def text(self, rows: Tensor) -> str:
        """Return the prompt of rows [77]."""
        names = {self.row[tokens[0]]: word for word, tokens in self.words.items()}
        return " ".join(names[int(row)] for row in rows[1:] if int(row) in names)


class Captions:
    """Describe scenes. A caption is put together from pieces: numbers of texts whose rows are in a table."""

    def __init__(self, vocabulary: Vocabulary, chance: Chance) -> None:
        self.vocabulary, self.chance, self.device = vocabulary, chance, chance.device
        pieces: list[list[int]] = [[]]

        def add(text: str) -> int:
            pieces.append(vocabulary.rows(text))
            return len(pieces) - 1

        def table(values: list) -> Tensor:
            return torch.tensor(values, device=self.device)

        patterns = list(GROUNDS)[2:COLOURED_GROUNDS]
        self.a, self.an, self.comma, self.and_, self.with_ = (add(word) for word in ("a", "an", ",", "and", "with"))
        self.noun, self.noun_vowel = table([add(word) for word in CONCEPTS]), table([word[0] in "aeiou" for word in CONCEPTS])
        self.colour, self.colour_vowel = table([add(word) for word in COLOURS]), table([word[0] in "aeiou" for word in COLOURS])
        self.opening = table([0, add("a picture of"), add("a drawing of")])
        plain = [[add(f"on a {colour} background") for colour in COLOURS]] * 2
        self.ground = table(plain + [[add(f"on a {kind} {colour} background") for colour in COLOURS] for kind in patterns])
        self.pattern = table([0, 0] + [add(f"on a {kind} background") for kind in patterns])
        self.place = table([[add(text) for text in PLACES[kind]] for kind in list(GROUNDS)[COLOURED_GROUNDS:]])
        self.style = table([[0, 0]] + [[add(f"in {style} style"), add(f", {style} style")] for style in list(STYLES)[1:]])
        longest = max(len(piece) for piece in pieces)
        self.piece_rows = table([piece + [-1] * (longest - len(piece)) for piece in pieces])
        self.piece_size = table([len(piece) for piece in pieces])

    def __call__(self, scenes: Scenes, dropout: float = 0.0) -> Tensor:
        """Return rows [n, 77]; a share of ``dropout`` is empty. Wording varies, and some things are not said."""
        count, random = len(scenes.count), self.chance.uniform
        ids = torch.full((count, layout.TOKENS), self.vocabulary.end, dtype=torch.long, device=self.device)
        ids[:, 0] = self.vocabulary.start
        empty, at = ids.clone(), torch.ones(count, dtype=torch.long, device=self.device)
        self._append(ids, at, self.opening[((random(count) - 0.86) / 0.07 + 1).floor().clamp(0, 2).long()])
        bare = random(count) < 0.06
        for item in range(ITEMS):
            on, named = item < scenes.count, scenes.named[:, item]
            concept, colour = scenes.concept[:, item], scenes.colour[:, item]
            if item:
                self._append(ids, at, torch.where(on, self._joint(scenes.count, item), 0))
            vowel = torch.where(named, self.colour_vowel[colour], self.noun_vowel[concept])
            article = torch.where(vowel & (random(count) < 0.6), self.an, self.a)
            self._append(ids, at, torch.where(on & ~bare, article, 0))
            self._append(ids, at, torch.where(on & named, self.colour[colour], 0))
            self._append(ids, at, torch.where(on, self.noun[concept], 0))
        self._append(ids, at, self._ground(scenes))
        self._append(ids, at, self.style[scenes.style, (random(count) < 0.2).long()])
        return torch.where((random(count) < dropout)[:, None], empty, ids)

    def _joint(self, items: Tensor, item: int) -> Tensor:
        """Return what stands before an item: of three, the first two are parted by a comma or "and", the last by "and"."""
        random, count = self.chance.uniform, len(items)
        two = torch.where(random(count) < 0.74, self.and_, torch.where(random(count) < 0.6, self.with_, self.comma))
        three = torch.where(random(count) < 0.5, self.comma, self.and_) if item == 1 else torch.full_like(items, self.and_)
        return torch.where(items == 3, three, two)

    def _ground(self, scenes: Scenes) -> Tensor:
        random, count = self.chance.uniform, len(scenes.count)
        coloured = scenes.ground.clamp(max=COLOURED_GROUNDS - 1)
        pattern = self.pattern[coloured]
        words = torch.where((pattern > 0) & (random(count) < 0.35), pattern, self.ground[coloured, scenes.ground_colour])
        repainted = (scenes.style == INK) | (scenes.style == NEON)  # their grounds have no colour left to name
        rather = torch.where((pattern > 0) & (random(count) < 0.5), pattern, 0)
        words = torch.where(~repainted & (random(count) < 0.5), words, rather)
        place = self.place[(scenes.ground - COLOURED_GROUNDS).clamp(min=0), (random(count) < 0.4).long()]
        return torch.where(scenes.ground < COLOURED_GROUNDS, words, torch.where(random(count) < 0.7, place, 0))

    def _append(self, ids: Tensor, at: Tensor, piece: Tensor) -> None:
        """Write each caption's piece [B] at its position ``at`` [B], and move the position behind it."""
        rows, size = self.piece_rows[piece], self.piece_size[piece]
        for number in range(rows.shape[1]):
            where = (at + number).clamp(max=layout.TOKENS - 1)[:, None]
            new = rows[:, number : number + 1]
            ids.scatter_(1, where, torch.where(new >= 0, new, ids.gather(1, where)))
        at += size


def write_words() -> None:
    """Ask ComfyUI's tokenizer for the ids of the words and save them."""
    from host_inprocess import start_host

    start_host()
    from comfy import sd1_clip

    tokenizer, found = sd1_clip.SD1Tokenizer(), {}
    for word in WORDS:
        tokens = [pair[0] for pair in tokenizer.tokenize_with_weights(word)["l"][0]]
        found[word] = tokens[1 : tokens.index(layout.END_TOKEN)]
    (HERE / "words.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print({word: tokens for word, tokens in found.items() if len(tokens) > 1}, len(found), "words")


if __name__ == "__main__":
    write_words()
