"""The one room that knows ComfyUI's keys.

Everything of the pack attaches to a clone of a MODEL through keyed wrappers (``attach``), keeps its state under one key
of the run's own ``transformer_options`` (``run_state``), and changes a module only while one model call lasts
(``swapped_forward``). Written for the common part of hosts 0.3.75 and 0.30.0.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

log = logging.getLogger("fovea")

ModelOptions = dict[str, Any]
TransformerOptions = dict[str, Any]

# Set in transformer_options by the pack's own extra passes (gradients, references): caches and recorders let them through.
PRIVATE_PASS = "fovea.private_pass"

# transformer_options: a function that takes the place of every attention call that passes its transformer_options on.
_ATTENTION_OVERRIDE = "optimized_attention_override"

# Options through which other nodes reuse results between calls, cut a call up or send it elsewhere.
_FOREIGN_OPTIONS = ("model_function_wrapper", "context_handler", "multigpu_clones")

# Position of transformer_options among the arguments of an APPLY_MODEL wrapper: (x, t, c_concat, c_crossattn, control, options).
_APPLY_MODEL_OPTIONS = 5
_APPLY_MODEL_CONTEXT, _APPLY_MODEL_CONTROL = 3, 4

_WRAPPER_KINDS = {
    "outer_sample": WrappersMP.OUTER_SAMPLE,
    "sampler_sample": WrappersMP.SAMPLER_SAMPLE,
    "predict_noise": WrappersMP.PREDICT_NOISE,
    "calc_cond_batch": WrappersMP.CALC_COND_BATCH,
    "apply_model": WrappersMP.APPLY_MODEL,
}


# --- attaching ------------------------------------------------------------------------------------------------------


def attach(model: ModelPatcher, key: str, technique: object) -> ModelPatcher:
    """A clone of ``model`` whose sampling runs through ``technique``'s methods.

    A method named after a kind of wrapper (``outer_sample``, ``sampler_sample``, ``predict_noise``, ``calc_cond_batch``,
    ``apply_model``) becomes that wrapper. Attaching the same key again replaces what was there.
    """
    clone = detach(model, key)
    for name, kind in _WRAPPER_KINDS.items():
        wrapper = getattr(technique, name, None)
        if wrapper is not None:
            clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def detach(model: ModelPatcher, key: str) -> ModelPatcher:
    """A clone of ``model`` without the wrappers of ``key``."""
    clone = model.clone()
    for kind in _WRAPPER_KINDS.values():
        clone.remove_wrappers_with_key(kind, key)
    return clone


@contextmanager
def run_scope(guider: Any, key: str, state: object) -> Iterator[None]:
    """Keep ``state`` in the guider's options while one sampling run lasts (inside an OUTER_SAMPLE wrapper)."""
    original = guider.model_options
    guider.model_options = {**original, "transformer_options": {**original.get("transformer_options", {}), key: state}}
    try:
        yield
    finally:
        guider.model_options = original


@contextmanager
def sampler_scope(options: ModelOptions, key: str, state: object) -> Iterator[None]:
    """Keep ``state`` in the options that a sampler hands to its model (inside a SAMPLER_SAMPLE wrapper).

    In those very options, and not a copy: another node may hold on to them and change them while the sampler runs.
    """
    transformer = options.setdefault("transformer_options", {})
    transformer[key] = state
    try:
        yield
    finally:
        del transformer[key]


def run_state(options: ModelOptions | TransformerOptions, key: str) -> Any:
    """The state that was put there, from model options or transformer options; None outside such a run."""
    return options.get("transformer_options", options).get(key)


# --- reading a call -------------------------------------------------------------------------------------------------


def apply_model_options(args: Sequence[Any]) -> TransformerOptions:
    """transformer_options among the positional arguments of an APPLY_MODEL wrapper."""
    return args[_APPLY_MODEL_OPTIONS]


def with_apply_model_options(args: Sequence[Any], options: TransformerOptions) -> list[Any]:
    """The same arguments with other transformer_options."""
    return [*args[:_APPLY_MODEL_OPTIONS], options, *args[_APPLY_MODEL_OPTIONS + 1 :]]


