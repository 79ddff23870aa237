"""Measure one gradient of a loss on attention beside plain autograd through the same network, in every shape.

    python dev bench gradient [--shapes sd15 sdxl pixart] [--size PX] [--pairs N] [--threads N] [--tiny] [--out FILE]

What Attend-and-Excite and Attention Distillation spend their time on, at real size with random weights: a forward that looks at
the layers that each of them looks at by default, and its backward, for one image and one prompt. Plain autograd is what a port
that knows nothing better does: the whole network runs with a gradient, its weights not among what wants one. Both sides must find
the same gradient. Memory is what torch holds at most beyond the resting state, with and without the kernels' own scratch space
(``bench.memory``; on a GPU only with it).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from host_inprocess import load_pack
from torch import Tensor

from bench.measure import add_run_arguments, machine, publish, ratios, require_same, start, table, take_turns
from bench.memory import AllocatedMemory, HeldTensors
from bench.models import (
    PIXART,
    SHAPES,
    Shape,
    Target,
    add_dtype_argument,
    host_network,
    inputs_of_a_run,
    random_tensor,
    sampler,
    tiny,
)

PLAIN, FAST, LOW, FORWARD = "plain autograd", "ours, fast", "ours, low", "a forward without a gradient"
WORDS, STYLE = "loss on a word's map (Attend-and-Excite)", "loss on self-attention's output (Attention Distillation)"
WORD = 5
SAME, SAME_ROUNDED = 1e-4, 0.1


@dataclass(frozen=True)
class Call:
    """What a sampler calls the network with: where in the run, and which prompt."""

    base_model: Any
    cond: dict[str, Any]
    x: Tensor
    sigma: Tensor
    options: dict[str, Any]


class Loss:
    """What both sides make of an attention call, and of all calls together."""

    def __init__(self, name: str) -> None:
        self.of_words = name == WORDS

    def layers(self, network: torch.nn.Module, latent: Sequence[int]) -> list[Any]:
        load_pack()
        from fovea_attention.attention.distill import distilled_layers
        from fovea_attention.attention.excite import ExciteSettings, guided_layers

        if not self.of_words:
            return distilled_layers(network)
        return [layer for layer in guided_layers(network, latent, ExciteSettings()).layers if layer.kind == "cross"]

    def seen(self, q: Tensor, k: Tensor, scale: float, output: Callable[[], Tensor]) -> Tensor:
        """Reduce tensors (batch, heads, tokens, channels) to (batch,)."""
        if not self.of_words:
            return output().square().mean((1, 2, 3))
        return 1 - (q @ k.transpose(-1, -2) * scale).softmax(-1)[..., WORD].mean(1).amax(-1)

    # As ``ModelPass`` wants it

    def measure(self, layer: Any, call: Any, rows: Tensor) -> Tensor:
        return self.seen(call.inputs.q, call.inputs.k, call.inputs.scale, lambda: call.output)

    def loss(self, measurements: list[tuple[Any, Tensor]], rows: Tensor) -> Tensor:
        return torch.stack([value for _, value in measurements]).float().sum(0)


# --- the sides ----------------------------------------------------------------------------------------------------------


def in_a_run(model: Any, shape: Shape, latent: Tensor, body: Callable[[Call], None]) -> None:
    """Call ``body`` where a sampler would call the model for the second of four steps."""
    import comfy.samplers

    def function(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
        guider = model_k.inner_model
        sigma = x.new_full((len(x),), float(sigmas[0]), dtype=torch.float32)
        body(Call(guider.inner_model, guider.conds["positive"][0], x, sigma, extra_args["model_options"]))
        return x

    noise, positive, negative = inputs_of_a_run(latent, shape.context)
    told = {"pooled_output": random_tensor(3, 1, shape.pooled)} if shape.pooled else {}
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[positive, {**told}]], [[negative, {**told}]])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)[1:]
    guider.sample(noise, latent, comfy.samplers.KSAMPLER(function), sigmas, disable_pbar=True, seed=0)


def ours(call: Call, loss: Loss, layers: list[Any], memory: str) -> Tensor:
    from fovea_attention.attention.gradient import Memory, ModelPass

    with torch.inference_mode():
        found = ModelPass(call.base_model, call.options, layers, Memory(memory)).gradient(call.cond, call.x, call.sigma, loss)
    assert found is not None
    return found.latent


def by_head(tensor: Tensor, heads: int) -> Tensor:
    """Split (batch, tokens, channels) into (batch, heads, tokens, channels)."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def plainly(call: Call, loss: Loss, layers: list[Any]) -> Tensor:
    """Make ComfyUI's own model call on a latent that wants a gradient."""
    import comfy.samplers
    from fovea_attention.attention import host
    from fovea_attention.attention.networks import network_layout

    seen: list[Tensor] = []
    running: list[bool] = []

    def override(host_function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = host_function(q, k, v, heads, *args, **kwargs)
        if running:
            q, k = (t if kwargs.get("skip_reshape") else by_head(t, heads) for t in (q, k))
            output = result if kwargs.get("skip_output_reshape") else by_head(result, heads)
            seen.append(loss.seen(q, k, q.shape[-1] ** -0.5, lambda: output))
        return result

    transformer = {**call.options.get("transformer_options", {}), "optimized_attention_override": override}
    layout = network_layout(call.base_model.diffusion_model)
    with ExitStack() as stack:
        stack.enter_context(host.options_for_attention(layout.drops_options if layout else (), transformer))
        stack.enter_context(torch.enable_grad())
        for layer in layers:
            stack.enter_context(marked(layer.module, running))
        leaf = call.x.float().requires_grad_()
        comfy.samplers.calc_cond_batch(
            call.base_model, [[call.cond]], leaf, call.sigma, {**call.options, "transformer_options": transformer}
        )
        return torch.autograd.grad(torch.stack(seen).float().sum(), leaf)[0]


@contextmanager
def marked(module: torch.nn.Module, running: list[bool]) -> Iterator[None]:
    before = module.register_forward_pre_hook(lambda *_: running.append(True))
    after = module.register_forward_hook(lambda *_: running.clear())
    try:
        yield
    finally:
        before.remove()
        after.remove()


# --- the report ---------------------------------------------------------------------------------------------------------


class Sides:
    """One network and one loss."""

    def __init__(self, model: Any, shape: Shape, size: int, loss: str, target: Target) -> None:
        self.target = target
        latent = torch.zeros(1, 4, size // 8, size // 8)
        known = Loss(loss)
        layers = known.layers(model.model.diffusion_model, latent.shape)
        self.found: dict[str, Tensor] = {}

        def side(name: str, take: Callable[[Call], Tensor]) -> Callable[[], None]:
            def body(call: Call) -> None:
                self.found[name] = take(call)

            return lambda: in_a_run(model, shape, latent, body)

        self.runs = {
            PLAIN: side(PLAIN, lambda call: plainly(call, known, layers)),
            FAST: side(FAST, lambda call: ours(call, known, layers, "fast")),
            LOW: side(LOW, lambda call: ours(call, known, layers, "low")),
        }

    def require_the_same(self) -> None:
        for run in self.runs.values():
            run()
        for name in (FAST, LOW):
            require_same(
                f"The gradients of {name} and {PLAIN}", self.found[name], self.found[PLAIN],
                SAME if self.target.exact else SAME_ROUNDED,
            )  # fmt: skip

    def peaks(self) -> dict[str, list[float]]:
        """Measure the MiB of each side: of tensors (not on a GPU), and by the allocator."""
        found: dict[str, list[float]] = {}
        for name, run in self.runs.items():
            meters: list[HeldTensors | AllocatedMemory] = [] if self.target.on_gpu else [HeldTensors()]
            found[name] = []
            for memory in [*meters, AllocatedMemory(self.target.device)]:
                gc.collect()
                memory.start()
                run()
                memory.stop()
                found[name].append(memory.peak / 2**20)
        return found


def part(shape: Shape, size: int, pairs: int, target: Target) -> str:
    model = host_network(shape, target)
    latent = torch.zeros(1, 4, size // 8, size // 8)
    print(f"{shape.title}, {size} px", flush=True)
    written = [f"### {shape.title} of {shape.channels} channels, {size} px"]
    for loss in (WORDS, STYLE):
        sides = Sides(model, shape, size, loss, target)
        sides.require_the_same()
        peaks = sides.peaks()
        forward = sampler(model, 1, latent, shape.context, shape.pooled, cfg=1.0)
        timings = take_turns({FORWARD: forward, **sides.runs}, pairs)
        rows = []
        for name in sides.runs:
            share = [f"{mib:.0f} MiB, {100 * mib / plain:.0f} %" for mib, plain in zip(peaks[name], peaks[PLAIN], strict=True)]
            in_forwards = timings[name].median / timings[FORWARD].median
            speed = "{:.2f} ({:.2f} to {:.2f})".format(*ratios(timings[PLAIN], timings[name]))
            rows.append((name, f"{in_forwards:.2f}", speed, *share))
        kinds = ["with the kernels' scratch"] if target.on_gpu else ["tensors", "with the kernels' scratch"]
        header = ("side", "time, in forwards", "times as fast (lowest to highest)", *(f"peak: {kind}" for kind in kinds))
        written.append(f"{loss}:\n\n{table(header, rows)}")
    return "\n\n".join(written)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench gradient", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--size", type=int, help=f"pixels of the side (default 256, of PixArt {PIXART.least}; on a GPU 512)")
    parser.add_argument("--pairs", type=int, default=5, help="counted turns of all sides")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the benchmark itself")
    add_dtype_argument(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    target = Target.here(args.dtype)
    written = []
    for name in args.shapes:
        shape = tiny(SHAPES[name]) if args.tiny else SHAPES[name]
        size = args.size or shape.side(512 if target.on_gpu else 128 if args.tiny else 256)
        written.append(part(shape, size, args.pairs, target))
        gc.collect()
    heading = f"## One gradient of a loss on attention\n\nMeasured on: {machine(target)}."
    publish("\n\n".join([heading, f"One image, one prompt. Median of {args.pairs} turns.", *written]), args.out)


if __name__ == "__main__":
    main()
