"""Ways in which a network holds its weights, each beside the same network with the same numbers in plain float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
import torch
import torch.nn.functional as F

from families.tested import FAMILIES

FAMILY = FAMILIES["sd15"]
CPU = torch.device("cpu")


def linears(model: Any) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """Yield (parent, name, layer) for every Linear in the transformer blocks of a model."""
    for path, parent in list(model.model.diffusion_model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and "transformer_blocks" in f"{path}.{name}":
                yield parent, name, child


class PackedLinear(comfy.ops.manual_cast.Linear):
    """As loaders of GGUF files do it: bytes in place of the weight, unpacked by the layer's own forward."""

    @classmethod
    def of(cls, linear: Any) -> torch.Tensor:
        """Pack the weight of a layer, and return the numbers that the bytes stand for."""
        linear.__class__ = cls
        weight = linear.weight.float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        q = (weight / scale).round().to(torch.int8)
        linear.weight = torch.nn.Parameter(torch.cat([scale.view(torch.uint8), q.view(torch.uint8)], 1), requires_grad=False)
        return q.float() * scale

    def forward_comfy_cast_weights(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = self.weight.to(input.device)
        scale, q = weight[:, :4].contiguous().view(torch.float32), weight[:, 4:].view(torch.int8)
        bias = None if self.bias is None else self.bias.to(input)
        return F.linear(input, q.to(input.dtype) * scale.to(input.dtype), bias)


def quantised(linear: Any, quant_format: str, **sizes: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a layer in one of ComfyUI's quantised formats (0.30.0), and the weight that it acts as."""
    from comfy.quant_ops import QUANT_ALGOS

    layout = QUANT_ALGOS[quant_format]["comfy_tensor_layout"]
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    layer = operations.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.quant_format, layer.layout_type = quant_format, layout
    packed = comfy.ops.QuantizedTensor.from_float(linear.weight.data, layout, **sizes)
    layer.weight, layer.bias = torch.nn.Parameter(packed, requires_grad=False), linear.bias
    # What the layer does to its input, whatever the format does to the weight.
    effective = layer(torch.eye(linear.in_features)).detach() - (0 if linear.bias is None else linear.bias)
    return layer, effective.T


# --- what is done to the layers of a model, and to those of its plain twin ------------------------------------------------


def pack(model: Any, plain: Any) -> None:
    """Pack every Linear, as loaders of GGUF files do."""
    for (_, _, packed), (_, _, linear) in zip(linears(model), linears(plain), strict=True):
        linear.weight.copy_(PackedLinear.of(packed))


def quantise(model: Any, plain: Any) -> None:
    """Hold every Linear in ComfyUI's fp8 format with a scale."""
    for (parent, name, linear), (_, _, other) in zip(list(linears(model)), linears(plain), strict=True):
        layer, effective = quantised(linear, "float8_e4m3fn")
        setattr(parent, name, layer)
        other.weight.copy_(effective)


def _differences(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    network = model.model.diffusion_model
    names = {id(layer): f"{name}.weight" for name, layer in network.named_modules()}
    return {names[id(linear)]: 0.02 * torch.randn(linear.weight.shape, generator=generator) for _, _, linear in linears(model)}


def add_lora(model: Any, plain: Any) -> None:
    """Add a difference to every Linear, which ComfyUI merges, or applies for every call where weights are streamed."""
    found = _differences(plain)
    model.add_patches({f"diffusion_model.{name}": ("diff", (difference,)) for name, difference in found.items()}, 1.0)
    weights = dict(plain.model.diffusion_model.named_parameters())
    for name, difference in found.items():
        weights[name].add_(difference)


def add_lora_at_call_time(model: Any, plain: Any) -> None:
    """Add a difference to every Linear for every call, as ComfyUI does where it streams weights, wherever this runs."""
    found = _differences(plain)
    modules, weights = dict(model.model.diffusion_model.named_modules()), dict(plain.model.diffusion_model.named_parameters())
    for name, difference in found.items():
        weights[name].add_(difference)

    def loaded(*args: Any) -> None:  # loading takes such functions away
        for name, difference in found.items():
            module = modules[name.removesuffix(".weight")]
            module.weight_function = [lambda weight, difference=difference: weight + difference.to(weight)]
            module.comfy_cast_weights = True

    model.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, loaded)


@dataclass(frozen=True)
class Way:
    """How weights are held.

    Attributes:
        stored: the type of the parameters; None: what the network computes in.
        change: what is done to the layers of the model and of its plain twin.
    """

    stored: torch.dtype | None = None
    change: Callable[[Any, Any], None] | None = None


WAYS = {
    "plain": Way(),
    "fp8": Way(torch.float8_e4m3fn),
    "packed": Way(change=pack),
    "LoRA": Way(change=add_lora),
    "LoRA at call time": Way(change=add_lora_at_call_time),
}
if hasattr(comfy.ops, "linear_input_act"):  # a ComfyUI whose quantised layers are made so
    WAYS["quantised"] = Way(change=quantise)


def pair(name: str, compute: torch.dtype = torch.float32, device: torch.device = CPU, offload: torch.device = CPU) -> Any:
    """Return a tiny model that holds its weights in one of ``WAYS``, and the same numbers in plain float32 on the CPU.

    Args:
        compute: what the first one computes in, on ``device``; its weights are made on ``offload``.
    """
    way = WAYS[name]
    stored = way.stored or compute
    plain = FAMILY.build()
    config = getattr(comfy.supported_models, FAMILY.config)({**FAMILY.unet, "dtype": stored})
    config.set_inference_dtype(stored, None if stored == compute else compute)
    base = config.get_model({}, device=offload).eval()
    for own, other in zip(base.parameters(), plain.model.parameters(), strict=True):
        own.requires_grad_(False).copy_(other)
        other.copy_(own.float())
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    model = kind(base, load_device=device, offload_device=offload)
    if way.change is not None:
        way.change(model, plain)
    return model, plain
