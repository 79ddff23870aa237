"""Train the VAE: images of composed scenes, a loss that sees edges, and latents of unit variance that bear some noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoji.autoencoder import Autoencoder, decode, encode
from emoji.chance import Chance
from emoji.device import autocast, channels_last, placed
from emoji.layout import layout
from emoji.optimise import Plan
from emoji.piece import Part, Setting
from emoji.state import PartState

PLAN = Plan(samples=240_000, batch=24, lr=8e-4, warm_up=100, weight_decay=1e-4, clip=0.5)
NORMALISED = 0.8  # share of the training after which the latents' mean and deviation stay as they are
TOGETHER = 8  # batches that are composed at once
NOISE = 0.14  # deviation of the deviation of noise on latents: the U-Net's are not exact either


def image_loss(decoded: Tensor, image: Tensor) -> Tensor:
    """Return absolute and squared differences, those of neighbouring pixels (edges) and those of smaller images."""
    away = decoded.float() - image.float()
    edges = (away[..., 1:] - away[..., :-1]).abs().mean() + (away[..., 1:, :] - away[..., :-1, :]).abs().mean()
    half = F.avg_pool2d(away, 2)
    smaller = half.abs().mean() + F.avg_pool2d(half, 2).abs().mean()
    return away.abs().mean() + 0.6 * edges + 0.3 * smaller + away.square().mean()


class Normalised(nn.Module):
    """Bring the VAE's latents to mean 0 and deviation 1 while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = Autoencoder()
        self.norm = nn.BatchNorm2d(layout.LATENT_CHANNELS, affine=False, momentum=0.05)

    def encode(self, images: Tensor) -> Tensor:
        return self.norm(self.vae.encode(images).float())

    @torch.no_grad()
    def folded(self) -> Autoencoder:
        """Return the VAE alone; its last layer does what the normalisation did."""
        vae = Autoencoder().to(self.norm.running_mean.device)  # type: ignore[union-attr]
        vae.load_state_dict(self.vae.state_dict())
        mean, variance = self.norm.running_mean, self.norm.running_var
        last = vae.taesd_encoder[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None and mean is not None and variance is not None
        deviation = (variance + self.norm.eps).sqrt()
        last.weight.div_(deviation[:, None, None, None])
        last.bias.copy_((last.bias - mean) / deviation)
        return vae.eval().requires_grad_(False)


class VaePart(Part):
    """Train the VAE."""

    name = "vae"

    def __init__(self, setting: Setting, plan: Plan = PLAN) -> None:
        super().__init__(setting, plan)
        self.network: Normalised = placed(Normalised(), setting.device)
        self.chance = Chance(setting.device)
        self.group, self.images = -1, torch.empty(0)
        self.coded = self.compile(self._coded)
        self.decoded = self.compile(self._decoded)

    def batch(self, step: int) -> Tensor:
        """Return the images of a step."""
        group, number = divmod(step, TOGETHER)
        if group != self.group:
            composer = self.setting.composer
            composer.chance.restart(self.seed(group, 1))
            images = composer(self.plan.batch * TOGETHER).images
            self.group, self.images = group, images[composer.chance.order(len(images))]
        images = self.images[number * self.plan.batch :][: self.plan.batch]
        if self.setting.crop:
            low = (layout.IMAGE - self.setting.crop) // 2
            images = images[..., low : low + self.setting.crop, low : low + self.setting.crop]
        return channels_last(images)

    def _coded(self, images: Tensor) -> Tensor:
        with autocast(images.device):
            return self.network.vae.encode(images)

    def _decoded(self, latents: Tensor, images: Tensor) -> Tensor:
        with autocast(images.device):
            decoded = self.network.vae.decode(latents)
        return image_loss(decoded, images)

    def loss(self, step: int, samples: int) -> Tensor:
        images = self.batch(step)
        self.chance.restart(self.seed(step, 2))
        self.network.norm.train(samples < NORMALISED * self.plan.samples)
        latents = self.network.norm(self.coded(images).float())
        strength = NOISE * self.chance.normal(len(latents), 1, 1, 1).abs()
        loss = self.decoded(latents + strength * self.chance.normal(*latents.shape), images)
        if step % 3 == 0:  # latents of half the size should be images of half the size
            loss = loss + 0.25 * self.decoded(F.avg_pool2d(latents, 2), F.avg_pool2d(images.float(), 2))
        return loss + 0.002 * (latents.abs() - 2.5).clamp(min=0).square().mean()

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        composer, count = self.setting.composer, min(128, 2 * self.plan.batch)
        composer.chance.restart(self.seed(0, 3))
        images, vae = composer(count).images, self.network.folded()
        latents = encode(vae, images)
        away = decode(vae, latents) - images.float()
        psnr = (-10 * away.square().mean((1, 2, 3)).clamp(min=1e-10).log10()).mean()
        deviation = [round(value, 3) for value in latents.std((0, 2, 3)).tolist()]
        return {"psnr": round(psnr.item(), 2), "l1": round(away.abs().mean().item(), 5), "images": count, "latent_std": deviation}

    def finish(self, state: PartState) -> PartState:
        vae = self.network.folded()
        self.network.vae.load_state_dict(vae.state_dict())
        self.network.norm.reset_running_stats()  # it changes next to nothing from here on
        state.weights, state.buffers = [parameter.detach() for parameter in vae.parameters()], {}
        return state


def trained_vae(state: PartState, device: torch.device) -> Autoencoder:
    """Return the VAE of a state, ready for use; one that is not trained to the end is folded for the purpose."""
    network = Normalised()
    state.load_into(network)
    vae = network.vae if state.finished else network.folded()
    return placed(vae, device).eval().requires_grad_(False)
