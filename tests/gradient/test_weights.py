"""Gradients with every way in which a network holds its weights, against the same network with plain weights."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from families.weights import linears, pack, quantised
from gradient.test_gradient import MEMORY, assert_same_gradient, gradient, gradient_of, sites, unet  # noqa: F401
from host_inprocess import pack_nodes

QUANT_ALGOS = getattr(__import__("comfy.quant_ops").quant_ops, "QUANT_ALGOS", {})
mixed_precision = pytest.mark.skipif(
    not hasattr(comfy.ops, "linear_input_act"), reason="this ComfyUI holds such weights otherwise"
)


@pytest.mark.parametrize("memory", MEMORY)
def test_weights_that_another_pack_unpacks(gradient, sites, memory):  # noqa: F811
    with torch.inference_mode():
        model, plain = unet(), unet()
        pack(model, plain)
    found, _ = gradient_of(gradient, sites, model, memory=memory)
    assert_same_gradient(found, gradient_of(gradient, sites, plain, memory=memory)[0])


@mixed_precision
@pytest.mark.parametrize("name", [*QUANT_ALGOS, "smoothed"])
def test_comfyuis_quantised_formats(gradient, sites, name):  # noqa: F811
    smoothed = name == "smoothed"  # ModelOpt's input smoothing
    quant_format = "nvfp4" if smoothed else name
    sizes = {"convrot_groupsize": 16} if quant_format in ("convrot_w4a4", "asym_w4a8_int8") else {}
    with torch.inference_mode():
        model, plain = unet(), unet()
        for (parent, child, linear), (_, _, other) in zip(list(linears(model)), linears(plain), strict=True):
            if linear.in_features % 64 and sizes:
                continue  # these formats' groups are of 64 columns
            layer, effective = quantised(linear, quant_format, **sizes)
            setattr(parent, child, layer)
            other.weight.copy_(effective)
            if smoothed:
                scale = 0.5 + torch.rand(linear.in_features, generator=torch.Generator().manual_seed(3))
                layer.register_parameter("pre_quant_scale", torch.nn.Parameter(scale, requires_grad=False))
                other.weight.mul_(scale)
    # Formats of integers round the layer's input as well, to 4 or 8 bits, so that the two networks see different activations.
    tolerance = {"convrot_w4a4": 1e-1, "int8_tensorwise": 1e-2, "asym_w4a8_int8": 1e-2}.get(quant_format, 1e-4)
    found, _ = gradient_of(gradient, sites, model)
    expected, _ = gradient_of(gradient, sites, plain)
    assert_same_gradient(found, expected, tolerance=tolerance)


def test_convolutions_that_another_pack_replaced(gradient, sites):  # noqa: F811
    """Tiling nodes put a ``_conv_forward`` of their own on every convolution."""
    model, circular = unet(), unet()

    def padded(conv):
        pads = conv._reversed_padding_repeated_twice

        def forward(x, weight, bias):
            return F.conv2d(F.pad(x, pads, mode="circular"), weight, bias, conv.stride, 0, conv.dilation, conv.groups)

        return forward

    for own, other in zip(model.model.modules(), circular.model.modules(), strict=True):
        if isinstance(own, torch.nn.Conv2d) and any(own._reversed_padding_repeated_twice):
            own._conv_forward, other.padding_mode = padded(own), "circular"
    found, _ = gradient_of(gradient, sites, model)
    assert_same_gradient(found, gradient_of(gradient, sites, circular)[0])


class OwnKernel(torch.nn.Module):
    """A compiled extension's layer, which writes into a buffer of its own."""

    def __init__(self, linear):
        super().__init__()
        self.q, self.b = linear.weight, linear.bias

    def forward(self, x):
        with torch.no_grad():
            return F.linear(x, self.q, self.b)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_layer_without_a_gradient_is_named(gradient, sites, memory):  # noqa: F811
    """Feed-forward alone: the gradient that is left would be wrong without a word."""
    model = unet()
    for parent, name, linear in list(linears(model)):
        if type(parent).__name__ in ("GEGLU", "Sequential"):
            setattr(parent, name, OwnKernel(linear))
    with pytest.raises(ValueError, match=r"No gradient can be taken.*OwnKernel.*Load the model as"):
        gradient_of(gradient, sites, model, memory=memory)


def test_nodes_name_the_layer_without_a_gradient():
    family = FAMILIES["sd15"]
    model = unet()
    for parent, name, linear in list(linears(model)):
        setattr(parent, name, OwnKernel(linear))
    import comfy.samplers

    guider = pack_nodes()["AttendExciteGuider"].execute(model, family.conds(1), family.conds(2), cfg=7.0, subjects="2, 5")[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    latent = family.latent(1)
    with torch.inference_mode(), pytest.raises(ValueError, match="OwnKernel"):
        guider.sample(torch.randn_like(latent), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
