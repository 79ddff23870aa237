"""Other packs' samplers and model wrappers that take the batch apart, or add to it: no image gets what is another's.

Where less is done, it is said. ComfyUI's own batches hold the sampler's images once for each prompt, in the order that its
options tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import torch
from families import FAMILIES, sample
from torch import Tensor

pytestmark = pytest.mark.newest
STEPS, GATE = 8, 0.5
SAID = "the sampler evaluates the images of a batch one by one"


def step(model: Any, x: Tensor, sigmas: Tensor, index: int, extra: Any) -> tuple[Tensor, Tensor]:
    """Return the latent after one step of Euler's method, and the prediction."""
    denoised = torch.cat([model(one, sigmas[index : index + 1], **extra) for one in x.split(1)])
    return x + (x - denoised) / sigmas[index] * (sigmas[index + 1] - sigmas[index]), denoised


def step_by_step(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
    for index in range(len(sigmas) - 1):
        after, denoised = step(model, x, sigmas, index, extra_args)
        if callback is not None:
            callback({"i": index, "denoised": denoised, "x": x, "sigma": sigmas[index], "sigma_hat": sigmas[index]})
        x = after
    return x


def image_by_image(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
    return torch.cat([step_by_step(model, one, sigmas, extra_args, callback, disable) for one in x.split(1)])


def two_images(family: str) -> Tensor:
    return torch.cat([FAMILIES[family].latent()] * 2)


def run(model: Any, family: str, loop: Callable[..., Tensor]) -> Tensor:
    start = two_images(family)
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
    gated = node_classes["TGateCache"].execute(model, gate_at=GATE, **settings)[0]
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


# --- model wrappers -------------------------------------------------------------------------------------------------------


def part(call: dict[str, Any], rows: list[int], **told: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return some rows of a model call, with what is ``told`` of them in the options."""
    x, arguments = call["input"], call["c"]
    own = {name: v[rows] if isinstance(v, Tensor) and len(v) == len(x) else v for name, v in arguments.items()}
    own["transformer_options"] = {**arguments["transformer_options"], **told}
    return x[rows], call["timestep"][rows], own


def in_pieces(apply: Any, call: dict[str, Any], pieces: list[list[int]], told: Callable[[int], dict[str, Any]]) -> Tensor:
    calls = [part(call, rows, **told(index)) for index, rows in enumerate(pieces)]
    return torch.cat([apply(x, timestep, **arguments) for x, timestep, arguments in calls])


def prompts(call: dict[str, Any], names: tuple[str, ...]) -> tuple[list[list[int]], Callable[[int], dict[str, Any]]]:
    """Return the rows of each prompt, and what tells of it by these options."""
    options = call["c"]["transformer_options"]
    size = len(call["input"]) // len(options["uuids"])
    rows = [list(range(index * size, (index + 1) * size)) for index in range(len(options["uuids"]))]
    return rows, lambda index: {name: [options[name][index]] for name in names}


def prompt_by_prompt(apply: Any, call: dict[str, Any]) -> Tensor:
    return in_pieces(apply, call, *prompts(call, ("cond_or_uncond", "uuids")))


def prompt_by_prompt_half_told(apply: Any, call: dict[str, Any]) -> Tensor:
    return in_pieces(apply, call, *prompts(call, ("cond_or_uncond",)))


def prompt_by_prompt_untold(apply: Any, call: dict[str, Any]) -> Tensor:
    return in_pieces(apply, call, *prompts(call, ()))


def one_image_at_a_time(apply: Any, call: dict[str, Any]) -> Tensor:
    return in_pieces(apply, call, [[row] for row in range(len(call["input"]))], lambda _: {})


def doubled(apply: Any, call: dict[str, Any]) -> Tensor:
    options, rows = call["c"]["transformer_options"], list(range(len(call["input"])))
    x, timestep, arguments = part(call, rows * 2, **{name: options[name] * 2 for name in ("cond_or_uncond", "uuids")})
    return apply(x, timestep, **arguments)[: len(rows)]


def doubled_untold(apply: Any, call: dict[str, Any]) -> Tensor:
    rows = list(range(len(call["input"])))
    x, timestep, arguments = part(call, rows * 2)
    return apply(x, timestep, **arguments)[: len(rows)]


def without_uuids(apply: Any, call: dict[str, Any]) -> Tensor:
    arguments = dict(call["c"])
    options = arguments["transformer_options"]
    arguments["transformer_options"] = {name: value for name, value in options.items() if name != "uuids"}
    return apply(call["input"], call["timestep"], **arguments)


UNTOLD = [
    prompt_by_prompt_half_told, prompt_by_prompt_untold, one_image_at_a_time, doubled, doubled_untold, without_uuids,
]  # fmt: skip
CHANGED = "another node changes the batch of a model call"


def wrapped(model: Any, wrapper: Any) -> Any:
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("wrapper", UNTOLD)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_tgate_is_off_where_a_batch_is_not_what_is_told(node_classes: Any, caplog: Any, wrapper: Any, family: str) -> None:
    model = wrapped(FAMILIES[family].build(), wrapper)
    gated = node_classes["TGateCache"].execute(model, gate_at=GATE, schedule="as published")[0]
    with caplog.at_level(logging.INFO):
        found = sample(FAMILIES[family], gated, steps=STEPS, latent_image=two_images(family))
    assert CHANGED in caplog.text
    assert torch.equal(found, sample(FAMILIES[family], model, steps=STEPS, latent_image=two_images(family)))


@pytest.mark.parametrize("wrapper", UNTOLD)
def test_no_maps_where_a_batch_is_not_what_is_told(node_classes: Any, wrapper: Any) -> None:
    watched, maps = node_classes["AttnMapCapture"].execute(wrapped(FAMILIES["sd15"].build(), wrapper)).args
    sample(FAMILIES["sd15"], watched, latent_image=two_images("sd15"))
    with pytest.raises(ValueError, match=f"Nothing could be recorded in this run: {CHANGED}"):
        maps.heat()


def test_a_batch_that_is_told_right_is_reused_and_recorded(node_classes: Any, caplog: Any) -> None:
    family, model = FAMILIES["sd15"], FAMILIES["sd15"].build()
    found = []
    for own in (model, wrapped(model, prompt_by_prompt)):
        gated = node_classes["TGateCache"].execute(own, gate_at=GATE, schedule="as published")[0]
        watched, maps = node_classes["AttnMapCapture"].execute(gated).args
        caplog.clear()
        with caplog.at_level(logging.INFO):
            image = sample(family, watched, steps=STEPS, latent_image=two_images("sd15"))
        assert "cross-attention reused in 4 of 8 steps" in caplog.text
        found.append((image, maps.heat(batch=1)))
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-5 * float(together.abs().max()))
