"""Train the judge on drawn scenes with clutter, on round trips through the VAE, and on blurred and noisy images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emoji.autoencoder import Autoencoder, decode, encode
from emoji.chance import Chance
from emoji.compose import Batch
from emoji.concepts import CONCEPTS
from emoji.device import autocast, channels_last, placed
from emoji.judge import CELLS, Judge, see
from emoji.optimise import Plan
from emoji.piece import Part, Setting
from emoji.state import PartState

PLAN = Plan(samples=1_000_000, batch=256, lr=2e-3, warm_up=50, weight_decay=0.02, clip=2.0)
COVERED = 0.25  # share of a cell that a concept must cover to be what the cell should vote for
VOTES = 20.0  # weight of the cells' votes: composed scenes say where everything is, which is learnt sooner than what is there


class JudgePart(Part):
    """Train the judge."""

    name = "judge"

    def __init__(self, setting: Setting, vae: Autoencoder, plan: Plan = PLAN) -> None:
        super().__init__(setting, plan)
        self.vae = vae
        self.network: Judge = placed(Judge(), setting.device)
        self.chance = Chance(setting.device)

    def spoiled(self, images: Tensor, order: Tensor) -> Tensor:
        """Send a third of the images through the VAE with noisy latents, blur another quarter, and add noise to half of all."""
        n, random, normal = len(images), self.chance.uniform, self.chance.normal
        images = images.float().clone()
        through, soft = order[: n // 3], order[n - n // 4 :]
        latents = encode(self.vae, images[through])
        images[through] = decode(self.vae, latents + 0.25 * random(len(through), 1, 1, 1) * normal(*latents.shape))
        images[soft] = F.interpolate(F.avg_pool2d(images[soft], 2), scale_factor=2.0, mode="bilinear")
        noise = 0.08 * random(n, 1, 1, 1) * (random(n, 1, 1, 1) < 0.5) * normal(*images.shape)
        return (images * random(n, 1, 1, 1, low=0.9, high=1.1) + noise).clamp(0, 1)

    def loss(self, step: int, samples: int) -> Tensor:
        composer = self.setting.composer
        composer.chance.restart(self.seed(step, 1))
        self.chance.restart(self.seed(step, 2))
        batch = composer(self.plan.batch, clutter=True, masks=True)
        images = self.spoiled(batch.images, self.chance.order(len(batch.images)))
        return judge_loss(self.network, images, batch)

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        composer, n = self.setting.composer, min(256, self.plan.batch)
        composer.chance.restart(self.seed(0, 3))
        rounds = 8 if n == 256 else 1
        counts = {name: Counts() for name in ("drawn", "round trip")}
        for _ in range(rounds):
            batch = composer(n)
            images = batch.images.float()
            counts["drawn"].add(self.network, images, batch)
            counts["round trip"].add(self.network, decode(self.vae, encode(self.vae, images)), batch)
        return {name: found.shares() for name, found in counts.items()}


def judge_loss(judge: Judge, images: Tensor, batch: Batch) -> Tensor:
    """Return how wrong the judge is about what is there, where, and in which colour."""
    with autocast(images.device):
        seen = judge(channels_last(images))
    there = F.binary_cross_entropy_with_logits(seen.presence, batch.present)
    covered = (batch.concept_masks(CELLS) > COVERED).float()
    where = F.binary_cross_entropy_with_logits(seen.votes, covered)
    known = (batch.colour >= 0).float()
    wrong = F.cross_entropy(seen.colour.flatten(0, 1), batch.colour.flatten().clamp(min=0), reduction="none")
    return 8 * there + VOTES * where + 0.5 * (wrong * known.flatten()).sum() / known.sum().clamp(min=1)


class Counts:
    """Count what the judge finds and what was there."""

    def __init__(self) -> None:
        self.scenes = self.exact = self.coloured = self.right_colour = 0
        self.right, self.there, self.found = (torch.zeros(len(CONCEPTS)) for _ in range(3))

    def add(self, judge: Judge, images: Tensor, batch: Batch) -> None:
        seen = see(judge, images)
        found, there = seen.present.cpu(), (batch.present > 0).cpu()
        self.scenes += len(found)
        self.exact += int((found == there).all(1).sum())
        self.right += (found & there).sum(0)
        self.there += there.sum(0)
        self.found += found.sum(0)
        known = batch.colour >= 0
        self.coloured += int(known.sum())
        self.right_colour += int(((seen.colour.argmax(2) == batch.colour) & known).sum())

    def shares(self) -> dict[str, Any]:
        """Return recall, precision and the share of scenes without any error; ``worst`` are the concepts least often found."""
        recall = self.right / self.there.clamp(min=1)
        return {
            "recall": round((self.right.sum() / self.there.sum().clamp(min=1)).item(), 4),
            "precision": round((self.right.sum() / self.found.sum().clamp(min=1)).item(), 4),
            "exact": round(self.exact / self.scenes, 4),
            "colour": round(self.right_colour / max(self.coloured, 1), 4),
            "scenes": self.scenes,
            "worst": {CONCEPTS[number]: round(recall[number].item(), 3) for number in recall.argsort()[:5].tolist()},
        }


def trained_judge(state: PartState, device: torch.device) -> Judge:
    """Return the judge of a state, ready for use."""
    judge = Judge()
    state.load_into(judge)
    return placed(judge, device).eval().requires_grad_(False)
