"""Samplers of other packs that evaluate the images of a batch one by one: no image gets what is another's, and it is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import torch
from families import FAMILIES
from torch import Tensor

pytestmark = pytest.mark.newest
STEPS = 8
SAID = "the sampler evaluates the images of a batch one by one"


def step(model: Any, x: Tensor, sigmas: Tensor, index: int, extra: Any) -> tuple[Tensor, Tensor]:
    """Return the latent after one step of Euler's method, and the prediction."""
    denoised = torch.cat([model(one, sigmas[index : index + 1], **extra) for one in x.split(1)])
    return x + (x - denoised) / sigmas[index] * (sigmas[index + 1] - sigmas[index]), denoised


def step_by_step(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
    for index in range(len(sigmas) - 1):
        after, denoised = step(model, x, sigmas, index, extra_args)
        callback({"i": index, "denoised": denoised, "x": x, "sigma": sigmas[index], "sigma_hat": sigmas[index]})
        x = after
    return x


def image_by_image(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
    return torch.cat([step_by_step(model, one, sigmas, extra_args, callback, disable) for one in x.split(1)])


def run(model: Any, family: str, loop: Callable[..., Tensor]) -> Tensor:
    start = FAMILIES[family].latent().expand(2, -1, *[-1] * (FAMILIES[family].latent().ndim - 2)).clone()
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(FAMILIES[family].conds(1), FAMILIES[family].conds(2))
    guider.set_cfg(3.0)
    with torch.inference_mode():
        return guider.sample(noise, start, comfy.samplers.KSAMPLER(loop), sigmas, disable_pbar=True, seed=3)


@pytest.mark.parametrize("loop", [step_by_step, image_by_image])
@pytest.mark.parametrize("family", ["sd15", "flux", "wan_t2v"])
@pytest.mark.parametrize("settings", [{"schedule": "as published"}, {"schedule": "skip steps", "max_error": 1.0}])
def test_tgate_leaves_the_images_alone(node_classes: Any, caplog: Any, loop: Any, family: str, settings: dict[str, Any]) -> None:
    model = FAMILIES[family].build()
    gated = node_classes["TGateCache"].execute(model, gate_at=0.5, **settings)[0]
    with caplog.at_level(logging.INFO):
        found = run(gated, family, loop)
    assert SAID in caplog.text
    assert torch.equal(found, run(model, family, loop))


@pytest.mark.parametrize("loop", [step_by_step, image_by_image])
def test_no_maps_rather_than_those_of_the_first_image(node_classes: Any, loop: Any) -> None:
    watched, maps = node_classes["AttnMapCapture"].execute(FAMILIES["sd15"].build()).args
    run(watched, "sd15", loop)
    with pytest.raises(ValueError, match=f"Nothing could be recorded in this run: {SAID}: sample one image at a time"):
        maps.heat()


@pytest.mark.parametrize("loop", [step_by_step, image_by_image])
def test_guidance_is_refused(node_classes: Any, loop: Any) -> None:
    guided = node_classes["FoveaAttendExcite"].execute(FAMILIES["sd15"].build(), subjects="2, 5")[0]
    with pytest.raises(ValueError, match=f"{loop.__name__} evaluates the images of a batch one by one"):
        run(guided, "sd15", loop)
