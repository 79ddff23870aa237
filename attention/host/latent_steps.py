"""Changing a sampler's own latent once per step, before the model sees it.

A sampler's function is given a stand-in for its model. The stand-in knows from the sampler's progress calls which step it
is in, recognises the one evaluation of that step whose latent the sampler goes on with, and lets ``before_step`` change
that very tensor. What the sampler does with its history, its noise and its other evaluations is untouched.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from .stack import on_one_stack

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

# Names of multistep samplers, of ComfyUI and of other packs (res_2m).
_MULTISTEP = re.compile(r"_\dm|multistep|uni_pc|ipndm|^lms|deis|gradient_estimation|er_sde|sa_solver")

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


def uses_last_predictions(sampler: Any) -> bool:
    """Return whether a sampler goes on from the last predictions, too (multistep), by its name; other packs name theirs alike."""
    return _MULTISTEP.search(sampler_name(_innermost(sampler))) is not None


def hides_latent(sampler: Any) -> bool:
    """Return whether a sampler's latent cannot be reached between its steps: it brings its own loop, or works on a copy."""
    inner = _innermost(sampler)
    if not isinstance(inner, comfy.samplers.KSAMPLER):
        return True
    return getattr(inner.sampler_function, "__name__", "") in _HIDING_LOOPS


def check_sampler(sampler: Any) -> None:
    """Raise ``ValueError`` where the sampler's latent, or that of the sampler that it wraps, cannot be changed."""
    inner = _innermost(sampler)
    if not isinstance(inner, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"The sampler {sampler_name(inner)} brings its own loop, so its latent cannot be guided. Use {GOOD_SAMPLERS}."
        )
    if hides_latent(inner):
        raise ValueError(f"The sampler {sampler_name(inner)} hides its latent, so it cannot be guided. Use {GOOD_SAMPLERS}.")


def _wrapped_option(sampler: Any) -> str | None:
    """Return the option in which a sampler holds the one sampler that it wraps (Detail Daemon, Lying Sigma)."""
    options = getattr(sampler, "extra_options", None) or {}
    names = [name for name, value in options.items() if isinstance(value, comfy.samplers.Sampler)]
    return names[0] if len(names) == 1 else None


def _innermost(sampler: Any) -> Any:
    while (name := _wrapped_option(sampler)) is not None:
        sampler = sampler.extra_options[name]
    return sampler


def with_steps(sampler: Any, before_step: BeforeStep, steps: Callable[[int], bool]) -> Any:
    """Return the same sampler, with ``before_step`` called once in each step that ``steps`` names.

    Of a sampler that wraps another one and shows the model other noise levels, the wrapped one is watched: it knows its steps.

    Raises:
        ValueError: ``check_sampler``; while sampling, where the sampler turns out to go on with another latent.
    """
    check_sampler(sampler)
    return _watched(sampler, before_step, steps, [])


def _watched(sampler: Any, before_step: BeforeStep, steps: Callable[[int], bool], outer: list[_Outer]) -> Any:
    function, wrapped = sampler.sampler_function, _wrapped_option(sampler)

    @functools.wraps(function)
    def entered(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None, **options: Any
    ) -> Any:
        layers = [*outer, _Outer(model, sigmas, sampler_name(sampler))]
        if wrapped is not None:
            options = {**options, wrapped: _watched(options[wrapped], before_step, steps, layers)}
            return function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        stand_in = _Steps(model, x, layers, function, before_step, steps, callback)
        told = {"extra_args": extra_args, "callback": stand_in.progress, "disable": disable}
        return on_one_stack(function, stand_in, x, sigmas, **told, **options)

    return comfy.samplers.KSAMPLER(entered, sampler.extra_options, sampler.inpaint_options)


@dataclass(frozen=True)
class _Outer:
    """What a sampler was called with, from the outermost to the one whose steps are watched."""

    model: Any
    sigmas: Tensor
    name: str


class _Steps:
    """Stands in for the model that a sampler's function calls."""

    def __init__(
        self, model: Any, start: Tensor, layers: Sequence[_Outer], function: Any, before_step: BeforeStep,
        steps: Callable[[int], bool], callback: Any,
    ) -> None:  # fmt: skip
        self._model = model
        self._outermost = layers[0].model
        self._sigmas: list[float] = layers[-1].sigmas.tolist()
        self._before_step = before_step
        self._steps = steps
        self._name = " in ".join(layer.name for layer in reversed(layers))
        self._callback = callback
        self._start: Tensor | None = start
        self._step = 0
        self._seen = 0
        self._changed: Tensor | None = None
        self._shifted = False
        self._is_comfy = getattr(function, "__module__", "").startswith("comfy.")
        self._state_comes_second = getattr(function, "__name__", "") in _STATE_COMES_SECOND
        if layers[0].sigmas.tolist() != self._sigmas:
            raise ValueError(
                f"The sampler {layers[0].name} runs {layers[-1].name} on other sigmas than it is given, so its steps cannot be "
                f"guided. Take {layers[0].name} out, or use {GOOD_SAMPLERS} alone."
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
        if self._start is not None:
            self._look_at_first_call(x, sigma)
        if self._steps(self._step) and self._is_state(sigma):
            level = sigma if not self._shifted or self._is_comfy else torch.full_like(sigma, self._sigmas[self._step])
            self._before_step(self._outermost, self._step, x, level, kwargs)
            self._changed = x
        return self._model(x, sigma, **kwargs)

    def _look_at_first_call(self, x: Tensor, sigma: Tensor) -> None:
        """Find out whether the model is shown other noise levels than the steps' own: steps are then told by their order.

        Raises:
            ValueError: it is shown another latent as well, so nothing is left to tell a step by, or a part of the batch.
        """
        start, self._start = self._start, None
        if start is not None and len(x) < len(start):
            raise ValueError(
                f"The sampler {self._name} evaluates the images of a batch one by one, so they cannot be guided. Sample one "
                f"image at a time, or use {GOOD_SAMPLERS}."
            )
        self._shifted = not self._is_level_of(0, sigma)
        if self._shifted and x is not start and not self._is_comfy:
            raise ValueError(
                f"The sampler {self._name} shows the model other noise levels and latents than its steps have, so they cannot "
                f"be guided: it wraps another sampler. Take that wrapper out, or use {GOOD_SAMPLERS} alone."
            )

    def _is_level_of(self, step: int, sigma: Tensor) -> bool:
        own, given = self._sigmas[step], float(sigma.flatten()[0])
        return abs(given - own) <= _RELATIVE_SLACK * abs(own)

    def _is_state(self, sigma: Tensor) -> bool:
        if self._step >= len(self._sigmas) - 1:
            return False
        if not self._shifted and not self._is_level_of(self._step, sigma):
            return False
        self._seen += 1
        return self._seen == (2 if self._state_comes_second and self._step > 0 else 1)

    def progress(self, state: dict[str, Any]) -> None:
        """Go on to the next step: the sampler's call at the end of a step's evaluation."""
        if self._steps(self._step) and (self._changed is None or state.get("x") is not self._changed):
            cause = "wraps another one and changes noise levels, and " if self._shifted else ""
            raise ValueError(
                f"The sampler {self._name} {cause}does not evaluate its steps' own latents, so it cannot be guided. "
                f"Use {GOOD_SAMPLERS}."
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
    known = base_model.scale_latent_inpaint(
        x=x, sigma=sigma, noise=model.noise, latent_image=model.latent_image, denoise_mask=mask
    )
    return x * mask + known * (1 - mask)
