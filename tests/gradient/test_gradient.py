"""Gradients of a loss on attention with respect to the latent: against finite differences, on every family of networks."""

from __future__ import annotations

import comfy.model_base
import comfy.ops
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from families import FAMILIES
from tiny_unet import UNET_CONFIG, patcher

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
    import fovea_attention.attention.networks as sites

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


def forwards_of(model):
    return {name: module.__dict__.get("forward") for name, module in model.model.named_modules()}


def watched_layers(sites, model, share=1.0):
    layers = sites.attention_layers(model.model.diffusion_model)
    return layers[: max(1, round(len(layers) * share))]


@pytest.mark.parametrize("memory", ["fast", pytest.param("low", marks=pytest.mark.newest)])
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


# ---------------------------------------------------------------------------------------------------- how weights are held


def unet(dtype=torch.float32, compute=None, seed=0):
    """A small U-Net whose operations cast their weights where these are stored in another type than it computes in."""
    config = {**UNET_CONFIG, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "transformer_depth": [1, 1],
              "transformer_depth_output": [1, 1, 1, 1], "dtype": dtype}  # fmt: skip
    described = comfy.supported_models.SD15(config)
    described.set_inference_dtype(dtype, compute)
    model = comfy.model_base.BaseModel(described)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            value = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(torch.ones_like(value) if name == "weight" and "Norm" in type(module).__name__ else value)
    return patcher(model)


def with_weights_of(model, dtype=torch.float32):
    """A model that holds the same numbers in a type it needs not cast."""
    plain = unet(dtype)
    for own, other in zip(plain.model.parameters(), model.model.parameters(), strict=True):
        own.copy_(other.to(torch.float32))
    return plain


def gradient_of(
    gradient, sites, model, *, memory="fast", batch=1, rows=None, positive=None, objective=None, options=None, before=None
):
    layers = watched_layers(sites, model)

    def body(base_model, cond, x, sigma, model_options):
        if before is not None:
            before()
        passes = gradient.ModelPass(base_model, {**model_options, **(options or {})}, layers, gradient.Memory(memory))
        found = passes.gradient(cond, x, sigma, objective or MapsAndOutputs(), rows)
        return found, passes

    return during_sampling(FAMILIES["sd15"], model, body, batch=batch, positive=positive)


def assert_same_gradient(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0)
    assert (found.latent - expected.latent).norm() <= tolerance * expected.latent.norm()


@pytest.mark.parametrize("memory", MEMORY)
def test_weights_loaded_in_inference_mode(gradient, sites, memory):
    expected, _ = gradient_of(gradient, sites, unet(), memory=memory)
    with torch.inference_mode():
        model = unet()
    assert all(parameter.is_inference() for parameter in model.model.parameters())
    found, _ = gradient_of(gradient, sites, model, memory=memory)
    assert torch.equal(found.latent, expected.latent)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_that_are_cast_for_every_call(gradient, sites, stored):
    model = unet(stored, torch.float32)
    found, _ = gradient_of(gradient, sites, model)
    assert_same_gradient(found, gradient_of(gradient, sites, with_weights_of(model))[0])


@pytest.mark.parametrize("memory", MEMORY)
def test_inputs_of_convolutions_that_are_left_out_are_not_missed(gradient, sites, monkeypatch, memory):
    model = unet()
    expected, _ = gradient_of(gradient, sites, model, memory=memory)
    monkeypatch.setattr(gradient.frozen_ops, "_SMALL_BYTES", 0)
    assert_same_gradient(gradient_of(gradient, sites, model, memory=memory)[0], expected)


def test_weights_streamed_through_one_buffer(gradient, sites, monkeypatch):
    """Low VRAM: by the time of the backward pass the buffer holds another layer's weight."""
    model = unet()
    expected, _ = gradient_of(gradient, sites, model)
    buffer = torch.empty(1 << 20)
    cast = comfy.ops.cast_bias_weight

    def streamed(module, *args, **kwargs):
        weight, *rest = cast(module, *args, **kwargs)
        shared = buffer[: weight.numel()].view_as(weight)
        shared.copy_(weight)
        return (shared, *rest)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", streamed)
    for module in model.model.modules():
        if isinstance(module, comfy.ops.CastWeightBiasOp):
            module.comfy_cast_weights = True
    for memory in MEMORY:
        assert_same_gradient(gradient_of(gradient, sites, model, memory=memory)[0], expected)


