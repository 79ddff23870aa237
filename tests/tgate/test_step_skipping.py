"""T-GATE Cache that skips whole steps: the image of a plain restatement, calls counted, and a reason where nothing is skipped."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_perpneg as perpneg
import node_helpers
import pytest
import torch
from families import FAMILIES
from families import sample as sample_family
from host_inprocess import host_node
from leftovers import snapshot
from scenes import evaluate
from tgate_reference import assert_same_image
from tiny_unet import cond, latent, sample, small_model

STEPS = 12

pytestmark = pytest.mark.newest


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level("INFO", logger="fovea")


@pytest.fixture
def skipping(node_classes):
    def apply(model, **settings):
        return node_classes["TGateCache"].execute(model, **{"schedule": "skip steps", **settings})[0]

    return apply


@pytest.fixture(scope="module")
def scenes(pack):
    model, clip, vae = evaluate.load()
    return model, evaluate.encode(clip, ["a red circle and a blue square"]), evaluate.encode(clip, [""])


@pytest.fixture(scope="module")
def small():
    return small_model()


def generate(model, positive, negative, steps: int = STEPS, **options) -> torch.Tensor:
    return sample(model, positive, negative, steps=steps, latent_image=torch.zeros(1, 3, 32, 32), **options)


@dataclass
class Calls:
    """Rows of each call of a model's network that was computed."""

    model: Any
    rows: list[int] = field(default_factory=list)

    def __enter__(self) -> Calls:
        network = self.model.model.diffusion_model  # EasyCache acts inside its forward, before the first block
        first = network.input_blocks[0][0] if hasattr(network, "input_blocks") else network
        self.handle = first.register_forward_pre_hook(lambda module, args: self.rows.append(args[0].shape[0]))
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def skipped_in(text: str) -> int:
    return int(re.findall(r"T-GATE: (\d+) of \d+ steps skipped", text)[-1])


@dataclass
class Restated:
    """The same without skipping anything: the whole model always runs, and predictions are overwritten. Euler's steps only."""

    gate: int
    max_error: float
    cfg: float
    points: list[tuple[float, list[torch.Tensor]]] = field(default_factory=list)
    bend: float | None = None
    skipped: list[int] = field(default_factory=list)

    def apply(self, model: Any) -> Any:
        patched = model.clone()
        patched.add_wrapper_with_key("calc_cond_batch", "restated", self)
        return patched

    def __call__(self, executor, network, conds, x, timestep, options):
        outputs = executor(network, conds, x, timestep, options)
        sigmas, sigma = options["transformer_options"]["sample_sigmas"].tolist(), float(timestep.max())
        step = min(range(len(sigmas) - 1), key=lambda i: abs(sigmas[i] - sigma))
        if len(self.points) == 2:
            (first, a), (second, b) = self.points
            ahead, apart = math.log(sigma / second), math.log(second / first)
            predicted = [x - sigma * (v + (v - u) * ahead / apart) for u, v in zip(a, b, strict=True)]
            expected = None if self.bend is None else self.bend * ahead * (ahead + apart) * (1 - sigmas[step + 1] / sigma)
            if step >= self.gate and expected is not None and expected <= self.max_error:
                self.skipped.append(step)
                return predicted
            off = self._guided(predicted) - self._guided(outputs)
            self.bend = float(off.norm() / self._guided(outputs).norm()) / (ahead * (ahead + apart))
        self.points = [*self.points[-1:], (sigma, [(x - output) / sigma for output in outputs])]
        return outputs

    def _guided(self, two: list[torch.Tensor]) -> torch.Tensor:
        return two[1] + self.cfg * (two[0] - two[1])


@pytest.mark.parametrize(("gate", "max_error"), [(0.4, 0.03), (0.25, 0.06), (0.6, 0.015)])
def test_equals_the_restatement(skipping, caplog, scenes, gate, max_error):
    model, positive, negative = scenes
    restated = Restated(round(gate * 20), max_error, cfg=8.0)
    expected = generate(restated.apply(model), positive, negative, steps=20)
    with Calls(model) as calls:
        result = generate(skipping(model, gate_at=gate, max_error=max_error), positive, negative, steps=20)
    assert_same_image(result, expected)
    assert restated.skipped and skipped_in(caplog.text) == len(restated.skipped)
    assert sum(calls.rows) == 2 * (20 - len(restated.skipped))


