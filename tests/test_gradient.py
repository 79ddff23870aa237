"""Gradients of a loss on attention with respect to the latent: against finite differences, on every family of networks."""

from __future__ import annotations

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from families import FAMILIES

MEMORY = ("fast", "low")

# Networks that compute parts of themselves in float32, whatever they are given: (dtype, step, tolerance).
IN_FLOAT64 = (torch.float64, 2e-4, 2e-4)
IN_FLOAT32 = (torch.float32, 1e-2, 1e-2)
MIXED = {"wan_t2v": IN_FLOAT32, "wan_i2v": IN_FLOAT32}


@pytest.fixture(scope="module")
def gradient(pack):
    import fovea_attention.attention.gradient as gradient

    return gradient


@pytest.fixture(scope="module")
def sites(pack):
    import fovea_attention.attention.sites as sites

    return sites


class MapsAndOutputs:
    """A smooth loss of everything an objective may look at: probabilities and outputs of each layer, in full precision."""

    def measure(self, layer, call, rows):
        inputs = call.inputs
        logits = inputs.q.double() @ inputs.k.double().transpose(-1, -2) * inputs.scale
        if inputs.mask is not None:
            kept = inputs.mask if inputs.mask.dtype == torch.bool else inputs.mask > -1e4
            logits = logits.masked_fill(~kept, -1e4)
        maps = logits.softmax(-1)
        weights = torch.linspace(-1, 1, maps.shape[-1], dtype=maps.dtype)
        first = (maps @ weights).square().mean((1, 2))
        return first + 0.1 * call.output.double().square().mean((1, 2, 3)) + 0.01 * call.v.double().mean((1, 2, 3))

    def loss(self, measurements, rows):
        return torch.stack([value for _, value in measurements]).sum(0)


def in_precision(model, dtype):
    """The same model, computing in another precision as far as its network lets it."""
    network = model.model.diffusion_model
    network.to(dtype)
    network.dtype = dtype
    model.model.manual_cast_dtype = None
    return model


def during_sampling(family, model, body, *, batch=1, positive=None, sampler_noise=7, inference_mode=True):
    """Run ``body(base_model, cond, x, sigma, options)`` where a sampler's function runs, for one step; what it returns."""
    results = []

    def sampler(model_k, x, sigmas, extra_args, callback, disable):
        guider = model_k.inner_model
        sigma = x.new_full((len(x),), float(sigmas[0]), dtype=torch.float32)
        results.append(body(guider.inner_model, guider.conds["positive"][0], x, sigma, extra_args["model_options"]))
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or family.conds(1), family.conds(2))
    latent = family.latent(batch)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(sampler_noise))
    model_sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", 4)[1:]
    with torch.inference_mode(inference_mode):
        guider.sample(noise, latent, comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True, seed=1)
    return results[0]


def modules_of(model):
    return {name: (module, dict(module.__dict__)) for name, module in model.model.named_modules()}


def forwards_of(model):
    return {name: module.__dict__.get("forward") for name, module in model.model.named_modules()}


def watched_layers(sites, model, share=1.0):
    layers = sites.capture_layers(model.model.diffusion_model)
    return layers[: max(1, round(len(layers) * share))]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradient_equals_finite_differences(gradient, sites, name, memory):
    family = FAMILIES[name]
    dtype, step_size, tolerance = MIXED.get(name, IN_FLOAT64)
    model = in_precision(family.build(), dtype)
    layers = watched_layers(sites, model)
    before = forwards_of(model)

    def body(base_model, cond, x, sigma, options):
        x = x.to(dtype)
        objective = MapsAndOutputs()
        passes = gradient.ModelPass(base_model, options, layers, gradient.Memory(memory))
        found = passes.gradient(cond, x, sigma, objective)

        def loss(x):
            return passes.gradient(cond, x, sigma, objective).loss

        generator = torch.Generator().manual_seed(5)
        differences = []
        for direction in (found.latent, torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)):
            direction = direction / direction.norm()
            step = step_size * x.norm()
            slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
            differences.append((slope.item(), (found.latent * direction).sum().item()))
        return differences, found.latent.norm().item()

    differences, norm = during_sampling(family, model, body)
    for slope, expected in differences:
        assert abs(slope - expected) <= tolerance * norm
    assert norm > 0
    assert forwards_of(model) == before