def test_weight_functions_act_in_both_directions(gradient, sites):
    """How ComfyUI applies LoRA to weights that it does not keep."""
    model, merged = unet(), unet()

    def weighted(model):
        return [module for module in model.model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]

    def patch():  # while sampling: loading a model takes such functions away
        for module in weighted(model):
            module.weight_function = [lambda weight: weight * 1.25]

    for module in weighted(merged):
        module.weight.mul_(1.25)
    found, _ = gradient_of(gradient, sites, model, before=patch)
    assert_same_gradient(found, gradient_of(gradient, sites, merged)[0])


class Faint(MapsAndOutputs):
    """A mean over very many values: its gradient is below what float16 can hold."""

    def loss(self, measurements, rows):
        return super().loss(measurements, rows) * 1e-2


@pytest.mark.parametrize(("dtype", "likeness"), [(torch.float16, 0.995), (torch.bfloat16, 0.95)])
def test_half_precision(gradient, sites, dtype, likeness):
    model = unet(dtype)
    found, _ = gradient_of(gradient, sites, model, objective=Faint())
    expected, _ = gradient_of(gradient, sites, with_weights_of(model), objective=Faint())
    one, other = found.latent.double().flatten(), expected.latent.double().flatten()
    assert one @ other > likeness * one.norm() * other.norm()
    assert one.norm().item() == pytest.approx(other.norm().item(), rel=0.1)


# -------------------------------------------------------------------------------------------------- what is computed at all


def test_images_that_do_not_matter_are_not_computed(gradient, sites):
    model = unet()
    whole, _ = gradient_of(gradient, sites, model, batch=3)
    some, _ = gradient_of(gradient, sites, model, batch=3, rows=torch.tensor([2, 0]))
    assert_same_gradient(some, gradient.Gradient(whole.loss[[2, 0]], whole.latent[[2, 0]]))


def test_an_area_has_no_gradient_outside(gradient, sites):
    positive = [[FAMILIES["sd15"].conds(1)[0][0], {"area": (8, 4, 4, 2)}]]
    found, _ = gradient_of(gradient, sites, unet(), positive=positive)
    inside = torch.zeros(16, 12, dtype=torch.bool)
    inside[4:12, 2:6] = True
    assert (found.latent[..., inside] != 0).all()
    assert (found.latent[..., ~inside] == 0).all()


def test_nothing_behind_the_last_layer_is_computed(gradient, sites):
    model = unet()
    ran = []
    hook = model.model.diffusion_model.out.register_forward_hook(lambda *args: ran.append(args))
    layers = watched_layers(sites, model, share=0.5)

    def body(base_model, cond, x, sigma, options):
        for memory in MEMORY:
            gradient.ModelPass(base_model, options, layers, gradient.Memory(memory)).gradient(cond, x, sigma, MapsAndOutputs())

    during_sampling(FAMILIES["sd15"], model, body)
    hook.remove()
    assert ran == []


def test_foreign_options_are_left_out(gradient, sites):
    """Caches, compiled modules and attention kernels without a gradient do not take part."""

    def never(*args, **kwargs):
        raise AssertionError("called in a pass of our own")

    model = unet()
    expected, _ = gradient_of(gradient, sites, model)
    options = {
        "model_function_wrapper": never,
        "transformer_options": {"optimized_attention_override": never, "wrappers": {"apply_model": {"cache": [never]}}},
    }
    found, _ = gradient_of(gradient, sites, model, options=options)
    assert torch.equal(found.latent, expected.latent)


def test_out_of_memory_is_met_with_less_memory(gradient, sites):
    class Greedy(MapsAndOutputs):
        failures = 2

        def measure(self, layer, call, rows):
            if self.failures:
                self.failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().measure(layer, call, rows)

    model = unet()
    expected, _ = gradient_of(gradient, sites, model, batch=2)
    found, passes = gradient_of(gradient, sites, model, batch=2, memory="auto", objective=Greedy())
    assert_same_gradient(found, expected)
    assert passes.level == 2
    with pytest.raises(torch.OutOfMemoryError):
        gradient_of(gradient, sites, model, memory="fast", objective=Greedy())
    assert_same_gradient(gradient_of(gradient, sites, model, batch=2)[0], expected)


