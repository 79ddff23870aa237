"""Seeing where a network looks while a sampler runs, without changing the image.

One observer stands beside every attention call of the model (``host.with_attention_observer``), recomputes the softmax of
the layers that were asked for and adds it to the run's sums (``recorder``). Which layer a call belongs to is known from
hooks on the network's own modules, which stay for the length of one model call; which step, prompt and image it belongs
to from ComfyUI's batch. Only the sampler's own evaluation of its prompts counts, and of samplers that evaluate a step
several times only the first one.

Nothing is kept on the model: a run's state is made when sampling starts, and becomes a ``Recording`` in the node's
``AttnMaps`` when it ends well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from .. import host
from ..host import ModelOptions, StepClock, TransformerOptions, follow_sampler, log, read_sigma
from ..networks.grids import unet_block, unet_sizes
from ..networks.layer_names import parse_layers
from ..networks.layers import AttentionLayer, attention_layers
from ..networks.table import LEFT_PADDED_MODELS, network_layout, unknown_network_message
from .attn_maps import AttnMaps
from .observer import ModelCall
from .probabilities import WORKING_BYTES
from .recorder import CaptureRun
from .recording import LatentSize
from .runs import Run
from .settings import NO_SELF_ATTENTION, CaptureSettings
from .token_places import WatchedModel

KEY = "fovea.capture"
_LEVELS = 1024  # side of a latent on which all levels of a U-Net differ


def chosen_layers(network: torch.nn.Module, text: str) -> list[AttentionLayer]:
    """Return the layers that ``text`` names; where it is empty, DAAM's set: no middle block or coarsest level of a U-Net."""
    layers = attention_layers(network)
    names = list(dict.fromkeys(layer.name for layer in layers))
    if not text.strip():
        coarsest = _coarsest_blocks(network)
        return [
            layer
            for layer in layers
            if not layer.name.startswith("middle") and (layer.kind == "self" or unet_block(layer.name) not in coarsest)
        ]
    if all(layer.kind == "unknown" for layer in layers):
        raise ValueError(f"layers is '{text}', but {unknown_network_message(network)}. Leave layers empty.")
    chosen = set(parse_layers(text, names))
    return [layer for layer in layers if layer.name in chosen]


def _kept_latent(latent: Tensor, shapes: Sequence[Sequence[int]] | None) -> Tensor:
    """Return what a run is known by: the latent in half precision; of video and sound that come packed, the video."""
    if shapes is not None and len(shapes) > 1:
        latent = latent.reshape(latent.shape[0], -1)[:, : math.prod(shapes[0][1:])].reshape(latent.shape[0], *shapes[0][1:])
    with torch.inference_mode(False), torch.no_grad():
        return latent.detach().to("cpu", torch.float16, copy=True)


def _coarsest_blocks(network: torch.nn.Module) -> set[str]:
    """Return the blocks of a U-Net whose maps of words are eight times smaller than the latent, and so left out by DAAM."""
    layout = network_layout(network)
    if layout is None or layout.family != "U-Net":
        return set()
    return {block for block, (height, _) in unet_sizes(network, _LEVELS, _LEVELS).items() if height * 8 <= _LEVELS}


