"""Attention Distillation among other nodes: samplers, guiders, masks, families, and what is left behind."""

from __future__ import annotations

import json
import logging

import comfy.model_management
import comfy.samplers
import pytest
import torch
from distill_runs import (
    FAMILY,
    NEGATIVE,
    NULL,
    POSITIVE,
    SIZE,
    Noise,
    guider_of,
    plain,
    random_latent,
    run,
    sigmas_of,
    tiny_controlnet,
    with_control,
)
from families import FAMILIES
from host_inprocess import host_node
from tiny_unet import small_model

__all__ = ["distill", "features", "fresh_cache", "node"]
from distill_runs import distill, features, fresh_cache, node

BRIEF = {"iterations": 1, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return FAMILY.build()


# --- samplers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim"])
def test_single_step_samplers_lose_nothing_by_being_cut(node, model, sampler):
    """A step so small that it changes nothing leaves the plain run."""
    result, _ = run(node, model, sampler=sampler, adain="off", iterations=1, learning_rate=1e-9)
    expected = plain(model, sampler=sampler)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_sde", "euler_cfg_pp"])
def test_other_samplers_run_step_by_step_and_repeat(node, model, sampler):
    first, report = run(node, model, sampler=sampler, **BRIEF)
    again, _ = run(node, model, sampler=sampler, **BRIEF)
    assert torch.isfinite(first).all() and torch.equal(first, again)
    assert [step["step"] for step in report["steps"]] == [0, 1]


def test_the_inner_sampler_sees_its_part_of_the_sigmas_and_a_seed_of_its_own(node, model):
    calls = []

    def watched(model, x, sigmas, extra_args=None, callback=None, disable=None, s_noise=1.0):
        calls.append((sigmas.tolist(), extra_args["seed"], s_noise))
        sampler = comfy.samplers.sampler_object("euler")
        return sampler.sampler_function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    sampler = comfy.samplers.KSAMPLER(watched, {"s_noise": 0.5})
    run(node, model, steps=5, sampler=sampler, start_at=0.4, every_n_steps=2, **BRIEF)
    sigmas = sigmas_of(model, 5).tolist()
    assert [part for part, _, _ in calls] == [sigmas[:4], sigmas[3:6]]
    seeds = [seed for _, seed, _ in calls]
    assert seeds[0] == 5 and len(set(seeds)) == 2 and {option for _, _, option in calls} == {0.5}


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive"])
def test_samplers_that_cannot_be_cut_are_named(node, model, sampler):
    with pytest.raises(ValueError, match=rf"The sampler {sampler} cannot be stopped after each step. Use euler"):
        run(node, model, sampler=sampler)


def test_optimise_needs_no_sampler(node, model):
    result, report = run(node, model, sampler="uni_pc", method="optimise", steps=1, **BRIEF)
    with_another, _ = run(node, model, sampler="euler", method="optimise", steps=1, **BRIEF)
    assert len(report["steps"]) == 1
    assert torch.equal(result, with_another)


# --- guiders and models of other nodes -----------------------------------------------------------------------------------------


def test_t_gate_sees_one_run_and_does_not_act_on_the_references(node, model, node_classes, caplog):
    caplog.set_level("INFO", logger="fovea")
    gated = node_classes["TGateCache"].execute(model, gate_at=0.5, sp_interval=2)[0]
    result, plain_report = run(node, model, steps=4, **BRIEF)
    with_gate, report = run(node, gated, steps=4, **BRIEF)
    assert any("cross-attention reused in 2 of 4 steps" in line for line in caplog.messages)
    assert report["reference_features"]["computed"] == 0  # T-GATE changes no weight, and nothing of a reference's pass
    assert report["steps"][0]["loss"] == pytest.approx(plain_report["steps"][0]["loss"], rel=1e-4)
    assert not torch.equal(result, with_gate)


def test_attend_and_excite_guides_the_denoising_steps(node, model, node_classes):
    guider, _ = node_classes["AttendExciteGuider"].execute(model, POSITIVE, NEGATIVE, subjects="2, 5", max_refinements=2)
    for sampler in ("euler", "heun"):
        result, report = run(node, model, guider=guider, sampler=sampler, steps=3, **BRIEF)
        without, _ = run(node, model, sampler=sampler, steps=3, **BRIEF)
        assert len(report["steps"]) == 3 and not torch.allclose(result, without, rtol=1e-3)
    run(node, model, guider=guider, method="optimise", **BRIEF)


def test_regional_prompts_act_in_the_denoising_steps(node, model):
    regional = [[POSITIVE[0][0], {"area": (8, 8, 0, 0), "strength": 1.0}], [NEGATIVE[0][0], {"strength": 0.5}]]
    _, report = run(node, model, guider=guider_of(model, positive=regional), **BRIEF)
    assert len(report["steps"]) == 2


def test_controlnet_acts_in_the_denoising_steps_only(node):
    """The image that is compared has seen it; the passes that compare have not."""
    model = small_model()
    control = tiny_controlnet()
    calls = []
    control.control_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    positive, negative = with_control(control, torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1)))
    guider = guider_of(model, positive=positive, negative=negative)

    before = plain(model, steps=3, guider=guider)
    of_plain = len(calls)
    found, report = run(node, model, steps=3, guider=guider, layers="", **BRIEF)
    assert calls == [False] * (2 * of_plain) and of_plain >= 3
    without, other = run(node, model, steps=3, layers="", **BRIEF)
    assert len(calls) == 2 * of_plain
    assert found.isfinite().all() and (found - without).abs().max() > 1e-3 and (found - before).abs().max() > 1e-3
    assert report["steps"][0]["loss"] != other["steps"][0]["loss"]
    assert report["reference_features"]["reused"] + other["reference_features"]["reused"] >= 3


