"""Which noise level an evaluation has is known without asking the device for it, and is the right one under every sampler."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling
from comfy.patcher_extension import WrappersMP
from tiny_unet import cond, sample, small_model

STEPS, CHECKED = 10, 4

# ComfyUI's own loops that also evaluate between two steps, behind one, or by a schedule of their own. (Ancestral second-order
# loops do not: with all of their noise the midpoint is the next step's level.)
OFF_THE_SCHEDULE = {
    "dpm_2", "dpm_adaptive", "dpm_fast", "dpmpp_sde", "dpmpp_sde_gpu", "heunpp2", "sa_solver_pece", "seeds_2", "seeds_3",
}  # fmt: skip


class Asked(torch.Tensor):
    """A tensor that counts how often Python asks for a number of it."""

    times = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Asked.times += function in (torch.Tensor.__float__, torch.Tensor.item, torch.Tensor.tolist)
        return super().__torch_function__(function, types, args, kwargs or {})


class Watch:
    """Sees each evaluation before the pack and behind it: how often it was asked, and (told level, true level)."""

    def __init__(self) -> None:
        self.asked = 0
        self.levels: list[tuple[float, float]] = []

    def before(self, executor: Any, x: Any, timestep: torch.Tensor, *args: Any) -> Any:
        Asked.times = 0
        result = executor(x, timestep.as_subclass(Asked), *args)
        self.asked += Asked.times
        return result

    def behind(self, executor: Any, x: Any, timestep: torch.Tensor, options: dict[str, Any], *args: Any) -> Any:
        timestep = timestep.as_subclass(torch.Tensor)
        self.levels.append((options["fovea.sigma"], float(timestep.max())))
        return executor(x, timestep, options, *args)

    def on(self, model: Any, *apply: Any) -> Any:
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "before", self.before)
        for node in apply:
            model = node(model)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "behind", self.behind)
        return model

    def all_true(self) -> bool:
        return bool(self.levels) and all(told == pytest.approx(true, rel=1e-6) for told, true in self.levels)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def tgate(node_classes):
    return lambda model: node_classes["TGateCache"].execute(model)[0]


def run_with(model: Any, sampler: Any) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(cond(0), cond(1))
    guider.set_cfg(5.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return guider.sample(noise, torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("scheduler", ["normal", pytest.param("karras", marks=pytest.mark.newest)])
@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_is_followed_or_asked(tgate, model, sampler, scheduler):
    watch = Watch()
    sample(watch.on(model, tgate), steps=STEPS, sampler=sampler, scheduler=scheduler)
    assert watch.all_true()
    if sampler in OFF_THE_SCHEDULE:
        assert watch.asked == len(watch.levels)
    else:  # once or twice a step, and then no more
        assert watch.asked in (CHECKED, 2 * CHECKED - 1)


def test_two_nodes_ask_no_more_than_one(node_classes, tgate, model):
    watch = Watch()
    sample(watch.on(model, tgate, lambda model: node_classes["AttnMapCapture"].execute(model)[0]), steps=STEPS)
    assert watch.all_true() and watch.asked == CHECKED


def test_a_run_of_twice_the_steps_asks_no_more_often(tgate, model):
    asked = []
    for steps in (STEPS, 2 * STEPS):
        watch = Watch()
        sample(watch.on(model, tgate), steps=steps)
        asked.append(watch.asked)
    assert asked == [CHECKED, CHECKED]


def skips(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Tells its progress like Euler, but late in the run it evaluates a third further down."""
    for i in range(len(sigmas) - 1):
        level = sigmas[i] * (1 if i < CHECKED + 2 else 0.66)
        denoised = model(x, level * x.new_ones([len(x)]), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]
    return x


@pytest.mark.parametrize(
    "sampler",
    [
        comfy.samplers.KSAMPLER(skips),
        comfy.samplers.KSAMPLER(sampling.sample_euler, {"s_churn": 3.0, "s_tmax": 1.0}),
    ],
    ids=["another pack's", "churn"],
)
def test_a_sampler_that_may_leave_the_schedule_is_asked_every_time(tgate, model, sampler):
    watch = Watch()
    run_with(watch.on(model, tgate), sampler)
    assert watch.all_true() and watch.asked == len(watch.levels) == STEPS


def test_a_sampler_that_another_node_runs_twice(tgate, model):
    """A second descent begins at the first level again, before any progress is told."""
    watch = Watch()

    def twice(executor: Any, *args: Any) -> Any:
        executor(*args)
        return executor(*args)

    watched = watch.on(model, tgate)
    watched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "twice", twice)
    run_with(watched, comfy.samplers.sampler_object("euler"))
    assert watch.all_true() and len(watch.levels) == 2 * STEPS


def test_a_run_that_broke_off_leaves_the_next_one_its_own_levels(tgate, model):
    watch = Watch()
    watched = watch.on(model, tgate)

    def breaks(step: int, *args: Any) -> None:
        if step == 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sample(watched, steps=STEPS, callback=breaks)
    sample(watched, steps=STEPS)
    assert watch.all_true() and len(watch.levels) == 5 + STEPS


@pytest.mark.parametrize("breaks_at", [None, 4])
def test_the_samplers_own_options_are_used_and_left_as_they_were(tgate, model, breaks_at):
    """Another node may hold on to them and change them while the sampler runs."""
    seen: list[Any] = []

    def holds(executor: Any, guider: Any, sigmas: Any, extra_args: dict[str, Any], *args: Any) -> Any:
        options = extra_args["model_options"]["transformer_options"]
        before = dict(options)
        seen.append(options)
        try:
            return executor(guider, sigmas, extra_args, *args)
        finally:
            assert options == before | {"another": 0}

    def changes(step: int, *args: Any) -> None:
        seen[0]["another"] = 0
        if step == breaks_at:
            raise RuntimeError("enough")

    def reads(executor: Any, x: Any, timestep: Any, options: Any, *args: Any) -> Any:
        seen.append(options["transformer_options"].get("another"))
        return executor(x, timestep, options, *args)

    held = model.clone()
    held.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "holds", holds)
    held = tgate(held)
    held.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "reads", reads)
    try:
        sample(held, steps=STEPS, callback=changes)
    except RuntimeError as error:
        assert breaks_at is not None and str(error) == "enough"
    assert seen[1:] == [None] + [0] * (breaks_at or STEPS - 1)


def test_progress_is_told_as_without_the_pack(tgate, model):
    told: dict[bool, list[Any]] = {False: [], True: []}
    for gated, calls in told.items():
        sample(tgate(model) if gated else model, steps=3, callback=lambda *args, calls=calls: calls.append((args[0], args[3])))
    assert told[True] == told[False] == [(0, 3), (1, 3), (2, 3)]
