"""Does the device compute the same as the CPU, however a network holds its weights and however ComfyUI streams them?

Compared are a gradient of each loss, maps of words, and a run with T-GATE, of a tiny network with the same numbers in float32
on the CPU. A difference is the norm of what is left over, as a share of the CPU's norm. Tolerances are about four times what
half precision differs by on a CPU (0.005 and 0.04); on a GPU, convolutions round float32 to TF32 (10 bits), and some sums come
in another order each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bench import gradient
from bench.measure import table
from bench.models import TINY, Target, name_of, sampler
from host_inprocess import dynamic_vram, pack_nodes
from torch import Tensor

Say = Callable[[str], None]
SIDE, STEPS = 16, 4
TOLERANCES = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Case:
    """One way to hold weights, one type to compute in, one of ComfyUI's ways to stream weights."""

    way: str
    compute: torch.dtype
    streaming: str


def _unchanged() -> Iterator[None]:
    yield


def _not_dynamic() -> Iterator[None]:
    import comfy.model_patcher

    before = comfy.model_patcher.CoreModelPatcher
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
    try:
        yield
    finally:
        comfy.model_patcher.CoreModelPatcher = before


def _without_room() -> Iterator[None]:
    import comfy.model_management as management

    before, management.vram_state = management.vram_state, management.VRAMState.NO_VRAM
    try:
        yield from _not_dynamic() if dynamic_vram() else _unchanged()
    finally:
        management.vram_state = before


STREAMING = {
    "as ComfyUI does": contextmanager(_unchanged),
    "without dynamic VRAM": contextmanager(_not_dynamic),
    "--novram": contextmanager(_without_room),
}


def cases(target: Target) -> list[Case]:
    """List every combination that is worth its time: all ways in the device's type, plain weights in all types."""
    from families.weights import WAYS

    usual = "as ComfyUI does"
    found = [Case(way, target.dtype, usual) for way in WAYS]
    if not target.on_gpu:
        return found
    found += [Case("plain", dtype, usual) for dtype in TOLERANCES if dtype != target.dtype]
    others = ["--novram", *(["without dynamic VRAM"] if dynamic_vram() else [])]
    return found + [Case(way, target.dtype, other) for other in others for way in ("plain", "fp8", "packed", "LoRA")]


def differences(case: Case, target: Target) -> dict[str, float]:
    """Return how far each result is from the CPU's."""
    import comfy.model_management as management
    from families import weights

    with STREAMING[case.streaming](), torch.inference_mode():
        offload = management.unet_offload_device() if target.on_gpu else torch.device("cpu")
        model, plain = weights.pair(case.way, case.compute, target.device, offload)
        found, expected = _results(model), _results(plain)
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def _results(model: Any) -> dict[str, Tensor]:
    nodes = pack_nodes()
    latent = torch.zeros(1, 4, SIDE, SIDE)
    found: dict[str, Tensor] = {}

    def body(call: gradient.Call) -> None:
        for name, text in (("gradient, words", gradient.WORDS), ("gradient, style", gradient.STYLE)):
            loss = gradient.Loss(text)
            layers = loss.layers(model.model.diffusion_model, latent.shape)
            for memory in ("fast", "low"):
                found[f"{name}, {memory}"] = gradient.ours(call, loss, layers, memory)

    gradient.in_a_run(model, TINY, latent, body)
    captured, maps = nodes["AttnMapCapture"].execute(model).args
    found["plain run"] = sampler(captured, STEPS, latent, TINY.context)()
    recorded = [layer.maps.flatten() for prompt in maps.require().prompts for layer in prompt.layers.values()]
    found["maps"] = torch.cat(recorded)
    gated = nodes["TGateCache"].execute(model, gate_at=0.5)[0]
    found["T-GATE"] = sampler(gated, STEPS, latent, TINY.context)()
    return {name: value.float().cpu() for name, value in found.items()}


def report(say: Say, *, tiny: bool = False) -> None:
    """Say a row for each case as soon as it is known, and the cases that are further apart than the tolerance."""
    target = Target.here()
    chosen = cases(target)
    say(f"Tolerances: {', '.join(f'{name_of(dtype)} {value:g}' for dtype, value in TOLERANCES.items())}.\n")
    wrong, first = 0, True
    for case in chosen[:2] if tiny else chosen:
        name = f"{case.way}, {name_of(case.compute)}, {case.streaming}"
        try:
            found = differences(case, target)
        except Exception as error:
            if "CUDA error" in str(error):  # nothing works in this process any more
                raise
            wrong += 1
            say(f"\n{name}: {type(error).__name__}: {error}\n")
            first = True
            continue
        right = all(value <= TOLERANCES[case.compute] for value in found.values())
        wrong += not right
        rows = table(("weights", "right", *found), [(name, "yes" if right else "NO", *(f"{v:.1e}" for v in found.values()))])
        say(rows if first else rows.splitlines()[-1])
        first = False
    say(f"\n{wrong} of {len(chosen)} cases are not the same." if wrong else "\nAll are the same.")
