"""Attend-and-Excite equals the authors' implementation, with every sampler, batch and kind of prompt."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from tiny_unet import cond, reference_cases, sample, small_model, vector_model

CASES = reference_cases("ae")


@pytest.fixture(scope="module")
def excite(pack):
    import fovea_attention.attention.excite as excite

    return excite


@pytest.fixture
def guider(node_classes):
    """The node, with subjects at token positions 2 and 5 unless told otherwise; returns its guider."""

    def make(model, positive=None, negative=None, **settings):
        settings = {"subjects": "2, 5", **settings}
        return node_classes["AttendExciteGuider"].execute(model, positive or cond(1), negative or cond(2), **settings)[0]

    return make


def run(guider, *, noise, sigmas, sampler="euler", latent_image=None, seed=3, **options):
    """What SamplerCustomAdvanced does, under the executor's inference mode; each step's latent and denoised as well."""
    steps = []

    def callback(step, denoised, x, total):
        steps.append((x.clone(), denoised.clone()))

    latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    with torch.inference_mode():
        result = guider.sample(noise, latent_image, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed, **options)
    return result, steps


def case_guider(guider, case, **settings):
    steps = case["steps"]
    thresholds = ", ".join(f"{int(step) / steps}:{wanted}" for step, wanted in case["thresholds"].items())
    return guider(
        vector_model(),
        [[case["cond"], {}]],
        [[case["uncond"], {}]],
        cfg=case["cfg"],
        subjects=", ".join(map(str, case["token_indices"])),
        guide_until=case["max_iter_to_alter"] / steps,
        scale_factor=case["scale_factor"],
        scale_end=case["scale_range"][1],
        thresholds=thresholds,
        max_refinements=case["max_refinement_steps"],
        smoothing=case["smooth_attentions"],
        sigma=case["gaussian_sigma"],
        kernel_size=case["gaussian_kernel"],
        **settings,
    )


@pytest.fixture
def recorded(excite, monkeypatch):
    """Every measured loss and gradient, as they are used: (rows, gradient in the units of z)."""
    found = []
    measure = excite.ExciteRun._gradient

    def watched(self, seen, sigma, rows):
        gradient = measure(self, seen, sigma, rows)
        found.append((gradient.loss.clone(), gradient.latent / excite.host.input_scale(self.base_model, sigma).view(-1, 1, 1, 1)))
        return gradient

    monkeypatch.setattr(excite.ExciteRun, "_gradient", watched)
    return found


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_official_implementation(guider, recorded, caplog, name, memory):
    caplog.set_level("INFO", logger="fovea")
    case = CASES[name]
    result, steps = run(case_guider(guider, case, memory=memory), noise=case["noise"], sigmas=case["sigmas"])
    sigmas = case["sigmas"].view(-1, 1, 1, 1, 1)
    start, denoised = (torch.stack(values) for values in zip(*steps, strict=True))
    x = start + (start - denoised) / sigmas[:-1] * sigmas.diff(dim=0)  # Euler's step
    torch.testing.assert_close(x[-1], result * 0.18215, rtol=0, atol=1e-5)
    assert (x - case["x"]).abs().max() / case["x"].abs().max() < 1e-4
    z = start / (sigmas[:-1] ** 2 + 1).sqrt()
    assert (z - case["z_in"]).abs().max() / case["z_in"].abs().max() < 1e-4
    eps, expected = (values.diff(dim=0) / sigmas[1:].diff(dim=0) for values in (x, case["x"]))
    worst = max((got - wanted).abs().max() / wanted.abs().max() for got, wanted in zip(eps, expected, strict=True))
    assert worst < 2e-3
    first = recorded[0]
    torch.testing.assert_close(first[0], case["loss_first"][:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[1], case["grad0_z"], rtol=1e-3, atol=1e-4 * case["grad0_z"].abs().max().item())
    refinements = sum(case["updates_per_step"]) - case["max_iter_to_alter"]
    assert f"{case['max_iter_to_alter']} guided steps, {refinements} refinements" in caplog.text