def test_nearer_to_the_plain_image_than_the_published_schedule(skipping, scenes, caplog):
    """And at most as many rows, on the embedded model."""
    model, positive, negative = scenes
    plain = generate(model, positive, negative, steps=25)
    with Calls(model) as ours:
        skipped = generate(skipping(model), positive, negative, steps=25)
    with Calls(model) as theirs:
        published = generate(skipping(model, schedule="as published"), positive, negative, steps=25)
    assert (skipped - plain).norm() < 0.2 * (published - plain).norm()
    assert sum(ours.rows) <= sum(theirs.rows) + 3 and skipped_in(caplog.text.split("cross-attention")[0]) >= 6


def test_the_larger_max_error_the_more_steps_are_skipped(skipping, scenes, caplog):
    model, positive, negative = scenes
    counts, distances, plain = [], [], generate(model, positive, negative, steps=20)
    for allowed in (0.005, 0.02, 0.1):
        distances.append((generate(skipping(model, max_error=allowed), positive, negative, steps=20) - plain).norm())
        counts.append(skipped_in(caplog.text))
    assert counts == sorted(counts) and counts[0] < counts[-1] and distances[0] < distances[-1]


def test_a_graph_saved_without_the_input_keeps_its_image(node_classes, small):
    """The node in the browser starts with the new schedule; a missing input stands for the old one."""
    schema = {one.id: one for one in node_classes["TGateCache"].GET_SCHEMA().inputs}
    assert schema["schedule"].default == "skip steps"
    saved = node_classes["TGateCache"].execute(small, gate_at=0.4, sp_interval=5)[0]
    chosen = node_classes["TGateCache"].execute(small, gate_at=0.4, sp_interval=5, schedule="as published")[0]
    assert torch.equal(sample(saved), sample(chosen))


# --- guiders, samplers, networks --------------------------------------------------------------------------------------


def run_guider(guider, steps: int = STEPS, sampler: str = "euler", sigmas: Any = None) -> torch.Tensor:
    levels = custom.BasicScheduler.execute(guider.model_patcher, "normal", steps, 1.0)[0] if sigmas is None else sigmas
    with torch.inference_mode():
        return custom.SamplerCustomAdvanced.execute(
            custom.RandomNoise.execute(3)[0], guider, custom.KSamplerSelect.execute(sampler)[0], levels, {"samples": latent()}
        )[0]["samples"]


GUIDERS = {
    "cfg 1": (1, lambda model: custom.BasicGuider.execute(model, cond(1))[0]),
    "two positive prompts": (3, lambda model: custom.CFGGuider.execute(model, cond(1) + cond(4), cond(2), 7.0)[0]),
    "dual CFG": (3, lambda model: custom.DualCFGGuider.execute(model, cond(1), cond(4), cond(2), 5.0, 3.0, "regular")[0]),
    "Perp-Neg": (3, lambda model: perpneg.PerpNegGuider.execute(model, cond(1), cond(2), cond(8), 7.0, 1.0)[0]),
}