def apply_model_text(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """The text of a model call: its cross-attention context, or the conditioning ``name`` of a network that has none."""
    return args[_APPLY_MODEL_CONTEXT] if name == "c_crossattn" else kwargs.get(name)


def changes_features(args: Sequence[Any]) -> bool:
    """True where a model call's feature maps may be changed in place: by ControlNet's residuals, or by patches (FreeU)."""
    return args[_APPLY_MODEL_CONTROL] is not None or bool(apply_model_options(args).get("patches"))


def latent_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """(batch, channels, [frames,] height, width) of a model call; of the video, where video and audio come packed."""
    packed = kwargs.get("latent_shapes")
    return tuple(args[0].shape) if packed is None else (args[0].shape[0], *packed[0][1:])


def activations_size(options: TransformerOptions) -> tuple[int, int] | None:
    """Height and width of the feature map that a U-Net's attention call belongs to."""
    shape = options.get("activations_shape")
    return None if shape is None else (shape[-2], shape[-1])


def in_worker_thread(options: TransformerOptions) -> bool:
    """Whether this model call is one of several at the same time, on several GPUs."""
    return "multigpu_thread_device" in options


def cond_uuids(options: TransformerOptions) -> list[UUID]:
    """Which conditioning each equal chunk of this call's batch belongs to, in batch order."""
    return options["uuids"]


def cond_or_uncond(options: TransformerOptions) -> list[int]:
    """For each equal chunk of this call's batch: the index of its list of conds (0 positive, 1 negative)."""
    return options["cond_or_uncond"]


def diffusion_model(base_model: Any) -> torch.nn.Module:
    """The network inside a BaseModel, without a torch.compile shell."""
    network = base_model.diffusion_model
    return getattr(network, "_orig_mod", network)


def is_compiled(base_model: Any) -> bool:
    """True where torch.compile runs the network or parts of it, so that swapping a forward would recompile or be ignored.

    Core's node swaps compiled modules in only while a model call lasts; what it leaves to see is its wrapper.
    """
    patcher = base_model.current_patcher
    wrapped = patcher is not None and bool(patcher.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"))
    return wrapped or any("_orig_mod" in module._modules for module in base_model.modules())


def has_patches(options: TransformerOptions, name: str) -> bool:
    """Whether a patch or a replacement is registered under ``name`` ("attn1", "attn2"), changing what its module receives."""
    return bool(options.get("patches", {}).get(f"{name}_patch")) or bool(options.get("patches_replace", {}).get(name))


def has_input_patches(options: TransformerOptions, name: str) -> bool:
    """Whether a patch changes the tokens or the context before module ``name`` sees them."""
    return bool(options.get("patches", {}).get(f"{name}_patch"))


def has_output_patches(options: TransformerOptions) -> bool:
    """Whether a patch receives attention outputs and might write to them."""
    patches = options.get("patches", {})
    return bool(patches.get("attn1_output_patch") or patches.get("attn2_output_patch"))


def has_replacements(options: TransformerOptions, name: str) -> bool:
    """Whether another node computes the attention of module ``name`` itself, so that no attention call is to be seen."""
    return bool(options.get("patches_replace", {}).get(name))


def without_replacements(options: TransformerOptions, name: str) -> TransformerOptions:
    """The options without the replacements of ``name``: the block then calls its own attention module."""
    replacements = {k: v for k, v in options.get("patches_replace", {}).items() if k != name}
    return {**options, "patches_replace": replacements}


def needs_uncond(options: ModelOptions) -> bool:
    """True where a sampler (cfg++) or another node (SAG, NAG) asked for a real negative prediction at every step."""
    return bool(options.get("disable_cfg1_optimization", False))


def combines_as_cfg(guider: Any) -> bool:
    """True where the guider mixes exactly [positive, negative] as classifier-free guidance does."""
    return type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise


# --- passes of our own ------------------------------------------------------------------------------------------------


def private_options(options: ModelOptions, *, keeps_patches: bool) -> ModelOptions:
    """Options for a pass of the pack's own: no caches, no compiled modules, no context windows, not seen by our recorders.

    Args:
        keeps_patches: keep what other nodes change inside the network's blocks (FreeU, ToMe, ...). A node that replaces
            attention itself (IPAdapter, PAG) is left out in either case: its attention could not be seen.
    """
    transformer = dict(options.get("transformer_options", {}))
    for name in ("wrappers", "callbacks", "patches_replace", _ATTENTION_OVERRIDE, *(() if keeps_patches else ("patches",))):
        transformer.pop(name, None)
    kept = {name: value for name, value in options.items() if name not in _FOREIGN_OPTIONS}
    return {**kept, "transformer_options": {**transformer, PRIVATE_PASS: True}}


def with_wrapped_patches(options: ModelOptions, wrap: Callable[[Any], Any]) -> ModelOptions:
    """The same options with ``wrap(patch)`` in place of every block patch of another node."""
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
    """Let the host prepare one model call (areas, ControlNet, hooks, casts), and run ``body`` in its place.

    ``body(executor, x, sigma, concat, context, control, transformer_options, **conditioning)`` is an APPLY_MODEL wrapper;
    it is not called where the cond is not active at this sigma.
    """
    wrappers = {WrappersMP.APPLY_MODEL: {PRIVATE_PASS: [body]}}
    transformer = {**options["transformer_options"], "wrappers": wrappers}
    comfy.samplers.calc_cond_batch(base_model, [[cond]], x, sigma, {**options, "transformer_options": transformer})


def cond_region(cond: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """The part of ``x`` that a cond with an area works on, as a view."""
    area: Sequence[int] = cond.get("area") or ()
    for dimension in range(len(area) // 2):
        start = area[len(area) // 2 + dimension]
        x = x.narrow(dimension + 2, start, min(x.shape[dimension + 2] - start, area[dimension]))
    return x


def input_scale(base_model: Any, sigma: torch.Tensor) -> torch.Tensor:
    """z = x * scale, (batch, 1, ...): the model's own input, which is variance preserving for eps and v; 1 for flow models."""
    return base_model.model_sampling.calculate_input(sigma, torch.ones_like(sigma))


# --- sampling -------------------------------------------------------------------------------------------------------------

# What a prompt may carry that makes it act somewhere, sometime or through another network only.
_LIMITS_OF_A_PROMPT = (
    "area", "strength", "mask", "mask_strength", "set_area_to_bounds", "start_percent", "end_percent", "timestep_start",
    "timestep_end", "control", "control_apply_to_uncond", "gligen", "hooks", "default",
)  # fmt: skip


# Of these, what cannot be cut into windows, and what the artist calls it.
LIMITS_OF_A_WINDOW = {"area": "prompts for an area", "control": "ControlNet", "gligen": "GLIGEN"}


def sample(
    guider: Any, noise: Any, sampler: Any, sigmas: torch.Tensor, latent: Mapping[str, Any], on_step: Callable[..., None]
) -> torch.Tensor:
    """What SamplerCustomAdvanced does, with ``on_step(step, denoised, x, steps)`` in place of its progress bar."""
    samples = guider.sample(
        noise.generate_noise(latent), latent["samples"], sampler, sigmas, denoise_mask=latent.get("noise_mask"),
        callback=on_step, disable_pbar=True, seed=noise.seed,
    )  # fmt: skip
    return samples.to(comfy.model_management.intermediate_device())


def sample_plainly(
    guider: Any, noise: Any, sampler: Any, sigmas: torch.Tensor, latent: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The host's SamplerCustomAdvanced: its two latents."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    output, denoised = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args
    return output, denoised


def fitting_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> dict[str, Any]:
    """An empty latent gets the model's channels, a picture for a video model its frame dimension."""
    sizes = [latent[name] for name in ("downscale_ratio_spacial", "downscale_ratio_temporal") if name in latent]
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *sizes)
    kept = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio")}
    return {**kept, "samples": samples}


def latent_channels(model: ModelPatcher) -> tuple[int, int]:
    """Channels of the model's latents, and their dimensions: 2 for pictures, 3 for video, 1 for sound."""
    latent_format = model.get_model_object("latent_format")
    return latent_format.latent_channels, latent_format.latent_dimensions


def pixels_per_latent(model: ModelPatcher) -> int:
    """Side of the picture's part that one latent pixel stands for. (0.3.75 does not say: 8 for all that this pack can name.)"""
    return int(getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8))


def packs_latents(model: ModelPatcher) -> bool:
    """Whether the model samples latents of another shape than its VAE's (HunyuanImage's refiner)."""
    channels, dimensions = latent_channels(model)
    latent = torch.zeros(1, channels, *(1,) * dimensions)
    return model.get_model_object("latent_format").process_in(latent).shape != latent.shape


def preview_callback(model: ModelPatcher, steps: int) -> Callable[..., None]:
    """The sampler's progress bar with its live preview: ``callback(step, denoised, x, steps)``."""
    import latent_preview

    return latent_preview.prepare_callback(model, steps)


def shows_console_progress() -> bool:
    """Whether samplers draw a bar in the console."""
    return bool(comfy.utils.PROGRESS_BAR_ENABLED)


def own_sampler(function: Callable[..., torch.Tensor], like: Any = None) -> Any:
    """A SAMPLER whose loop is ``function(model, x, sigmas, extra_args, callback, disable, **options)``.

    Args:
        like: another SAMPLER whose options it takes over.
    """
    options = ({}, {}) if like is None else (like.extra_options, like.inpaint_options)
    return comfy.samplers.KSAMPLER(function, *options)


def is_k_sampler(sampler: Any) -> bool:
    """Whether a SAMPLER is one of the usual loops over sigmas."""
    return isinstance(sampler, comfy.samplers.KSAMPLER)


def denoise_mask(model: Any, call: Mapping[str, Any], sigma: torch.Tensor) -> torch.Tensor | None:
    """The part of the latent that a sampler may change at ``sigma`` (batch,); None: everything.

    Args:
        model: what a sampler's function is given; ``call`` its ``extra_args``.
    """
    mask = call.get("denoise_mask")
    function = call["model_options"].get("denoise_mask_function")
    if mask is None or function is None:
        return mask
    return function(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})


def is_hosts_own_loop(sampler: Any) -> bool:
    """Whether a SAMPLER's loop is one that the host brings, so that what it tells its progress bar is known.

    Noise added on the way (``s_churn``) gives it other sigmas than the schedule's.
    """
    if not is_k_sampler(sampler) or sampler.extra_options.get("s_churn"):
        return False
    return str(getattr(sampler.sampler_function, "__module__", "")).split(".")[0] == "comfy"


def is_flow(base_model: Any) -> bool:
    """Whether latents are mixed as (1 - sigma) * picture + sigma * noise, so that sigma 0 is a time the model knows."""
    return isinstance(base_model.model_sampling, comfy.model_sampling.CONST)


def smallest_sigma(base_model: Any) -> float:
    return float(base_model.model_sampling.sigma_min)


def noised(base_model: Any, latent: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """A clean latent as the sampler would have it at ``sigma``."""
    level = latent.new_full((len(latent),), sigma, dtype=torch.float32)
    return base_model.model_sampling.noise_scaling(level, noise, latent)


def prompts_of(guider: Any) -> list[Sequence[Mapping[str, Any]]]:
    """All prompts that a guider was given, before it samples: for each kind (positive, negative, ...) the list of its conds."""
    return list(getattr(guider, "original_conds", {}).values())


@contextmanager
def prompts_by_area(guider: Any, areas: Sequence[tuple[int, ...]]) -> Iterator[None]:
    """Let every prompt of a running guider act in each of the areas (sizes, then starts), which the host then averages."""
    before = guider.conds
    guider.conds = {
        name: [{**cond, "area": area, "uuid": uuid4()} for cond in conds for area in areas] for name, conds in before.items()
    }
    try:
        yield
    finally:
        guider.conds = before


def prompt_everywhere(conditioning: Sequence[Any], **defaults: Any) -> dict[str, Any]:
    """The first prompt of a CONDITIONING, for the whole picture and the whole run, without ControlNet.

    Args:
        defaults: what it carries where it does not say otherwise itself.
    """
    cond = comfy.sampler_helpers.convert_cond(conditioning[:1])[0]
    return {**defaults, **{name: value for name, value in cond.items() if name not in _LIMITS_OF_A_PROMPT}}


def processed_cond(
    base_model: Any, cond: dict[str, Any], like: torch.Tensor, seed: int | None, latent_image: torch.Tensor, mask: Any = None
) -> dict[str, Any]:
    """A prompt as model calls on latents of the size of ``like`` need it."""
    conds = {"negative": [cond]}
    shapes = [tuple(like.shape)]
    done = comfy.samplers.process_conds(base_model, like, conds, like.device, latent_image, mask, seed, latent_shapes=shapes)
    return done["negative"][0]


def cond_values(cond: Mapping[str, Any]) -> dict[str, Any]:
    """What the network is given of a processed prompt: tensors, lists of them, and plain values."""
    return {name: value.cond for name, value in sorted(cond["model_conds"].items())}


def weights_key(guider: Any) -> tuple[Any, ...] | None:
    """Changes whenever the model computes something else; None where that cannot be known."""
    model = guider.model_patcher
    values = {name: value for name, value in model.object_patches.items() if name != "model_sampling"}
    if any(model.injections.values()) or not all(isinstance(value, (str, int, float)) for value in values.values()):
        return None
    return (model.patches_uuid, *sorted(values.items()))


def schedule_key(base_model: Any, sigma: float) -> tuple[float, float]:
    """How the model reads a sigma: the time it is told, and the scale of its input."""
    level = torch.tensor([sigma])
    sampling = base_model.model_sampling
    on_device = level.to(sampling.sigma_max.device) if isinstance(sampling.sigma_max, torch.Tensor) else level
    return float(sampling.timestep(on_device)), float(input_scale(base_model, level))


def free_system_memory() -> float:
    """Bytes of RAM that nobody uses."""
    return float(comfy.model_management.get_free_memory(torch.device("cpu")))


# --- weights ------------------------------------------------------------------------------------------------------------


def is_weighted_operation(module: torch.nn.Module) -> bool:
    """One of the host's own operations, whose weights it casts and streams. (Not what a network derives from them.)"""
    return isinstance(module, comfy.ops.CastWeightBiasOp) and type(module).forward.__module__ == comfy.ops.__name__


@contextmanager
def cast_weights(module: Any, like: torch.Tensor) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Weight and bias of an operation as it would use them on ``like``; the host may take them back after the block."""
    if module.weight is None:
        yield None, None
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        plain = weight.dequantize() if type(weight) not in (torch.Tensor, torch.nn.Parameter) else weight
        yield plain, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def plain_kernel(function: Any) -> Any:
    """The plain torch form of one of 0.30.0's fused kernels (RoPE), which have no gradient; other functions as they are."""
    namespace, _, name = str(function).partition(".")
    if namespace != "comfy_kitchen":
        return function
    from comfy_kitchen.backends.eager import rope

    return getattr(rope, name.removesuffix(".default"), function)


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Let 0.30.0 choose kernels that have a gradient (RoPE, quantised matmul); 0.3.75 has no others."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is not None:
        comfy.model_management.in_training = True
    try:
        yield
    finally:
        if before is not None:
            comfy.model_management.in_training = before


def check_interrupted() -> None:
    """Ends the run where the user cancelled it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class Progress:
    """The progress bar of the running node, for what happens inside one of its steps; moving it ends a cancelled run."""

    def __init__(self, steps: int) -> None:
        self.bar = comfy.utils.ProgressBar(steps)

    def show(self, step: float) -> None:
        check_interrupted()
        self.bar.update_absolute(step)


def compute_dtype(base_model: Any) -> torch.dtype:
    """What the network computes in."""
    return base_model.manual_cast_dtype or base_model.get_dtype()


def forward_memory(base_model: Any, x: torch.Tensor) -> float:
    """Bytes that the host reckons for one forward on ``x``."""
    return float(base_model.memory_required(list(x.shape)))


def empty_cache() -> None:
    """Give memory that torch holds for later back to the device."""
    comfy.model_management.soft_empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """The host's own judgement: on a machine without a GPU it counts no error as out of memory."""
    kind = comfy.model_management.OOM_EXCEPTION
    return isinstance(error, torch.OutOfMemoryError) or (kind is not Exception and isinstance(error, kind))


# --- watching attention ---------------------------------------------------------------------------------------------


def with_attention_observer(options: TransformerOptions, observe: Callable[..., None]) -> TransformerOptions:
    """Options whose attention calls first show their arguments to ``observe`` and then go the way they would have gone.

    What was installed before is called as before; the result is passed on untouched. (A plain closure: 0.3.75 copies
    objects that it finds in the options.)
    """
    previous = options.get(_ATTENTION_OVERRIDE)

    def override(attention: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        observe(*args, **kwargs)
        return attention(*args, **kwargs) if previous is None else previous(attention, *args, **kwargs)

    return {**options, _ATTENTION_OVERRIDE: override}


def with_attention(options: TransformerOptions, attention: Callable[..., torch.Tensor]) -> TransformerOptions:
    """Options whose attention calls are made by ``attention(host_function, *args, **kwargs)``, whatever was there before."""

    def override(host_function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(host_function, *args, **kwargs)

    return {**options, _ATTENTION_OVERRIDE: override}


@contextmanager
def options_for_attention(modules: tuple[str, ...], options: TransformerOptions) -> Iterator[None]:
    """Let the attention calls of ``modules``, which drop transformer_options, carry ``options`` while the block lasts."""
    loaded = [sys.modules[name] for name in modules if name in sys.modules]
    before = [(module, module.optimized_attention) for module in loaded]

    def carrying(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: attention(*args, **{"transformer_options": options, **kwargs})

    try:
        for module, attention in before:
            module.optimized_attention = carrying(attention)  # type: ignore[attr-defined]
        yield
    finally:
        for module, attention in before:
            module.optimized_attention = attention  # type: ignore[attr-defined]


# --- modules, memory, control ---------------------------------------------------------------------------------------


@contextmanager
def swapped_forward(replacements: list[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another ``forward`` for the length of the block; what was there before comes back in any case."""
    before = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def spare_memory(device: torch.device) -> float:
    """Bytes on ``device`` beyond what the host keeps free for inference; unlimited on the CPU."""
    if device.type == "cpu":
        return float("inf")
    return comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