def test_other_nodes_patches_stay_out_of_the_distilling_passes(node, model):
    def counted(run_it) -> int:
        calls = []
        patched = model.clone()
        patched.set_model_attn1_output_patch(lambda out, extra: calls.append(None) or out)
        run_it(patched)
        return len(calls)

    assert counted(lambda patched: run(node, patched, **BRIEF)) == counted(lambda patched: plain(patched)) > 0


def test_a_prompt_for_one_area_as_null_prompt_is_taken_for_the_whole_image(node, model):
    limited = [[NULL[0][0], {"area": (4, 4, 0, 0), "start_percent": 0.9, "strength": 0.1}]]
    found, _ = run(node, model, null_prompt=limited, **BRIEF)
    assert torch.equal(found, run(node, model, **BRIEF)[0])


# --- inpainting -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_a_noise_mask_keeps_the_rest_of_the_image(node, model, method):
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :8] = 1
    latent = random_latent(31)
    result, _ = run(node, model, method=method, latent={"samples": latent, "noise_mask": mask}, adain="on", iterations=2)
    known = model.model.process_latent_in(latent)
    assert (result - known)[..., 8:].abs().max() < 1e-5 * known.abs().max()
    expected = plain(model, latent=latent, mask=mask)
    assert (result - expected)[..., :8].abs().mean() > 0.01


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
@pytest.mark.parametrize(
    ("schedule", "strength", "steps"), [("normal", 1.0, 3), ("simple", 1.0, 3), ("normal", 1.0, 8), ("normal", 0.5, 3)]
)
def test_differential_diffusion_protects_what_is_black(node, model, monkeypatch, method, schedule, strength, steps):
    """A last denoising step for the whole image moves what is black about as far as without the node, and nothing else does."""
    graded = host_node("DifferentialDiffusion", "comfy_extras.nodes_differential_diffusion")(model=model, strength=strength)[0]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, schedule, steps)
    monkeypatch.setattr("distill_runs.sigmas_of", lambda *_: sigmas)
    mask = torch.linspace(-1, 1, SIZE[1]).clamp(min=0).expand(1, 1, *SIZE).contiguous()
    latent = {"samples": random_latent(31), "noise_mask": mask}
    known = model.model.process_latent_in(latent["samples"])
    found, _ = run(node, model, guider=guider_of(graded), latent=latent, method=method, steps=steps, adain="on", **BRIEF)
    plainly = plain(model, guider=guider_of(graded), latent=latent["samples"], mask=mask, steps=steps)
    moved, allowed = ((image - known)[..., : SIZE[1] // 2].abs().max() for image in (found, plainly))
    assert moved < (3 * allowed if method == "guided sampling" else 0) + 1e-5
    assert (found - plainly)[..., SIZE[1] // 2 :].abs().max() > 0.1


# --- families -------------------------------------------------------------------------------------------------------------------

GUIDED_FAMILIES = ["sdxl", "flux", "sd3", "sd35_medium", "pixart", "qwen_image", "z_image", "wan_t2v"]


@pytest.mark.parametrize("name", [name for name in GUIDED_FAMILIES if name in FAMILIES])
def test_families(node, name):
    """Every step of Adam lowers the loss, in networks of every kind, with a reference of another size."""
    family = FAMILIES[name]
    model = family.build()
    size = tuple(side + 4 for side in family.size)
    generator = torch.Generator().manual_seed(9)
    reference = torch.randn(family.latent(2, size).shape, generator=generator)
    with torch.inference_mode():
        output, denoised, report = node(
            Noise(), guider_of(model, 2.0, family.conds(1), family.conds(2)), comfy.samplers.sampler_object("euler"),
            comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2), {"samples": family.latent()},
            {"samples": reference}, family.conds(7), iterations=3,
        ).args  # fmt: skip
    steps = json.loads(report)["steps"]
    for step in steps:
        assert step["loss"][0] > step["loss"][-1] > 0
    torch.testing.assert_close(output["samples"], denoised["samples"], rtol=1e-4, atol=1e-4)


# --- progress, and what is left -----------------------------------------------------------------------------------------------


def state_of(model):
    modules = {name: (dict(module.__dict__), len(module._forward_hooks)) for name, module in model.model.named_modules()}
    training = getattr(comfy.model_management, "in_training", None)
    for own, _ in modules.values():
        own.pop("latent_shapes", None)  # ComfyUI notes every run's sizes on its model (0.33.0)
    return [(name, {k: id(v) for k, v in own.items()}, hooks) for name, (own, hooks) in modules.items()], training


def weights_of(model):
    return {name: (id(weight), weight.is_inference()) for name, weight in model.model.named_parameters()}


@pytest.fixture
def ticks(monkeypatch, pack):
    from fovea_attention.attention import host

    shown = []

    def preview_callback(model, steps):
        return lambda step, denoised, x, total: shown.append((step, total, denoised.clone()))

    monkeypatch.setattr(host, "preview_callback", preview_callback)
    return shown


def test_progress_counts_optimisation_steps_and_previews_change(node, model, ticks):
    run(node, model, iterations=2)
    assert [(step, total) for step, total, _ in ticks] == [(step, 6) for step in range(6)]
    assert all(not torch.equal(one[2], other[2]) for one, other in zip(ticks, ticks[1:]))  # noqa: B905
    ticks.clear()
    run(node, model, method="optimise", iterations=2, steps=3)
    assert [(step, total) for step, total, _ in ticks] == [(step, 6) for step in range(6)]


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_nothing_is_left_after_a_run(node, model, method, memory):
    run(node, model, **BRIEF)  # ComfyUI puts its own things on a model that runs for the first time
    before, weights = state_of(model), weights_of(model)
    guider = guider_of(model)
    options = guider.model_options
    run(node, model, guider=guider, method=method, memory=memory, **BRIEF)
    assert state_of(model) == before and weights_of(model) == weights
    assert guider.model_options is options and not hasattr(guider, "conds")


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_an_interrupt_between_iterations_leaves_nothing(node, model, method, monkeypatch, distill):
    expected, _ = run(node, model, method=method, **BRIEF)
    before = state_of(model)
    passes = []
    gradient = distill.ModelPass.gradient

    def interrupted(self, *args):
        passes.append(None)
        if len(passes) == 2:
            comfy.model_management.interrupt_current_processing()
        return gradient(self, *args)

    monkeypatch.setattr(distill.ModelPass, "gradient", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(node, model, method=method, iterations=5)
    assert len(passes) == 2
    comfy.model_management.interrupt_current_processing(False)
    monkeypatch.undo()
    assert state_of(model) == before
    assert torch.equal(run(node, model, method=method, **BRIEF)[0], expected)


NOT_FINITE = {
    "the latent already was none": lambda: {"guider_prompt": [[POSITIVE[0][0] * float("nan"), {}]]},
    "the model gives NaN for the reference": lambda: {"null_prompt": [[NULL[0][0] * float("nan"), {}]]},
    "Lower learning_rate": lambda: {"learning_rate": 1e30, "iterations": 3},
}


@pytest.mark.parametrize("cause", NOT_FINITE)
def test_a_loss_that_is_no_number_stops_with_its_cause(node, model, cause):
    run(node, model, **BRIEF)
    before = state_of(model)
    settings = NOT_FINITE[cause]()
    if "guider_prompt" in settings:
        settings["guider"] = guider_of(model, positive=settings.pop("guider_prompt"))
    with pytest.raises(RuntimeError, match=rf"not a number in step \d+, iteration \d+. Likely cause: .*{cause}"):
        run(node, model, adain="off", **settings)
    assert state_of(model) == before


def test_it_runs_outside_inference_mode_too(node, model):
    expected, _ = run(node, model, **BRIEF)
    with torch.no_grad():
        output = node(
            Noise(), guider_of(model), comfy.samplers.sampler_object("euler"), sigmas_of(model),
            {"samples": torch.zeros(1, 4, *SIZE)}, {"samples": random_latent(11)}, NULL, layers="output.2-3", **BRIEF,
        )[0]  # fmt: skip
    torch.testing.assert_close(model.model.process_latent_in(output["samples"]), expected, rtol=1e-4, atol=1e-4)


def test_one_log_line_says_what_was_done(node, model, caplog):
    caplog.set_level("INFO", logger="fovea")
    run(node, model, iterations=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "fovea"]
    assert len(lines) == 1
    assert lines[0].startswith("Attention Distillation: guided sampling, 4 optimisation steps in 2 steps on output.2-3, loss 0.")
    assert lines[0].endswith("reference features reused 0 of 2 times")


def test_other_entries_of_the_latent_pass_through(node, model):
    latent = {"samples": torch.zeros(1, 4, *SIZE), "batch_index": [3]}
    with torch.inference_mode():
        outputs = node(
            Noise(), guider_of(model), comfy.samplers.sampler_object("euler"), sigmas_of(model), latent,
            {"samples": random_latent(11)}, NULL, **BRIEF,
        ).args  # fmt: skip
    assert all(output["batch_index"] == [3] for output in outputs[:2]) and not latent["samples"].any()


# --- errors ---------------------------------------------------------------------------------------------------------------------

LATENT = torch.zeros(2, 4, *SIZE)
MASK = torch.ones(1, *SIZE)
SOFT = torch.linspace(0, 1, SIZE[0] * SIZE[1]).view(1, *SIZE)
ERRORS = [
    ({"reference": torch.zeros(1, 16, *SIZE)}, r"reference is a latent of shape \(1, 16, 16, 16\).* 4 channels"),
    ({"reference": torch.full((1, 4, *SIZE), float("nan"))}, "reference holds values that are no numbers"),
    ({"content": {"samples": torch.zeros(1, 16, *SIZE)}}, "content is a latent of shape"),
    ({"content": {"samples": torch.zeros(1, 4, 8, 8)}}, "content is 8 x 8 but latent_image is 16 x 16"),
    ({"content": {"samples": torch.zeros(3, 4, *SIZE)}}, "content holds 3 images and latent_image 2"),
    ({"null_prompt": []}, "null_prompt is empty"),
    ({"start_at": 0.6, "end_at": 0.4}, "start_at is 0.6 and end_at is 0.4"),
    ({"start_at": -0.1}, "start_at is -0.1"),
    ({"iterations": -1}, "iterations is -1"),
    ({"learning_rate": -0.1}, "learning_rate is -0.1"),
    ({"every_n_steps": 0}, "every_n_steps is 0"),
    ({"attn_scale": 0.0}, "attn_scale is 0"),
    ({"layers": "output.9"}, r"layers names 'output.9'.*Its layers: input.1-2, input.4-5, middle|layers names 'output.9'"),
    ({"reference_mask": MASK * 0}, "reference_mask is black everywhere"),
    ({"target_mask": MASK}, "reference_mask is not connected"),
    ({"reference_mask": MASK, "target_mask": MASK * 0}, r"grey values \[255\] and target_mask \[0\]"),
    ({"reference_mask": MASK, "target_mask": SOFT}, "target_mask has .* different grey values"),
    ({"reference_mask": MASK.expand(3, -1, -1), "target_mask": MASK}, "reference_mask holds 3 masks, but reference holds 1"),
    ({"reference_mask": MASK, "target_mask": MASK.expand(3, -1, -1)}, "target_mask holds 3 masks, but latent_image holds 2"),
]


@pytest.mark.parametrize(("settings", "message"), ERRORS)
def test_wrong_inputs_are_named_before_sampling(node, model, monkeypatch, settings, message):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *args, **kwargs: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        run(node, model, latent=LATENT, **settings)


def test_masks_on_a_joint_network_and_unknown_networks_are_refused(node, pack):
    from fovea_attention.attention.distill import distilled_layers

    family = FAMILIES["sd3"]
    model = family.build()
    with torch.inference_mode(), pytest.raises(ValueError, match="mixes them with the text"):
        node(
            Noise(), guider_of(model, 1.0, family.conds(1), family.conds(2)), comfy.samplers.sampler_object("euler"),
            torch.tensor([1.0, 0.0]), {"samples": family.latent()}, {"samples": family.latent()}, family.conds(7),
            reference_mask=MASK, target_mask=MASK,
        )  # fmt: skip
    with pytest.raises(ValueError, match="does not know where Identity attends"):
        distilled_layers(torch.nn.Identity())


def test_the_log_names_greys_that_are_left_free(node, model, caplog):
    caplog.set_level(logging.INFO, logger="fovea")
    both = torch.cat([MASK[:, :8], MASK[:, 8:] * 0], dim=1)
    run(node, model, method="optimise", reference_mask=MASK, target_mask=both, **BRIEF)
    assert "grey values [0] of target_mask are not in reference_mask and were left free" in caplog.messages[-1]