class Residuals:
    """What ComfyUI asks of a ControlNet's wrapper, with residuals that need no network."""

    previous_controlnet = None
    extra_hooks = None

    def get_control(self, x, *args):
        shapes = [(32, 16, 12), (32, 16, 12), (32, 8, 6), (64, 8, 6)]
        residuals = [0.3 * torch.randn(len(x), *shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
        return {"input": [], "middle": [0.2 * residuals[-1]], "output": [residual.double() for residual in residuals]}


def with_residuals(cond, options):
    return {**cond, "control": Residuals()}, options


def with_a_patch(cond, options):
    """FreeU's way: half of the channels are written to, after what is in them was used."""

    def patch(h, skip, transformer_options):
        h[:, : h.shape[1] // 2] = h[:, : h.shape[1] // 2] * (1 + h.mean(1, keepdim=True).tanh())
        skip *= 0.8
        return h, skip

    transformer = {**options["transformer_options"], "patches": {"output_block_patch": [patch]}}
    return cond, {**options, "transformer_options": transformer}


@pytest.mark.parametrize("changed", [with_residuals, with_a_patch])
@pytest.mark.parametrize("memory", MEMORY)
def test_feature_maps_that_are_changed_in_place(gradient, sites, memory, changed):
    """They were kept for the gradient before."""
    model = in_precision(unet(), torch.float64)
    layers = watched_layers(sites, model)

    def body(base_model, cond, x, sigma, options):
        x = x.double()
        (changed_cond, changed_options), asked = changed(cond, options), (x, sigma, MapsAndOutputs())
        passes = gradient.ModelPass(base_model, changed_options, layers, gradient.Memory(memory))
        found = passes.gradient(changed_cond, *asked)
        plain = gradient.ModelPass(base_model, options, layers, gradient.Memory(memory)).gradient(cond, *asked)
        direction, step = found.latent / found.latent.norm(), 2e-4 * x.norm()
        ahead, behind = (
            passes.gradient(changed_cond, x + sign * step * direction, sigma, MapsAndOutputs()).loss for sign in (1, -1)
        )
        return ((ahead - behind) / (2 * step)).item(), found.latent.norm().item(), (found.loss - plain.loss).abs().item()

    slope, norm, effect = during_sampling(FAMILIES["sd15"], model, body)
    assert effect > 0
    assert abs(slope - norm) <= 2e-4 * norm


PADDINGS = [
    ("zeros", 1, 3),
    ("zeros", "same", 4),
    ("zeros", "valid", 3),
    ("circular", 2, 3),
    ("reflect", 1, 3),
    ("replicate", "same", 4),
]


@pytest.mark.parametrize(("resident", "small"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("mode", "padding", "kernel"), PADDINGS)
def test_every_padding_of_a_convolution(gradient, monkeypatch, mode, padding, kernel, resident, small):
    """Nodes for seamless images make convolutions circular."""
    if not small:
        monkeypatch.setattr(gradient.frozen_ops, "_SMALL_BYTES", 0)
    network = torch.nn.Sequential(comfy.ops.disable_weight_init.Conv2d(2, 3, kernel, padding=padding, padding_mode=mode))
    for parameter in network.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def slope():
        return torch.autograd.grad(network(x).square().sum(), x)[0]

    expected = slope()
    lanes = gradient.frozen_ops.Lanes(network, residents=resident)
    with gradient.frozen_ops.host.swapped_forward(lanes.forwards(adds_in_place=False)), gradient.plain.differentiable():
        assert network[0].__dict__["forward"].__name__ == ("convolve" if resident else "frozen")
        torch.testing.assert_close(slope(), expected)


@pytest.mark.parametrize(("adds_in_place", "side", "is_held"), [(False, 8, True), (False, 512, False), (True, 8, False)])
def test_autograd_holds_small_inputs_of_convolutions_only(gradient, adds_in_place, side, is_held):
    """Room matters for large ones, and so does what is changed in place behind them."""
    network = torch.nn.Sequential(comfy.ops.disable_weight_init.Conv2d(2, 1, 3).requires_grad_(False))
    x = torch.zeros(1, 2, side, side, requires_grad=True)
    lanes = gradient.frozen_ops.Lanes(network)
    with gradient.frozen_ops.host.swapped_forward(lanes.forwards(adds_in_place=adds_in_place)):
        saved = network(x).grad_fn._saved_input
    assert saved.shape == x.shape
    assert (saved.untyped_storage().nbytes() == x.nbytes) == is_held
