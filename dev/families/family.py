"""A tiny random model of one family of networks, built from ComfyUI's own classes, and conditioning that fits it.

Each one is ComfyUI's real configuration class -> BaseModel -> ModelPatcher with small numbers, so it samples through the
real sampler. Weights are seeded and scaled so that attention is neither uniform nor saturated and every gate is open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

try:
    from comfy.nested_tensor import NestedTensor
except ImportError:
    pass  # an older release has no such latents

Conditioning = list[list[Any]]
Extras = Callable[[torch.Generator], dict[str, Any]]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """How one family is built, prompted and sampled.

    Attributes:
        config: name of its class in ``comfy.supported_models``.
        network: module of the network, under ``comfy.ldm``; a release without it does not know the family.
        unet: what the network is built from.
        channels: of the latent; ``size`` is its height and width, ``frames`` its length for video networks (0: an image).
        width, tokens: of the text features.
        extras: what else its conditioning carries.
        model_type: where the config would read it from a checkpoint's keys.
        optional: settings that only some releases' networks know.
        weights: what the config reads from a checkpoint while it makes the model.
        audio: shape of a second latent (channels, ...) that is sampled together with the first.
        has_prompt: its text features come from words.
        start: spread of the latent that it starts from, where that is an image and not noise.
    """

    name: str
    config: str
    network: str
    unet: dict[str, Any]
    channels: int = 16
    size: tuple[int, int] = (16, 12)
    frames: int = 0
    tokens: int = 20
    width: int = 64
    extras: Extras = lambda generator: {}
    model_type: str | None = None
    optional: dict[str, Any] = field(default_factory=dict)
    parameters: str = ""  # the class whose fields say which of `optional` this ComfyUI knows
    weights: Callable[[], dict[str, torch.Tensor]] = dict
    audio: tuple[int, ...] = ()
    has_prompt: bool = True
    start: float = 0.0

    @property
    def available(self) -> bool:
        """Whether the ComfyUI under test has this family."""
        try:
            import_module(f"comfy.ldm.{self.network}")
        except ImportError:
            return False
        return hasattr(comfy.supported_models, self.config)

    def build(self, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
        config = getattr(comfy.supported_models, self.config)({**self.unet, **self._known_options(), "dtype": torch.float32})
        config.unet_config.update(self.unet)  # a config may put its checkpoint's sizes in place of what it is given
        if self.model_type is None:
            model = config.get_model(self.weights())
        else:
            model = comfy.model_base.BaseModel(config, getattr(comfy.model_base.ModelType, self.model_type))
        randomise(model, seed)
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        return kind(model.eval(), load_device=CPU, offload_device=CPU)

    def conds(self, seed: int = 1, tokens: int | None = None) -> Conditioning:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens or self.tokens, self.width, generator=generator)
        return [[context, self.extras(generator)]]

    def latent(self, batch: int = 1, size: tuple[int, int] | None = None) -> Any:
        frames = (self.frames,) if self.frames else ()
        image = torch.zeros(batch, self.channels, *frames, *(size or self.size))
        return NestedTensor((image, torch.zeros(batch, *self.audio))) if self.audio else image

    def _known_options(self) -> dict[str, Any]:
        if not self.optional:
            return {}
        module, name = self.parameters.rsplit(".", 1)
        known = inspect.signature(getattr(import_module(f"comfy.ldm.{module}"), name)).parameters
        return {key: value for key, value in self.optional.items() if key in known}


def sample(
    family: Family,
    model: comfy.model_patcher.ModelPatcher,
    *,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    steps: int = 2,
    cfg: float = 3.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    latent_image: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int = 3,
    **options: Any,
) -> torch.Tensor:
    """Sample as the KSampler node does, under the executor's inference mode."""
    start = family.latent() if latent_image is None else latent_image
    if noise is None:
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive or family.conds(1), negative or family.conds(2), start,
            seed=seed, disable_pbar=True, **options,
        )  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill in seeded weights that keep activations near one: norms one, matrices by fan-in, everything else small."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if norm and name in ("weight", "scale"):
                parameter.fill_(1.0)
                continue
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and name == "weight" else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("pos_embed", "inv_freq"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5)


def pooled(width: int) -> Extras:
    return lambda generator: {"pooled_output": torch.randn(1, width, generator=generator)}


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)
