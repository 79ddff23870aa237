"""Build the judge: a small network that sees which concepts an image shows, where, and in which colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoji.concepts import ANIMALS, COLOURS, CONCEPTS, OBJECTS
from emoji.device import autocast, channels_last

CELLS = 16  # votes along a side of the image


class JudgeBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = channels == out and stride == 1
        self.side = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.side(x))


@dataclass
class Verdict:
    """Hold what the judge sees in images."""

    presence: Tensor  # [B, concepts] logits: above 0, the concept is there
    colour: Tensor  # [B, objects, colours] logits
    votes: Tensor  # [B, concepts, 16, 16] logits of where

    @property
    def present(self) -> Tensor:
        return self.presence > 0

    def shows(self, image: int, concept: str, colour: str | None = None) -> bool:
        """Return whether an image shows the concept, and in that colour if one is named (of an object)."""
        number = CONCEPTS.index(concept)
        if not self.present[image, number]:
            return False
        if colour is None:
            return True
        return int(self.colour[image, number - len(ANIMALS)].argmax()) == list(COLOURS).index(colour)


class Judge(nn.Module):
    """See images [B, 3, 256, 256] in 0..1: cells vote, presence is a smooth maximum, and colour is read where the votes are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        shapes = ((32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 192, 2), (192, 192, 1))
        self.body = nn.Sequential(*(JudgeBlock(*shape) for shape in shapes))
        self.presence = nn.Conv2d(192, len(CONCEPTS), 1)
        self.colour = nn.Conv2d(192, len(OBJECTS) * len(COLOURS), 1)
        assert self.presence.bias is not None
        nn.init.constant_(self.presence.bias, -5.0)

    def forward(self, images: Tensor) -> Verdict:
        x = self.body(self.stem((images - 0.5) * 2))
        votes = self.presence(x).float()
        flat = votes.flatten(2)
        presence = torch.logsumexp(flat, 2) - math.log(flat.shape[2]) * 0.5
        colour = self.colour(x).float().unflatten(1, (len(OBJECTS), len(COLOURS))).flatten(3)
        where = flat[:, len(ANIMALS) :].softmax(2)
        return Verdict(presence, torch.einsum("boch,boh->boc", colour, where), votes)


@torch.no_grad()
def see(judge: Judge, images: Tensor, at_once: int = 256) -> Verdict:
    """Judge images [B, 3, 256, 256], ``at_once`` at a time."""
    with autocast(images.device):
        found = [judge(channels_last(part)) for part in images.split(at_once)]
    return Verdict(*(torch.cat([getattr(part, name) for part in found]) for name in ("presence", "colour", "votes")))


def load_judge(path: Path) -> Judge:
    """Load the judge that ``emoji.export`` saved."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    )
    return judge.eval().requires_grad_(False)
