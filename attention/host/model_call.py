"""Reading and changing the arguments of one model call, and model calls of the pack's own (internal passes)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from .attention_calls import _ATTENTION_OVERRIDE
from .network_parts import named_modules
from .patching import ModelOptions, TransformerOptions

# Set in transformer_options by the pack's own extra passes (gradients, references): caches and recorders let them through.
INTERNAL_PASS = "fovea.internal_pass"

# Options through which other nodes reuse results between calls, cut a call up or send it elsewhere.
_FOREIGN_OPTIONS = ("model_function_wrapper", "context_handler", "multigpu_clones")

# Position of transformer_options among the arguments of an APPLY_MODEL wrapper: (x, t, c_concat, c_crossattn, control, options).
_APPLY_MODEL_OPTIONS = 5
_APPLY_MODEL_CONTEXT, _APPLY_MODEL_CONTROL = 3, 4


def apply_model_options(args: Sequence[Any]) -> TransformerOptions:
    """Return transformer_options from the positional arguments of an APPLY_MODEL wrapper."""
    return args[_APPLY_MODEL_OPTIONS]


def with_apply_model_options(args: Sequence[Any], options: TransformerOptions) -> list[Any]:
    """Return the same arguments with other transformer_options."""
    return [*args[:_APPLY_MODEL_OPTIONS], options, *args[_APPLY_MODEL_OPTIONS + 1 :]]


def apply_model_text(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """Return the text of a model call: its cross-attention context, or the conditioning ``name`` of a network that has none."""
    return args[_APPLY_MODEL_CONTEXT] if name == "c_crossattn" else kwargs.get(name)


def changes_features(args: Sequence[Any]) -> bool:
    """Return True where a model call's feature maps may be changed in place: by ControlNet's residuals, or by patches (FreeU)."""
    return args[_APPLY_MODEL_CONTROL] is not None or bool(apply_model_options(args).get("patches"))


def latent_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return (batch, channels, [frames,] height, width) of a model call; of the video, where video and audio come packed."""
    packed = kwargs.get("latent_shapes")
    return tuple(args[0].shape) if packed is None else (args[0].shape[0], *packed[0][1:])


def in_worker_thread(options: TransformerOptions) -> bool:
    """Return whether this model call is one of several at the same time, on several GPUs."""
    return "multigpu_thread_device" in options


def prompts_of_call(
    options: TransformerOptions, batch: int, images: int, entries: Iterable[UUID]
) -> list[tuple[int, UUID]] | None:
    """Return what each equal chunk of a model call's batch belongs to: the index of its list of conds, and its entry there.

    None where what the options say is not what is there: another node has split, doubled or put together the batch.

    Args:
        images: that are evaluated: the size of a chunk.
        entries: of all lists of conds; with areas, one comes several times.
    """
    lists: Sequence[int] = options.get("cond_or_uncond", ())
    uuids: Sequence[UUID] = options.get("uuids", ())
    if len(lists) != len(uuids) or batch != len(uuids) * images or Counter(uuids) - Counter(entries):
        return None
    return list(zip(lists, uuids, strict=True))


def cond_or_uncond(options: TransformerOptions) -> list[int]:
    """Return for each equal chunk of this call's batch the index of its list of conds (0 positive, 1 negative)."""
    return options["cond_or_uncond"]


def diffusion_model(base_model: Any) -> torch.nn.Module:
    """Return the network inside a BaseModel, without a torch.compile shell."""
    network = base_model.diffusion_model
    return getattr(network, "_orig_mod", network)


def is_compiled(base_model: Any) -> bool:
    """Return True where torch.compile runs the network or parts of it, so that swapping a forward would recompile or be ignored.

    Core's node swaps compiled modules in only while a model call lasts; what it leaves to see is its wrapper. Other packs
    compile modules in place (``module.compile()``), or their ``forward`` alone.
    """
    patcher = base_model.current_patcher
    wrapped = patcher is not None and bool(patcher.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"))
    return wrapped or any(_is_compiled_module(module) for _, module in named_modules(base_model))


def _is_compiled_module(module: torch.nn.Module) -> bool:
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def needs_uncond(options: ModelOptions) -> bool:
    """Return True where a sampler (cfg++) or another node (SAG, NAG) asked for a real negative prediction at every step."""
    return bool(options.get("disable_cfg1_optimization", False))


def internal_options(options: ModelOptions, *, keeps_patches: bool) -> ModelOptions:
    """Return options for a pass of the pack's own: no caches, no compiled modules, no context windows, not seen by our recorders.

    Args:
        keeps_patches: keep what other nodes change inside the network's blocks (FreeU, ToMe, ...). A node that replaces
            attention itself (IPAdapter, PAG) is left out in either case: its attention could not be seen.
    """
    transformer = dict(options.get("transformer_options", {}))
    for name in ("wrappers", "callbacks", "patches_replace", _ATTENTION_OVERRIDE, *(() if keeps_patches else ("patches",))):
        transformer.pop(name, None)
    kept = {name: value for name, value in options.items() if name not in _FOREIGN_OPTIONS}
    return {**kept, "transformer_options": {**transformer, INTERNAL_PASS: True}}


def with_wrapped_patches(options: ModelOptions, wrap: Callable[[Any], Any]) -> ModelOptions:
    """Return the same options with ``wrap(patch)`` in place of every block patch of another node."""
    transformer = options["transformer_options"]
    if "patches" not in transformer:
        return options
    wrapped = {name: [wrap(patch) for patch in patches] for name, patches in transformer["patches"].items()}
    return {**options, "transformer_options": {**transformer, "patches": wrapped}}


def call_with_cond(
    base_model: Any,
    cond: dict[str, Any],
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: ModelOptions,
    body: Callable[..., torch.Tensor],
) -> None:
    """Let ComfyUI prepare one model call (areas, ControlNet, hooks, casts), and run ``body`` in its place.

    ``body(executor, x, sigma, concat, context, control, transformer_options, **conditioning)`` is an APPLY_MODEL wrapper;
    it is not called where the cond is not active at this sigma.
    """
    wrappers = {WrappersMP.APPLY_MODEL: {INTERNAL_PASS: [body]}}
    transformer = {**options["transformer_options"], "wrappers": wrappers}
    comfy.samplers.calc_cond_batch(base_model, [[cond]], x, sigma, {**options, "transformer_options": transformer})
