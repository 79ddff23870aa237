"""Seeing where a network looks while a sampler runs, without changing the picture.

One observer stands beside every attention call of the model (``host.with_attention_observer``), recomputes the softmax of
the layers that were asked for and adds it to the run's sums (``recorder``). Which layer a call belongs to is known from
hooks on the network's own modules, which stay for the length of one model call; which step, prompt and picture it belongs
to from the host's batch. Only the sampler's own evaluation of its prompts counts, and of samplers that evaluate a step
several times only the first one.

Nothing is kept on the model: a run's state is made when sampling starts, and becomes a ``Recording`` in the node's
``AttnMaps`` when it ends well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from . import host
from .host import ModelOptions, TransformerOptions, log
from .layer_names import parse_layers
from .maps import AttnMaps, Grid
from .placement import CallContext, Placement, joint_placement, picture_rows
from .probabilities import AttentionInputs, attention_inputs, row_probabilities
from .recorder import CaptureRun, CaptureSettings, Track, pooled_mass, pooled_queries, self_grid
from .run import StepClock, follow_sampler, read_sigma
from .sites import (
    LEFT_PADDED_MODELS,
    CaptureLayer,
    capture_layers,
    network_layout,
    token_grid,
    unknown_network_message,
)
from .tgate import KEY as TGATE_KEY

KEY = "fovea.capture"


def chosen_layers(network: torch.nn.Module, text: str) -> list[CaptureLayer]:
    """The layers that ``text`` names; where it is empty, all but a U-Net's middle block (DAAM's set)."""
    layers = capture_layers(network)
    names = list(dict.fromkeys(layer.name for layer in layers))
    if not text.strip():
        return [layer for layer in layers if not layer.name.startswith("middle")]
    if all(layer.kind == "unknown" for layer in layers):
        raise ValueError(f"layers is '{text}', but {unknown_network_message(network)}. Leave layers empty.")
    chosen = set(parse_layers(text, names))
    return [layer for layer in layers if layer.name in chosen]


# --- one model call -----------------------------------------------------------------------------------------------------


class ModelCall:
    """One call of the network: knows which layer is running, and records what it attends to."""

    def __init__(
        self,
        run: CaptureRun,
        model: Any,
        layers: list[CaptureLayer],
        tracks: list[Track],
        args: Sequence[Any],
        arguments: Mapping[str, Any],
        options: TransformerOptions,
    ) -> None:
        self.run = run
        self.tracks = tracks
        self.network = host.diffusion_model(model)
        self.layout = network_layout(self.network)
        if self.layout is None:
            run.note(unknown_network_message(self.network))
        self.latent = host.latent_shape(args, arguments)
        text = host.apply_model_text(args, arguments, self.layout.text if self.layout else "c_crossattn")
        self.text = 0 if text is None else text.shape[1]
        self.left_padded = type(model).__name__ in LEFT_PADDED_MODELS
        self.repeats_text = self.layout is None or self.layout.repeats_text
        self.arguments = arguments
        self.options = options
        self.layers = layers
        self.running: list[tuple[CaptureLayer, Iterator[int], tuple[int, ...]]] = []
        self.seen: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers' modules for the length of the model call."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.module.register_forward_pre_hook(self._enter(layer)).remove)
                stack.callback(layer.module.register_forward_hook(self._leave).remove)
                if layer.kind in ("self", "cross") and self._is_replaced(layer):
                    self._watch_projections(stack, layer)
            yield
        for layer in self.layers:
            if layer.kind != "self" and layer.name not in self.seen:
                self.run.missed[layer.name] += 1

    def _enter(self, layer: CaptureLayer) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any) -> None:
            shape = tuple(inputs[0].shape) if inputs and torch.is_tensor(inputs[0]) else ()
            self.running.append((layer, count(), shape))

        return hook

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()

    def _is_replaced(self, layer: CaptureLayer) -> bool:
        return hasattr(layer.module, "to_q") and host.has_replacements(self.options, "attn1" if layer.kind == "self" else "attn2")

    def _watch_projections(self, stack: ExitStack, layer: CaptureLayer) -> None:
        """Another node computes this layer's attention from the module's own projections: what they return is to be seen."""
        queries: list[Tensor] = []

        def query(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            queries[:] = [output]

        def key(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            if queries and not any(running is layer for running, _, _ in self.running):
                self.run.note("another node replaces attention modules; shown is the text's attention without what it adds")
                self._record(layer, attention_inputs(queries[0], output, layer.module.heads), (), self.options)  # type: ignore[arg-type]
                queries.clear()

        for name, hook in (("to_q", query), ("to_k", key)):
            stack.callback(layer.module.get_submodule(name).register_forward_hook(hook).remove)

    def observe(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None,
        transformer_options: TransformerOptions | None = None,
        **kwargs: Any,
    ) -> None:
        """One attention call, with the arguments of the host's attention functions."""
        if not self.running:
            return
        layer, calls, shape = self.running[-1]
        if next(calls) >= layer.skip:
            inputs = attention_inputs(q, k, heads, mask=mask, skip_reshape=skip_reshape, scale=scale)
            self._record(layer, inputs, shape, transformer_options or self.options)

    @torch.no_grad()
    def _record(self, layer: CaptureLayer, inputs: AttentionInputs, shape: tuple[int, ...], options: TransformerOptions) -> None:
        if inputs.batch % len(self.tracks) or inputs.batch != self.latent[0]:
            self.run.note("another node changes the batch inside attention, so some of it is left out")
            return
        place = self._place(layer, inputs, shape, options)
        if place is None:
            return
        keeps_self = self.run.settings.self_attention and place.image is not None
        if place.text is None and not keeps_self:
            return
        self._add(layer, inputs, place, keeps_self)

    def _add(self, layer: CaptureLayer, inputs: AttentionInputs, place: Placement, keeps_self: bool) -> None:
        """Cut text and image columns out of every row's softmax, and add them to each prompt's sums."""
        batch, heads, queries = inputs.batch, inputs.heads, math.prod(place.grid)
        text = place.text
        size = 0 if text is None else 4 * batch * heads * (text.stop - text.start) * queries
        kept = heads if self.run.keeps_heads(size) else 1
        own = self_grid(place.grid, self.run.self_tokens)
        maps = inputs.q.new_empty(batch, kept, text.stop - text.start, queries, dtype=torch.float32) if text else None
        looks = inputs.q.new_empty(batch, queries, math.prod(own), dtype=torch.float32) if keeps_self else None
        for start, rows in row_probabilities(inputs, place.rows):
            end = start + rows.shape[2]
            if text is not None and maps is not None:
                columns = rows[..., text]
                if place.again is not None:
                    again = place.again.stop - place.again.start
                    columns = torch.cat([columns[..., :-again], columns[..., -again:] + rows[..., place.again]], -1)
                columns = columns if kept > 1 else columns.mean(1, keepdim=True)
                maps[..., start:end] = columns.transpose(-1, -2)
            if looks is not None:
                looks[:, start:end] = pooled_mass(rows[..., place.image].sum(1), place.grid, own)
        if maps is not None:
            self.seen.add(layer.name)
        for index, track in enumerate(self.tracks):
            chunk = slice(index * batch // len(self.tracks), (index + 1) * batch // len(self.tracks))
            if maps is not None:
                self.run.add_text(track, layer.name, heads, self._folded(maps[chunk], track).unflatten(-1, place.grid))
            if looks is not None:
                self.run.add_self(track, own, heads, pooled_queries(looks[chunk], place.grid, own))

    def _folded(self, maps: Tensor, track: Track) -> Tensor:
        """The host repeats a shorter prompt to the length of a longer one it is batched with, and pads some on the left."""
        tokens, rows = maps.shape[2], track.rows
        if rows and self.left_padded and tokens > rows:
            return maps[:, :, tokens - rows :]
        if rows and self.repeats_text and tokens == self.text and tokens % rows == 0:
            return maps.unflatten(2, (-1, rows)).sum(2)
        return maps

    # Where the tokens are

    def _place(
        self, layer: CaptureLayer, inputs: AttentionInputs, shape: tuple[int, ...], options: TransformerOptions
    ) -> Placement | None:
        grid = self._grid(layer, inputs, shape, options)
        if grid is None or inputs.queries < math.prod(grid):
            self._note_unplaced(layer)
            return None
        if layer.kind == "joint":
            place = self._place_joint(inputs, grid)
            if place is None:
                self._note_unplaced(layer)
            return place
        rows = picture_rows(self._context(), inputs.queries, grid)
        if inputs.keys == inputs.queries and layer.kind != "cross":
            return Placement(grid, rows, None, rows)
        if layer.kind == "self":
            return None
        if layer.kind == "unknown" and inputs.keys != self.text:
            self._note_unplaced(layer)
            return None
        if self._is_eighth(grid):
            return None
        return Placement(grid, rows, slice(0, inputs.keys), None)

    def _place_joint(self, inputs: AttentionInputs, grid: Grid) -> Placement | None:
        return joint_placement(self._context(), inputs.keys, inputs.queries, grid)

    def _context(self) -> CallContext:
        return CallContext(self.network, self.layout, self.latent, self.text, self.arguments)

    def _grid(
        self, layer: CaptureLayer, inputs: AttentionInputs, shape: tuple[int, ...], options: TransformerOptions
    ) -> Grid | None:
        if self.layout is not None and self.layout.patch is None:
            size = (shape[2], shape[3]) if len(shape) == 4 else host.activations_size(options)
            if size is not None:
                return 1, *size
        return token_grid(self.network, self.layout, self.latent, inputs.queries)

    def _is_eighth(self, grid: Grid) -> bool:
        """DAAM leaves out maps that are eight times smaller than the latent, unless they are asked for."""
        unet = self.layout is not None and self.layout.family == "U-Net"
        return unet and not self.run.settings.layers.strip() and self.latent[-2] >= 8 * grid[1] and self.latent[-1] >= 8 * grid[2]

    def _note_unplaced(self, layer: CaptureLayer) -> None:
        if layer.kind in ("cross", "joint"):
            self.run.note(
                "some attention has tokens that cannot be told apart: reference pictures, or another node merges or splits tokens"
            )


# --- the technique ------------------------------------------------------------------------------------------------------


class Capture:
    """Wrappers of one capture node. Holds settings and the handle to fill; a run's state lives in that run's options.

    Each has a key of its own, so that two capture nodes on one model both see the run.
    """

    def __init__(self, settings: CaptureSettings, maps: AttnMaps) -> None:
        self.settings = settings
        self.maps = maps
        self.key = f"{KEY}.{uuid4().hex}"

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        guider = executor.class_obj
        run = CaptureRun(self.settings, StepClock.from_sigmas(sigmas), guider)
        with host.run_scope(guider, self.key, run):
            result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        self.maps.fill(run.recording())
        log.info(run.summary())
        return result

    sampler_sample = staticmethod(follow_sampler)

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, model_options: ModelOptions, seed: Any = None) -> Any:
        run = host.run_state(model_options, self.key)
        if run is not None:
            run.prompts = executor.class_obj.conds
            sigma, model_options = read_sigma(timestep, model_options)
            run.begin_evaluation(sigma)
        return executor(x, timestep, model_options, seed)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: ModelOptions
    ) -> Any:
        run: CaptureRun | None = host.run_state(model_options, self.key)
        if run is None or not run.awaits_main_call or host.run_state(model_options, host.PRIVATE_PASS):
            return executor(model, conds, x, timestep, model_options)
        with run.main_call(conds, x):
            return executor(model, conds, x, timestep, model_options)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = host.apply_model_options(args)
        run: CaptureRun | None = host.run_state(options, self.key)
        if run is None or run.names is None or host.run_state(options, host.PRIVATE_PASS):
            return executor(*args, **kwargs)
        call = self._call(run, executor.class_obj, args, kwargs, options)
        if call is None:
            return executor(*args, **kwargs)
        watched = host.with_attention_observer(options, call.observe)
        swapped = call.layout.drops_options if call.layout is not None else ()
        if swapped and host.in_worker_thread(options):
            run.note(f"the attention of {call.layout.family if call.layout else ''} cannot be seen on several GPUs at once")
            swapped = ()
        with call.watching(), host.options_for_attention(swapped, watched):
            return executor(*host.with_apply_model_options(args, watched), **kwargs)

    def _call(
        self, run: CaptureRun, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: TransformerOptions
    ) -> ModelCall | None:
        """This model call, or None where it is not to be recorded."""
        with run.lock:
            layers = self._layers(run, model)
            tracks = run.tracks_for(options) if layers else None
        if tracks is None:
            return None
        call = ModelCall(run, model, layers, tracks, args, kwargs, options)
        run.meta.setdefault("model", type(model).__name__)
        run.meta.setdefault("family", call.layout.family if call.layout else "")
        gate = getattr(host.run_state(options, TGATE_KEY), "gate", None)
        if gate is not None:
            run.meta["tgate_gate"] = gate
        return call

    def _layers(self, run: CaptureRun, model: Any) -> list[CaptureLayer]:
        """The layers of a model that are recorded; looked up once a run."""
        if id(model) not in run.layers:
            layers: list[CaptureLayer] = []
            if host.is_compiled(model):
                run.note("the model is compiled, so its attention cannot be seen: take the compile node out to capture it")
            else:
                layers = chosen_layers(host.diffusion_model(model), self.settings.layers)
                if not self.settings.self_attention:
                    layers = [layer for layer in layers if layer.kind != "self"]
            run.layers[id(model)] = layers
            run.order = list(dict.fromkeys([*run.order, *(layer.name for layer in layers)]))
        return run.layers[id(model)]