class Capture:
    """Wrappers of one capture node. Holds settings and the handle to fill; a run's state lives in that run's options.

    Each has a key of its own, so that two capture nodes on one model both see the run.

    Args:
        text: where a node says what was recorded; None: in the log alone.
    """

    def __init__(self, settings: CaptureSettings, maps: AttnMaps, text: host.NodeText | None = None) -> None:
        self.settings = settings
        self.text = text
        self.maps = maps
        self.key = f"{KEY}.{uuid4().hex}"

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Record the run, and hand its maps to the node's handle if it ends well."""
        guider = executor.class_obj
        run = CaptureRun(self.settings, StepClock.from_sigmas(sigmas), guider, len(noise))
        with host.run_scope(guider, self.key, run):
            result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        start, end = (_kept_latent(latent, kwargs.get("latent_shapes")) for latent in (latent_image, result))
        recording = run.recording()
        patcher = guider.model_patcher
        height, width = end.shape[-2:]
        recording.latent = LatentSize(height, width, host.pixels_per_latent(patcher), host.frames_per_latent(patcher))
        seed = args[3] if len(args) > 3 else kwargs.get("seed")
        self.maps.fill(Run(recording, start, end, seed, host.executing_node()), run.memory.limit)
        if self.text is None:
            log.info(run.summary())
        else:
            self.text.tell(run.summary())
        return result

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """Let ComfyUI make room for the work; the maps themselves go to system memory where the device has none for them."""
        return host.prepare_with_room(WORKING_BYTES, executor, model, noise_shape, *args, **kwargs)

    sampler_sample = staticmethod(follow_sampler)

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, model_options: ModelOptions, seed: Any = None) -> Any:
        run = host.run_state(model_options, self.key)
        if run is not None:
            run.prompts = executor.class_obj.conds
            sigma, model_options = read_sigma(timestep, model_options)
            run.begin_evaluation(len(x), sigma, host.steps_done(model_options))
        return executor(x, timestep, model_options, seed)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: ModelOptions
    ) -> Any:
        run: CaptureRun | None = host.run_state(model_options, self.key)
        if run is None or not run.awaits_main_call or host.run_state(model_options, host.INTERNAL_PASS):
            return executor(model, conds, x, timestep, model_options)
        with run.main_call(conds, x):
            return executor(model, conds, x, timestep, model_options)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = host.apply_model_options(args)
        run: CaptureRun | None = host.run_state(options, self.key)
        if run is None or run.names is None or host.run_state(options, host.INTERNAL_PASS):
            return executor(*args, **kwargs)
        call = self._call(run, executor.class_obj, args, kwargs, options)
        if call is None:
            return executor(*args, **kwargs)
        watched = host.with_attention_observer(options, call.observe)
        layout = call.model.layout
        swapped = layout.drops_options if layout is not None else ()
        if layout is not None and swapped and host.in_worker_thread(options):
            run.note(f"the attention of {layout.family} cannot be seen on several GPUs at once")
            swapped = ()
        with call.watching(), host.options_for_attention(swapped, watched):
            return executor(*host.with_apply_model_options(args, watched), **kwargs)

    def _call(
        self, run: CaptureRun, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: TransformerOptions
    ) -> ModelCall | None:
        """Return this model call, or None where it is not to be recorded."""
        with run.lock:
            watched = self._watched(run, model)
            tracks = run.tracks_for(options, len(args[0])) if watched.layers else None
        if tracks is None:
            return None
        run.meta.setdefault("model", type(model).__name__)
        run.meta.setdefault("family", watched.layout.family if watched.layout else "")
        gate = host.gate_step(options)
        if gate is not None:
            run.meta["tgate_gate"] = gate
        return ModelCall(run, watched, tracks, args, kwargs, options)

    def _watched(self, run: CaptureRun, model: Any) -> WatchedModel:
        """Return what is recorded of a model; looked up once a run."""
        known: WatchedModel | None = run.models.get(id(model))
        if known is not None:
            return known
        network = host.diffusion_model(model)
        layers: list[AttentionLayer] = []
        if host.is_compiled(model):
            run.note("the model is compiled, so its attention cannot be seen: take the compile node out to capture it")
        else:
            layers = chosen_layers(network, self.settings.layers)
            if not self.settings.self_attention:
                layers = [layer for layer in layers if layer.kind != "self"]
            elif layers and all(layer.kind == "cross" for layer in layers):
                run.note(f"{NO_SELF_ATTENTION}: {type(network).__name__} computes it together with that of its pose video")
        layout = network_layout(network)
        if layers and layout is None:
            run.note(unknown_network_message(network))
        run.order = list(dict.fromkeys([*run.order, *(layer.name for layer in layers)]))
        run.models[id(model)] = watched = WatchedModel(network, layout, layers, type(model).__name__ in LEFT_PADDED_MODELS)
        return watched
