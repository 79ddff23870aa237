"""T-GATE under every sampler and scheduler ComfyUI lists: the same image as the plain reference, or a stated reason."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from tgate_reference import Reference, assert_same_image
from tiny_unet import sample, small_model

STEPS, GATE = 8, 3

# They switch the cfg-1 shortcut off because they use the negative prediction itself.
NEEDS_NEGATIVE = {name for name in comfy.samplers.SAMPLER_NAMES if name.endswith("_cfg_pp")}
# Adaptive step sizes: rounding decides how many steps are taken, so two equal algorithms drift apart.
ADAPTIVE = {"dpm_adaptive"}
# Its estimate jumps from the second sigma to the last ones, over the step that stores.
JUMPS = {"dpm_fast"}


def gated_model(node_classes, model, **settings):
    return node_classes["TGateCache"].execute(model, gate_at=GATE / STEPS, sp_interval=1, **settings)[0]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.newest
@pytest.mark.parametrize("sampler", sorted(set(comfy.samplers.SAMPLER_NAMES) - ADAPTIVE - JUMPS))
def test_every_sampler_equals_the_reference(node_classes, caplog, model, sampler):
    caplog.set_level("INFO", logger="fovea")
    result = sample(gated_model(node_classes, model), steps=STEPS, sampler=sampler)
    reference = Reference(GATE, drop=sampler not in NEEDS_NEGATIVE)
    assert_same_image(result, sample(reference.apply(model), steps=STEPS, sampler=sampler))
    if sampler in NEEDS_NEGATIVE:
        assert "negative prompt skipped in 0" in caplog.text and "needs the negative prompt" in caplog.text
    else:
        assert f"cross-attention reused in {STEPS - GATE} of {STEPS} steps" in caplog.text
        assert f"negative prompt skipped in {STEPS - GATE}" in caplog.text


@pytest.mark.newest
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_sde", "dpm_2", "lcm"])
def test_full_steps_after_the_gate_under_samplers_that_call_more_than_once(node_classes, model, sampler):
    result = sample(gated_model(node_classes, model, refresh_every=3), steps=STEPS, sampler=sampler)
    assert_same_image(result, sample(Reference(GATE, refresh=3).apply(model), steps=STEPS, sampler=sampler))


@pytest.mark.parametrize("sampler", sorted(ADAPTIVE | JUMPS))
def test_samplers_that_jump_still_store_before_they_reuse(node_classes, caplog, model, sampler):
    caplog.set_level("INFO", logger="fovea")
    result = sample(gated_model(node_classes, model), steps=STEPS, sampler=sampler)
    plain = sample(model, steps=STEPS, sampler=sampler)
    assert torch.isfinite(result).all()
    assert "negative prompt skipped in 0" not in caplog.text
    # A cache that was never filled, or zeros for the negative prediction, would be off by a large factor.
    assert (result - plain).norm() / plain.norm() < 0.2


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler_opens_the_gate_at_the_same_step(node_classes, caplog, model, scheduler):
    caplog.set_level("INFO", logger="fovea")
    result = sample(gated_model(node_classes, model), steps=STEPS, scheduler=scheduler)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, STEPS)
    steps = len(sigmas) - 1  # linear_quadratic and ddim_uniform may give one more
    gate = round(GATE / STEPS * steps)
    assert f"negative prompt skipped in {steps - gate}" in caplog.text
    assert_same_image(result, sample(Reference(gate).apply(model), steps=STEPS, scheduler=scheduler))


def test_a_step_whose_sigma_is_exactly_the_gate(node_classes, model):
    """sgm_uniform puts sigmas on boundaries where a comparison of percentages goes wrong (cfg times a zero prediction)."""
    result = sample(gated_model(node_classes, model), steps=STEPS, scheduler="sgm_uniform")
    plain = sample(model, steps=STEPS, scheduler="sgm_uniform")
    assert (result - plain).norm() / plain.norm() < 0.2


def test_low_denoise_counts_the_steps_that_run(node_classes, caplog, model):
    caplog.set_level("INFO", logger="fovea")
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    result = sample(gated_model(node_classes, model), steps=STEPS, denoise=0.3, latent_image=start)
    assert_same_image(result, sample(Reference(GATE).apply(model), steps=STEPS, denoise=0.3, latent_image=start))
    assert f"negative prompt skipped in {STEPS - GATE}" in caplog.text


def test_a_part_of_the_steps_is_a_run_of_its_own(node_classes, caplog, model):
    """KSamplerAdvanced: start_step and last_step hand the sampler a slice; the gate is a share of that slice."""
    caplog.set_level("INFO", logger="fovea")
    part = {"steps": 16, "start_step": 4, "last_step": 12, "force_full_denoise": False}
    result = sample(gated_model(node_classes, model), **part)
    assert_same_image(result, sample(Reference(GATE).apply(model), **part))
    assert f"reused in {STEPS - GATE} of {STEPS} steps" in caplog.text


def test_cfg_1_has_no_negative_prompt_to_drop(node_classes, caplog, model):
    caplog.set_level("INFO", logger="fovea")
    result = sample(gated_model(node_classes, model), steps=STEPS, cfg=1.0)
    assert_same_image(result, sample(Reference(GATE, drop=False).apply(model), steps=STEPS, cfg=1.0))
    assert f"cross-attention reused in {STEPS - GATE} of {STEPS} steps, negative prompt skipped in 0" in caplog.text
