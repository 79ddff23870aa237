"""Convolutions that join opposite edges of the image, so that it repeats without a seam: made here, or found in a MODEL."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import logging
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .model_call import diffusion_model
from .node_text import NodeText
from .patching import attach, detach

_KEY = "fovea.seamless"
# What an object patch of a convolution changes.
_PADDING_MODE, _CLASS, _CONVOLVE, _FORWARD = "padding_mode", "__class__", "_conv_forward", "forward"
_PREFIX = "diffusion_model."
_MIXING_METHODS = {"bicubic", "bilinear"}  # of ComfyUI's scaling: they look beyond the pixels that they stand for
_PROBE = 16  # side of the image on which a convolution of another node is tried


class Edges(NamedTuple):
    """Which opposite edges of an image are joined."""

    top_bottom: bool
    left_right: bool

    @classmethod
    def of_axis(cls, axis: str) -> Edges:
        """Return the edges of "both", "horizontal" (left and right) or "vertical" (top and bottom).

        Raises:
            ValueError: another word.
        """
        if axis not in AXES:
            raise ValueError(f"axis is '{axis}': use {', '.join(AXES)}.")
        return cls(axis != "horizontal", axis != "vertical")


AXES = ("both", "horizontal", "vertical")


@functools.cache
def _joining_class(base: type[nn.Conv2d], edges: Edges) -> type[nn.Conv2d]:
    """Return a class of convolutions that pad one pair of edges with the other one's pixels, and the other pair with zeros."""

    def convolve(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        across, down = (left, right, 0, 0), (0, 0, top, bottom)
        joined, ended = (across, down) if edges.left_right else (down, across)
        x = F.pad(F.pad(x, joined, mode="circular"), ended)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    return type(base.__name__, (base,), {_CONVOLVE: convolve, "__module__": base.__module__})


def join_edges(model: Any, network: nn.Module, edges: Edges) -> Any:
    """Return a clone of a MODEL whose convolutions join these edges and no others; none of them: as if never joined.

    What another node has changed in the modules themselves stays.
    """
    clone = detach(model, _KEY)
    for name in [name for name in clone.object_patches if is_tiling_patch(name)]:
        del clone.object_patches[name]
    if not any(edges):
        return clone
    clone = attach(clone, _KEY, _Seams(edges, _halvings(network)))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            place = f"{_PREFIX}{name}."
            if all(edges):
                clone.add_object_patch(place + _PADDING_MODE, "circular")
            else:
                kind: Any = type(module)
                clone.add_object_patch(place + _CLASS, _joining_class(kind, edges))
    return clone


class _Seams:
    """Says before a run why its image may have a seam: sides that cannot be joined, or another node's convolutions."""

    def __init__(self, edges: Edges, halvings: int) -> None:
        self.edges = edges
        self.halvings = halvings
        self.text = NodeText()

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj.model_patcher
        edges = _edges_asked_for(model)
        sizes = sizes_with_a_seam(edges, self.halvings, noise.shape[-2], noise.shape[-1])
        text = "; ".join(filter(None, [_shrinking_with_a_seam(model, edges), sizes]))
        if text:
            self.text.tell(f"Seamless Tiling: {text}", logging.WARNING)
        else:
            self.text.nothing()
        return executor(noise, *args, **kwargs)

    def sampler_sample(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        network, edges = diffusion_model(guider.inner_model), _edges_asked_for(guider.model_patcher)
        _drop_what_was_put_back(network)
        other = _other_tiling(network, edges) if any(edges) else None  # the model is loaded now, as it will run
        if other is not None:
            self.text.tell(
                f"Seamless Tiling: another node ({other}) has replaced the convolutions of this model and joins other edges, so "
                "the image may show a seam. Remove the other tiling node; if this line stays, restart ComfyUI.",
                logging.WARNING,
            )
        return executor(guider, *args, **kwargs)


def _edges_asked_for(model: Any) -> Edges:
    """Return which edges a running MODEL was made to join, perhaps fewer than the MODEL that it was made from."""
    running = model.get_wrappers(WrappersMP.OUTER_SAMPLE, _KEY)
    return running[0].__self__.edges if running else Edges(False, False)


def _drop_what_was_put_back(network: nn.Module) -> None:
    """Take away methods that ComfyUI has put on convolutions after another node's object patch: they hide a class's own."""
    for module in network.modules():
        function = getattr(module.__dict__.get(_CONVOLVE), "__func__", None)
        if isinstance(module, nn.Conv2d) and function is not None and not _is_foreign(function):
            del module.__dict__[_CONVOLVE]


def _other_tiling(network: nn.Module, edges: Edges) -> str | None:
    """Return where the function comes from that makes a loaded network join other edges than these; None: it joins them."""
    for conv in _convolutions(network, {}):
        if conv.replaced is not None and _edges_of(conv) != edges:
            function = conv.replaced.func if isinstance(conv.replaced, functools.partial) else conv.replaced
            return str(getattr(function, "__module__", type(function).__module__))
    return None


def sizes_with_a_seam(edges: Edges, halvings: int, height: int, width: int) -> str:
    """Return which sides of a latent the network cannot halve as often as it does, and what to use; empty: none.

    Args:
        height, width: in latent pixels of an eighth of the image's, as all U-Nets here have them.
    """
    unit = 2**halvings
    wrong = [
        (name, side)
        for name, side, joined in (("height", height, edges.top_bottom), ("width", width, edges.left_right))
        if joined and side % unit
    ]
    if not wrong:
        return ""
    parts = [
        f"{name} {side * 8} (use {side // unit * unit * 8 or unit * 8} or {-(-side // unit) * unit * 8})" for name, side in wrong
    ]
    return (
        f"the image may show a seam, because the model halves it {halvings} times and cannot halve {' and '.join(parts)}. "
        f"Sides that repeat must be multiples of {unit * 8} pixels."
    )


def _shrinking_with_a_seam(model: Any, edges: Edges) -> str:
    """Return what to change in a Deep Shrink node whose scaling mixes pixels and takes the edges for ends; empty: nothing."""
    patches = model.model_options.get("transformer_options", {}).get("patches", {}).values()
    mixing = {
        value
        for patch in itertools.chain.from_iterable(patches)
        if getattr(patch, "__module__", "").endswith("nodes_model_downscale")
        for name, value in inspect.getclosurevars(patch).nonlocals.items()
        if name.endswith("scale_method") and value in _MIXING_METHODS
    }
    if not any(edges) or not mixing:
        return ""
    return (
        f"the image may show a seam, because Deep Shrink scales by '{min(mixing)}', which takes the edges for ends. Set its "
        "downscale_method and upscale_method to bislerp"
    )


def _halvings(network: nn.Module) -> int:
    blocks = getattr(network, "input_blocks", ())
    return sum(type(module).__name__ == "Downsample" for block in blocks for module in block.modules())


def is_tiling_patch(name: str) -> bool:
    """Return whether an object patch of this name changes how a convolution meets the edges (``tiling_key`` reads which)."""
    return name.startswith(_PREFIX) and name.endswith((f".{_PADDING_MODE}", f".{_CLASS}"))


# Tilings of any pack


def joined_edges(model: Any, network: nn.Module) -> Edges:
    """Return which edges a MODEL's convolutions join: by this pack or another, by object patches or in the modules."""
    patches = {**model.object_patches_backup, **model.object_patches}  # another clone's may be in the modules now
    found = [_edges_of(conv) for conv in _convolutions(network, patches)]
    return Edges(any(edges.top_bottom for edges in found), any(edges.left_right for edges in found))


def tiling_key(network: nn.Module) -> Hashable | None:
    """Return a key that changes with how a loaded network's convolutions pad; None where that cannot be known."""
    digest = hashlib.blake2b(digest_size=16)
    for conv in _convolutions(network, {}):
        if conv.forward is not None:
            return None
        module = conv.module
        digest.update(repr((conv.mode, module.padding, module.stride, module.dilation)).encode())
        if conv.replaced is not None:
            answer = _answer(conv, torch.randn(_probe_shape(module), generator=torch.Generator().manual_seed(0)))
            if answer is None:
                return None
            digest.update(answer.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Convolution(NamedTuple):
    """A padding convolution as a MODEL runs it.

    Attributes:
        replaced: what takes the place of its ``_conv_forward``; forward: what another node runs instead of all of it.
    """

    module: nn.Conv2d
    mode: str
    replaced: Any
    forward: Any


def _convolutions(network: nn.Module, patches: Mapping[str, Any]) -> Iterator[_Convolution]:
    whole = {name: value for name, value in patches.items() if isinstance(value, nn.Conv2d)}
    for name, original in network.named_modules():
        place = _PREFIX + name
        module = whole.get(place, original)
        if not isinstance(module, nn.Conv2d) or not any(module.padding):
            continue

        def now(attribute: str, own: Any, place: str = place) -> Any:
            return patches.get(f"{place}.{attribute}", own)

        cls = now(_CLASS, type(module))
        replaced = now(_CONVOLVE, module.__dict__.get(_CONVOLVE))
        if getattr(replaced, "__func__", None) is type(module)._conv_forward:
            replaced = None  # put back by ComfyUI
        if replaced is None and _is_foreign(cls._conv_forward):
            replaced = functools.partial(cls._conv_forward, module)
        yield _Convolution(
            module, now(_PADDING_MODE, module.padding_mode), replaced, now(_FORWARD, module.__dict__.get(_FORWARD))
        )


def _is_foreign(function: Any) -> bool:
    return getattr(function, "__module__", "") not in ("comfy.ops", "torch.nn.modules.conv")


def _edges_of(conv: _Convolution) -> Edges:
    if conv.replaced is None:
        return Edges(conv.mode == "circular", conv.mode == "circular")
    found = []
    for dimension in (-2, -1):
        x = torch.zeros(_probe_shape(conv.module))
        x.select(dimension, x.shape[dimension] - 1).fill_(1)
        answer = _answer(conv, x)
        found.append(answer is not None and bool(answer.select(dimension, 0).abs().max() > 0))
    return Edges(*found)


def _probe_shape(module: nn.Conv2d) -> tuple[int, int, int, int]:
    side = _PROBE * max(1, *(size * step // 4 for size, step in zip(module.kernel_size, module.dilation, strict=True)))
    return (1, module.groups, side, side)


def _answer(conv: _Convolution, x: Tensor) -> Tensor | None:
    """Return what the convolution makes of ``x`` with weights of its own form; None where it cannot be asked."""
    weight = torch.linspace(1, 2, conv.module.groups * conv.module.kernel_size[0] * conv.module.kernel_size[1])
    try:
        with torch.no_grad():
            answer = conv.replaced(x, weight.view(conv.module.groups, 1, *conv.module.kernel_size), None)
        return answer.float() if isinstance(answer, Tensor) else None
    except Exception:
        return None
