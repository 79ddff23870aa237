"""Changing a sampler's own latent once per step, before the model sees it.

A sampler's function is given a stand-in for its model. The stand-in knows from the sampler's progress calls which step it
is in, recognises the one evaluation of that step whose latent the sampler goes on with, and lets ``before_step`` change
that very tensor. What the sampler does with its history, its noise and its other evaluations is untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.samplers
from torch import Tensor

# Samplers that evaluate twice at a step's own sigma, the second time at the latent they go on with. (The first one ends the
# step before: Heun's correction, or a midpoint that falls on the next sigma.)
_STATE_COMES_SECOND = {
    "sample_heun",
    "sample_heunpp2",
    "sample_exp_heun_2_x0",
    "sample_exp_heun_2_x0_sde",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_2s_ancestral_cfg_pp",
}

# Samplers whose latent is a copy by the time the model sees it, or whose steps are not the schedule's.
_HIDING_LOOPS = {"sample_unipc", "sample_unipc_bh2", "dpm_fast_function", "dpm_adaptive_function"}
GOOD_SAMPLERS = "euler, dpmpp_2m, heun, dpmpp_sde or ddim"
_RELATIVE_SLACK = 1e-4

# (the sampler's model, step, latent, sigma of the batch, the model call's other arguments)
BeforeStep = Callable[[Any, int, Tensor, Tensor, dict[str, Any]], None]


def sampler_name(sampler: Any) -> str:
    """Return the name of a sampler as its menu has it."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return str(name).removeprefix("sample_").removesuffix("_function").replace("unipc", "uni_pc")


def hides_latent(sampler: Any) -> bool:
    """Return whether a sampler's latent cannot be reached between its steps: it brings its own loop, or works on a copy."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        return True
    return getattr(sampler.sampler_function, "__name__", "") in _HIDING_LOOPS


def check_sampler(sampler: Any) -> None:
    """Raises ``ValueError`` where the sampler's latent cannot be changed."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"The sampler {sampler_name(sampler)} brings its own loop, so its latent cannot be guided. Use {GOOD_SAMPLERS}."
        )
    if hides_latent(sampler):
        raise ValueError(f"The sampler {sampler_name(sampler)} hides its latent, so it cannot be guided. Use {GOOD_SAMPLERS}.")


def with_steps(sampler: Any, before_step: BeforeStep, steps: Callable[[int], bool]) -> Any:
    """Return the same sampler, with ``before_step`` called once in each step that ``steps`` names.

    Raises:
        ValueError: ``check_sampler``; while sampling, where the sampler turns out to go on with another latent.
    """
    check_sampler(sampler)
    function = sampler.sampler_function

    @functools.wraps(function)
    def stepped(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None, **options: Any
    ) -> Any:
        stand_in = _Steps(model, sigmas, before_step, steps, sampler_name(sampler), callback)
        stand_in.state_comes_second = getattr(function, "__name__", "") in _STATE_COMES_SECOND
        return function(stand_in, x, sigmas, extra_args=extra_args, callback=stand_in.progress, disable=disable, **options)

    return comfy.samplers.KSAMPLER(stepped, sampler.extra_options, sampler.inpaint_options)


class _Steps:
    """Stands in for the model that a sampler's function calls."""

    def __init__(
        self, model: Any, sigmas: Tensor, before_step: BeforeStep, steps: Callable[[int], bool], name: str, callback: Any
    ) -> None:
        self._model = model
        self._sigmas: list[float] = sigmas.tolist()
        self._before_step = before_step
        self._steps = steps
        self._name = name
        self._callback = callback
        self._step = 0
        self._seen = 0
        self._changed: Tensor | None = None
        self.state_comes_second = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
        if self._steps(self._step) and self._is_state(sigma):
            self._before_step(self._model, self._step, x, sigma, kwargs)
            self._changed = x
        return self._model(x, sigma, **kwargs)

    def _is_state(self, sigma: Tensor) -> bool:
        if self._step >= len(self._sigmas) - 1:
            return False
        own, given = self._sigmas[self._step], float(sigma.flatten()[0])
        if abs(given - own) > _RELATIVE_SLACK * abs(own):
            return False
        self._seen += 1
        return self._seen == (2 if self.state_comes_second and self._step > 0 else 1)

    def progress(self, state: dict[str, Any]) -> None:
        """The sampler's call at the end of a step's evaluation."""
        if self._steps(self._step) and (self._changed is None or state.get("x") is not self._changed):
            raise ValueError(
                f"The sampler {self._name} does not evaluate its steps' own latents, so it cannot be guided. Use {GOOD_SAMPLERS}."
            )
        self._changed = None
        self._step, self._seen = state["i"] + 1, 0
        if self._callback is not None:
            self._callback(state)


def seen_by_the_model(model: Any, x: Tensor, sigma: Tensor, mask: Tensor | None) -> Tensor:
    """Return the latent that the network will see: with an inpaint mask (``denoise_mask``) ComfyUI puts the known image,
    with its noise, around the part that is sampled."""
    if mask is None:
        return x
    base_model = model.inner_model.inner_model
    known = base_model.scale_latent_inpaint(x=x, sigma=sigma, noise=model.noise, latent_image=model.latent_image)
    return x * mask + known * (1 - mask)
