"""Train U-Net and text encoder together, from a pool of latents that new scenes replace while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emoji.autoencoder import Autoencoder, encode
from emoji.chance import Chance
from emoji.device import autocast, placed
from emoji.layout import layout
from emoji.model import Model, Noise
from emoji.optimise import Plan
from emoji.piece import Part, Setting
from emoji.state import PartState

PLAN = Plan(samples=6_000_000, batch=512, lr=1e-3, averaged=True)
DROPPED = 0.1  # share of the captions that are empty
FIRST = 16  # batches in the pool before the first step


class Pool:
    """Keep latents and captions of the newest scenes. Which these are depends on the step alone: a resumed run has the same."""

    def __init__(self, part: ModelPart) -> None:
        setting, self.part, self.batch = part.setting, part, part.plan.batch
        self.slots = max(FIRST, setting.pool // self.batch)
        shape = (self.slots, self.batch, layout.LATENT_CHANNELS, layout.LATENT, layout.LATENT)
        self.latents = torch.empty(shape, device=setting.device, dtype=torch.float16)
        self.rows = torch.empty(self.slots, self.batch, layout.TOKENS, device=setting.device, dtype=torch.uint8)
        self.drawn = 0

    def fill(self, step: int) -> None:
        """Draw what is missing for a step: at first several batches, then one every ``reuse`` steps."""
        wanted = FIRST + step // self.part.setting.reuse
        self.drawn = max(self.drawn, wanted - self.slots)
        composer = self.part.setting.composer
        while self.drawn < wanted:
            composer.chance.restart(self.part.seed(self.drawn, 1))
            batch = composer(self.batch)
            self.latents[self.drawn % self.slots] = encode(self.part.vae, batch.images).half()
            self.rows[self.drawn % self.slots] = batch.rows.byte()
            self.drawn += 1

    def pick(self, chance: Chance) -> tuple[Tensor, Tensor]:
        """Return latents [B, 4, 32, 32] and rows [B, 77] at random."""
        chosen = chance.integers(min(self.drawn, self.slots) * self.batch, self.batch)
        return self.latents.flatten(0, 1)[chosen].float(), self.rows.flatten(0, 1)[chosen].long()


class ModelPart(Part):
    """Train U-Net and text encoder."""

    name = "model"

    def __init__(self, setting: Setting, vae: Autoencoder, plan: Plan = PLAN) -> None:
        super().__init__(setting, plan)
        vocabulary = setting.composer.vocabulary
        self.vae = vae
        self.network: Model = placed(Model(len(vocabulary.ids)), setting.device)
        self.noise, self.chance = Noise(setting.device), Chance(setting.device)
        self.empty = vocabulary([""]).to(setting.device)
        self.pool = Pool(self)
        self.compared = self.compile(self._compared)

    def _compared(self, noisy: Tensor, steps: Tensor, rows: Tensor, target: Tensor) -> Tensor:
        with autocast(noisy.device):
            predicted = self.network(noisy, steps, rows)
        return F.mse_loss(predicted.float(), target)

    def loss(self, step: int, samples: int) -> Tensor:
        self.pool.fill(step)
        self.chance.restart(self.seed(step, 2))
        latents, rows = self.pool.pick(self.chance)
        rows = torch.where(self.chance.uniform(len(rows), 1) < DROPPED, self.empty, rows)
        noisy, steps, target = self.noise(latents, self.chance)
        return self.compared(noisy, steps, rows, target)

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Measure the averaged weights on scenes and noise that are always the same."""
        self.chance.restart(self.seed(0, 3))
        composer, total = self.setting.composer, 0.0
        composer.chance.restart(self.seed(0, 4))
        rounds = 2
        for _ in range(rounds):
            batch = composer(min(512, self.plan.batch))
            noisy, steps, target = self.noise(encode(self.vae, batch.images), self.chance)
            total += self._compared(noisy, steps, batch.rows, target).item()
        return {"held_out_loss": round(total / rounds, 5), "scenes": self.pool.drawn * self.plan.batch}


def trained_model(state: PartState, words: int, device: torch.device) -> Model:
    """Return the model of a state with averaged weights, ready for use."""
    model = Model(words)
    state.load_into(model, averaged=True)
    return placed(model, device).eval().requires_grad_(False)