@pytest.mark.parametrize("kind", GUIDERS)
def test_every_guider(skipping, caplog, small, kind):
    rows, guider = GUIDERS[kind]
    plain = run_guider(guider(small))
    with Calls(small) as calls:
        result = run_guider(guider(skipping(small)))
    skipped = skipped_in(caplog.text)
    assert skipped > 0 and sum(calls.rows) == rows * (STEPS - skipped)
    assert 0 < (result - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("sampler", ["heun", "heunpp2", "dpmpp_2m", "uni_pc", "euler_cfg_pp", "dpm_adaptive"])
def test_samplers_without_noise(skipping, caplog, small, sampler):
    plain = sample(small, steps=STEPS, sampler=sampler)
    with Calls(small) as whole:
        sample(small, steps=STEPS, sampler=sampler)
    with Calls(small) as calls:
        result = sample(skipping(small), steps=STEPS, sampler=sampler)
    assert (result - plain).norm() < 0.05 * plain.norm()
    assert sum(calls.rows) < sum(whole.rows) or "; " in caplog.text


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_multistep_samplers_carry_errors_on(skipping, caplog, scenes, scheduler):
    """The last but one step of *normal* takes an error several times over, so fewer steps are skipped there."""
    model, positive, negative = scenes
    plain = generate(model, positive, negative, steps=20, sampler="dpmpp_2m", scheduler=scheduler, seed=0)
    result = generate(skipping(model), positive, negative, steps=20, sampler="dpmpp_2m", scheduler=scheduler, seed=0)
    assert (result - plain).norm() < 0.06 * plain.norm()
    generate(skipping(model), positive, negative, steps=20, seed=0)
    multistep, single = (int(count) for count in re.findall(r"T-GATE: (\d+) of \d+ steps skipped", caplog.text))
    assert multistep < single


def test_how_much_an_error_grows(pack):
    from fovea_attention.attention.tgate.skipping import growth_of_errors

    assert growth_of_errors([8.0, 4.0, 2.0, 1.0, 0.0]) == 1.0
    assert growth_of_errors([2.0, 1.0, 0.125, 0.0]) == pytest.approx(0.875 * (1 + 3))
    assert growth_of_errors([1.0]) == growth_of_errors([0.5, 0.5, 1.0, 2.0]) == 1.0


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [("dpmpp_2m", True), ("dpmpp_3m_sde", True), ("uni_pc", True), ("lms", True), ("ipndm_v", True), ("res_multistep", True),
     ("deis", True), ("euler", False), ("heun", False), ("ddim", False), ("dpmpp_sde", False), ("lcm", False)],
)  # fmt: skip
def test_multistep_samplers_are_known(pack, sampler, expected):
    from fovea_attention.attention.host import uses_last_predictions

    assert uses_last_predictions(comfy.samplers.sampler_object(sampler)) is expected


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_samplers_that_add_noise_are_computed_in_full_and_say_so(skipping, caplog, scenes, sampler):
    model, positive, negative = scenes
    plain = generate(model, positive, negative, sampler=sampler)
    result = generate(skipping(model), positive, negative, sampler=sampler)
    if skipped_in(caplog.text) == 0:
        assert torch.equal(result, plain) and "samplers that add noise" in caplog.text
    else:
        assert (result - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_joint_attention_gains_too(skipping, caplog, name):
    family = FAMILIES[name]
    model = family.build()
    with Calls(model) as calls:
        sample_family(family, skipping(model, max_error=0.1), steps=24, cfg=1.0)
    skipped = skipped_in(caplog.text)
    assert skipped > 0 and sum(calls.rows) == 24 - skipped


def test_blocks_compiled_in_place(skipping, caplog, small):
    """No module gets another ``forward``, so a network that ignores one gains as much. (Nothing is compiled here.)"""
    expected = sample(skipping(small), steps=STEPS)
    blocks = [m for m in small.model.diffusion_model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    try:
        for block in blocks:
            block._compiled_call_impl = block._call_impl
        with Calls(small) as calls:
            assert torch.equal(sample(skipping(small), steps=STEPS), expected)
    finally:
        for block in blocks:
            block._compiled_call_impl = None
    assert sum(calls.rows) == 2 * (STEPS - skipped_in(caplog.text)) < 2 * STEPS


def test_a_rising_noise_level(skipping, caplog, small):
    sigmas = torch.linspace(0.05, 10, STEPS + 1)
    guider = custom.CFGGuider.execute(small, cond(1), cond(2), 3.0)[0]
    plain = run_guider(guider, sigmas=sigmas)
    result = run_guider(custom.CFGGuider.execute(skipping(small), cond(1), cond(2), 3.0)[0], sigmas=sigmas)
    assert skipped_in(caplog.text) > 0 and (result - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("again", [0.8, 1.0, 1.2])
def test_a_noise_level_that_comes_back(skipping, small, again):
    sigmas = torch.tensor([14.6, 8.0, 5.0, 3.0, 2.0, 1.2, 0.8, again, 0.5, 0.3, 0.15, 0.05, 0.0])
    plain = run_guider(custom.CFGGuider.execute(small, cond(1), cond(2), 3.0)[0], sigmas=sigmas)
    result = run_guider(custom.CFGGuider.execute(skipping(small), cond(1), cond(2), 3.0)[0], sigmas=sigmas)
    assert (result - plain).norm() < 0.05 * plain.norm()


# --- what changes on the way --------------------------------------------------------------------------------------------


def test_prompts_that_change_are_computed_anew(skipping, caplog, scenes):
    """From where another prompt acts no line leads on: three steps are computed before one is skipped."""
    model, positive, negative = scenes
    early = node_helpers.conditioning_set_values(positive, {"start_percent": 0.0, "end_percent": 0.6})
    late = node_helpers.conditioning_set_values(negative, {"start_percent": 0.6, "end_percent": 1.0})
    seen: list[list[tuple[Any, ...]]] = []

    def watch(executor, network, conds, x, timestep, options):
        seen.append([tuple(cond["uuid"] for cond in one if _acts(cond, timestep)) for one in conds])
        return executor(network, conds, x, timestep, options)

    gated = skipping(model, max_error=1.0)
    gated.add_wrapper_with_key("calc_cond_batch", "watch", watch)  # behind T-GATE's: what is computed
    generate(gated, early + late, negative, steps=20)
    changed = next(i for i, (a, b) in enumerate(zip(seen, seen[1:], strict=False)) if a != b) + 1
    assert len(seen) - changed >= 3 and skipped_in(caplog.text) == 20 - len(seen) > 4


@pytest.mark.parametrize("schedule", ["skip steps", "as published"])
def test_a_lora_that_begins_is_computed_anew(node_classes, caplog, scenes, schedule):
    """The step in which a keyframe of a hook begins is computed, with its cross-attention."""
    model, positive, negative = scenes
    weights = model.model.diffusion_model.state_dict()
    lora = {}
    for name in (name for name in weights if name.endswith("attn2.to_v.weight")):
        rows, columns = weights[name].shape
        lora[f"diffusion_model.{name.removesuffix('.weight')}.lora_up.weight"] = torch.full((rows, 1), 0.3)
        lora[f"diffusion_model.{name.removesuffix('.weight')}.lora_down.weight"] = torch.full((1, columns), 0.3)
    hooks, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(0.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(1.0, start_percent=0.6))
    hooks.set_keyframes_on_hooks(keyframes)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    begins = model.get_model_object("model_sampling").percent_to_sigma(0.6)

    def sigmas_of(patched):
        computed: list[float] = []

        def watch(executor, network, conds, x, timestep, options):
            computed.append(float(timestep.max()))
            return executor(network, conds, x, timestep, options)

        watched = patched.clone()
        watched.add_wrapper_with_key("calc_cond_batch", "watch", watch)
        generate(watched, hooked, negative, steps=20)
        return computed

    everything = sigmas_of(model)
    computed = sigmas_of(node_classes["TGateCache"].execute(model, schedule=schedule, gate_at=0.3, max_error=1.0)[0])
    if schedule == "skip steps":
        assert skipped_in(caplog.text) == 20 - len(computed) > 4
        first = next(index for index, sigma in enumerate(everything) if sigma <= begins)
        assert [sigma for sigma in computed if sigma <= begins][:3] == everything[first : first + 3]
    else:
        assert "stored again" in caplog.text


def _acts(cond: dict[str, Any], timestep: torch.Tensor) -> bool:
    sigma = float(timestep.max())
    return cond.get("timestep_start", sigma) >= sigma >= cond.get("timestep_end", sigma)


@pytest.fixture(scope="module")
def skipped_alone(node_classes, scenes):
    """The plain latent of 20 steps, and the rows that T-GATE computes without another cache."""
    model, positive, negative = scenes
    with Calls(model) as calls:
        generate(node_classes["TGateCache"].execute(model, schedule="skip steps")[0], positive, negative, steps=20)
    return generate(model, positive, negative, steps=20), sum(calls.rows)


@pytest.mark.parametrize("first", [True, False], ids=["EasyCache first", "T-GATE first"])
def test_together_with_easycache_less_is_computed(skipping, caplog, scenes, skipped_alone, first):
    model, positive, negative = scenes
    apply = host_node("EasyCacheNode", "comfy_extras.nodes_easycache")
    settings = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    both = skipping(apply(model=model, **settings)[0]) if first else apply(model=skipping(model), **settings)[0]
    plain, alone = skipped_alone
    with Calls(model) as calls:
        result = generate(both, positive, negative, steps=20)
    assert sum(calls.rows) < alone and (result - plain).norm() < 0.15 * plain.norm()
    assert skipped_in(caplog.text) > 0 and "EasyCache skipped" in caplog.text


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_beside_lazycache_the_line_says_which_of_them_skipped(skipping, caplog, scenes, skipped_alone, threshold):
    """Each needs computed steps to know what a skipped one would cost, so one of them often leaves nothing to the other."""
    caplog.set_level("INFO")
    model, positive, negative = scenes
    apply = host_node("LazyCacheNode", "comfy_extras.nodes_easycache")
    lazy = apply(model=model, reuse_threshold=threshold, start_percent=0.15, end_percent=0.95, verbose=False)[0]
    plain, alone = skipped_alone
    with Calls(model) as calls:
        result = generate(skipping(lazy), positive, negative, steps=20)
    ours, theirs = skipped_in(caplog.text), int(re.findall(r"LazyCache - skipped (\d+)/", caplog.text)[-1])
    assert sum(calls.rows) == 2 * (20 - ours - theirs) <= alone
    line = next(record.getMessage() for record in caplog.records if record.name == "fovea")
    assert f"LazyCache skipped {theirs or 'none'}" in line and "add noise" not in line
    assert ours or "the step after one of those is always computed" in line
    if ours:
        assert (result - plain).norm() < 0.1 * plain.norm()


def test_maps_of_a_run_that_skips_steps(skipping, node_classes, caplog, small):
    """Capture changes nothing, and steps that were not computed have no maps."""
    gated = skipping(small)
    expected = sample(gated, steps=STEPS)
    captured, maps = node_classes["AttnMapCapture"].execute(gated).args
    assert torch.equal(sample(captured, steps=STEPS), expected)
    assert 0 < len(maps.recorded_steps()) == STEPS - skipped_in(caplog.text) < STEPS


def test_another_nodes_own_passes_are_said(skipping, caplog, small):
    other = pag.PerturbedAttentionGuidance.execute(small, 3.0)[0]
    plain = sample(other, steps=STEPS)
    result = sample(skipping(other), steps=STEPS)
    skipped = skipped_in(caplog.text)
    assert skipped and f"in {skipped} of them prompts were computed" in caplog.text
    assert (result - plain).norm() < 0.05 * plain.norm()


def test_a_controlnet_that_ends(pack):
    from fovea_attention.attention.host import acting_controls

    class Control:
        def __init__(self, timestep_range=None, previous_controlnet=None):
            self.timestep_range, self.previous_controlnet = timestep_range, previous_controlnet

    two = Control((14.0, 2.0), Control())
    assert acting_controls([[{"control": two}], None, [{}]], 3.0) == (True, True)
    assert acting_controls([[{"control": two}]], 1.0) == (False, True)


# --- what a run leaves, and words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError("stop"), comfy.model_management.InterruptProcessingException()])
def test_a_run_leaves_nothing(skipping, small, error):
    def callback(step, *_):
        if step == 8 and error is not None:
            raise error

    plain = sample(small)
    gated = skipping(small)
    expected, before = sample(gated), (snapshot(small), snapshot(gated))
    if error is None:
        sample(gated, callback=callback)
    else:
        with pytest.raises(type(error)):
            sample(gated, callback=callback)
    assert (snapshot(small), snapshot(gated)) == before
    assert torch.equal(sample(gated), expected) and torch.equal(sample(small), plain)


def test_settings_that_do_not_act_are_named(skipping, caplog, small):
    sample(skipping(small, sp_interval=2, mode="auto"))
    assert "sp_interval, mode act only where schedule is 'as published'" in caplog.text
    caplog.clear()
    sample(skipping(small))
    assert "as published" not in caplog.text


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_few_steps_says_why_nothing_is_skipped(skipping, caplog, small, steps):
    assert torch.equal(sample(skipping(small), steps=steps), sample(small, steps=steps))
    assert "; " in caplog.text and skipped_in(caplog.text) == 0


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5])
def test_bad_values_of_max_error(skipping, small, value):
    with pytest.raises(ValueError, match=f"max_error is {value:g}"):
        skipping(small, max_error=value)
