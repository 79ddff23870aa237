"""Tiny runs of Attention Distillation, and the fixtures that its tests share."""

from __future__ import annotations

import json
from dataclasses import replace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.samplers
import pytest
import torch
from families import FAMILIES
from tiny_unet import UNET_CONFIG, randomise

import nodes

SIZE = (16, 16)
CFG = 7.5
LAYERS = "output.2-3"
LR = 0.02


class Noise:
    """RandomNoise, as the core node makes it."""

    def __init__(self, seed: int = 5) -> None:
        self.seed = seed

    def generate_noise(self, latent):
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


class GivenNoise(Noise):
    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise

    def generate_noise(self, latent):
        return self.noise.clone()


class Shifted(Noise):
    """The same noise, moved around the edges by (rows, columns)."""

    def __init__(self, shifts: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.shifts = shifts

    def generate_noise(self, latent):
        return super().generate_noise(latent).roll(self.shifts, (-2, -1))


@pytest.fixture(scope="module")
def distill(pack):
    import fovea_attention.attention.distill.run as distill

    return distill


@pytest.fixture(scope="module")
def features(pack):
    import fovea_attention.attention.distill.references as features

    return features


@pytest.fixture(autouse=True)
def fresh_cache(features):
    features.CACHE.clear()
    yield
    features.CACHE.clear()


@pytest.fixture(scope="module")
def node(node_classes):
    return node_classes["AttentionDistillSampler"].execute


TYPES = {"eps": "EPS", "v": "V_PREDICTION", "flow": "FLOW"}


@pytest.fixture(scope="module")
def models():
    """One model of each prediction type, made under inference mode as ComfyUI's executor does."""
    with torch.inference_mode():
        return {name: replace(FAMILIES["sd15"], model_type=kind).build() for name, kind in TYPES.items()}


FAMILY = FAMILIES["sd15"]
POSITIVE, NEGATIVE, NULL = (FAMILY.conds(seed) for seed in (1, 2, 7))


def random_latent(seed: int, batch: int = 1, size=SIZE) -> torch.Tensor:
    """A clean latent as it comes from a VAE."""
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed)) * 5


def sigmas_of(model, steps: int = 2) -> torch.Tensor:
    model_sampling = model.get_model_object("model_sampling")
    if hasattr(model_sampling, "shift"):
        return torch.linspace(1, 0, steps + 1)
    times = torch.linspace(len(model_sampling.sigmas) - 1, 0, steps + 1).round().long()[:-1]
    return torch.cat([model_sampling.sigmas[times].cpu(), torch.zeros(1)])


def guider_of(model, cfg: float = CFG, positive=POSITIVE, negative=NEGATIVE):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def run(node, model, *, steps=2, latent=None, reference=None, sampler="euler", noise=None, guider=None, **settings):
    """The node's latent (in the model's units) and its report."""
    settings = {"layers": LAYERS, "iterations": 2, "learning_rate": LR, **settings}
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    null_prompt = settings.pop("null_prompt", NULL)
    with torch.inference_mode():
        output, denoised, report = node(
            noise or Noise(),
            guider or guider_of(model),
            sampler,
            sigmas_of(model, steps),
            latent if isinstance(latent, dict) else {"samples": torch.zeros(1, 4, *SIZE) if latent is None else latent},
            {"samples": random_latent(11) if reference is None else reference},
            null_prompt,
            **settings,
        ).args
    return model.model.process_latent_in(output["samples"]), json.loads(report)


def plain(model, *, steps=2, latent=None, sampler="euler", noise=None, guider=None, mask=None) -> torch.Tensor:
    """The same run without the node, in the model's units."""
    latent = torch.zeros(1, 4, *SIZE) if latent is None else latent
    samples = (noise or Noise()).generate_noise({"samples": latent})
    with torch.inference_mode():
        last = (guider or guider_of(model)).sample(
            samples, latent, comfy.samplers.sampler_object(sampler), sigmas_of(model, steps), denoise_mask=mask,
            disable_pbar=True, seed=5,
        )  # fmt: skip
    return model.model.process_latent_in(last)


# --- ControlNet -------------------------------------------------------------------------------------------------------------


def tiny_controlnet() -> comfy.controlnet.ControlNet:
    """A random ControlNet for ``small_model`` and others of its width."""
    config = {key: value for key, value in UNET_CONFIG.items() if key not in ("out_channels", "transformer_depth_output")}
    config.update(num_res_blocks=[1, 1], channel_mult=[1, 2], num_heads=2, transformer_depth=[1, 1], dtype=torch.float32)
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
    randomise(network, 7)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)


def with_control(control, hint: torch.Tensor, positive=POSITIVE, negative=NEGATIVE):
    """Positive and negative prompt with a ControlNet, as Apply ControlNet makes them."""
    return nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, 1.0, 0.0, 1.0)
