"""How deep a run is called costs it nothing: Python does not ask the system for memory in the calls of a loop.

A piece of Python's stack that a loop's calls take and give back shows as a page fault in each of them. The loop of these tests
calls a function whose frame is large, so that the end of a piece lies within it at one of the depths tried.
"""

from __future__ import annotations

import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling
from comfy.patcher_extension import WrappersMP
from tiny_unet import cond, latent, small_model

resource: Any = pytest.importorskip("resource", reason="page faults are counted on Unix")

CALLS = 500
DEPTHS = range(0, 200, 8)
PAGES = 4  # of other things, in all calls


def _leaf() -> None:
    return None


_leaf.__code__ = _leaf.__code__.replace(co_stacksize=600)


def faults() -> int:
    """Return this thread's page faults so far, or the process's where they are not told apart."""
    return int(resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_minflt)


def faults_of_a_loop() -> int:
    before = faults()
    for _ in range(CALLS):
        _leaf()
    return faults() - before


def system_counts_faults() -> bool:
    before = faults()
    with mmap.mmap(-1, 100 * mmap.PAGESIZE) as memory:
        for page in range(100):
            memory[page * mmap.PAGESIZE] = 1
    return faults() - before >= 50


@pytest.fixture(autouse=True)
def counted_faults() -> None:
    if not system_counts_faults():
        pytest.skip("this system counts no page faults")


def at_depth(depth: int, call: Callable[[], Any]) -> Any:
    return call() if depth == 0 else at_depth(depth - 1, call)


@pytest.mark.skipif(not (3, 11) <= sys.version_info < (3, 13), reason="other Pythons keep their frames in another way")
def test_what_is_avoided_is_there() -> None:
    assert max(at_depth(depth, faults_of_a_loop) for depth in DEPTHS) >= CALLS


def test_calls_of_a_loop_never_extend_the_stack(pack: Any) -> None:
    from fovea_attention.attention import host

    assert max(at_depth(depth, lambda: host.on_one_stack(faults_of_a_loop)) for depth in DEPTHS) <= PAGES


def _attached(node: str, node_classes: dict[str, Any]) -> tuple[Any, Any]:
    return node_classes[node].execute(small_model())[0], comfy.samplers.sampler_object("euler")


def _in_steps(node_classes: dict[str, Any]) -> tuple[Any, Any]:
    from fovea_attention.attention.host import latent_steps

    euler = comfy.samplers.sampler_object("euler")
    return small_model(), latent_steps.with_steps(euler, lambda x, *_: x, lambda step: True)


def _own(node_classes: dict[str, Any]) -> tuple[Any, Any]:
    from fovea_attention.attention import host

    return small_model(), host.own_sampler(sampling.sample_euler)


RUNS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "T-GATE": functools.partial(_attached, "TGateCache"),
    "capture": functools.partial(_attached, "AttnMapCapture"),
    "steps of Attend-and-Excite": _in_steps,
    "a sampler of our own": _own,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_called_on_one_stack(name: str, node_classes: dict[str, Any]) -> None:
    model, sampler = RUNS[name](node_classes)
    model = model.clone()
    found: list[int] = []

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(faults_of_a_loop())
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "counted", counted)
    sigmas, start = torch.tensor([2.0, 1.0, 0.0]), latent()

    def run() -> None:
        comfy.sample.sample_custom(model, start, 7.0, sampler, sigmas, cond(1), cond(2), start, disable_pbar=True, seed=3)

    with torch.inference_mode():
        for depth in DEPTHS:
            at_depth(depth, run)
    assert len(found) >= 2 * len(DEPTHS)
    assert sorted(found)[-2] <= PAGES  # one call may meet pages of something else
