"""All techniques in one graph: what each does while another is at work, and that nothing of any is left.

The rules: gradient passes neither read nor fill T-GATE's cache; guided steps come before the gate; Attention Distillation's own
passes run on clean options; capture sees the sampling passes only.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import comfy.model_management
import pytest
import torch
from distill_runs import FAMILY, NEGATIVE, POSITIVE, guider_of, plain, run
from leftovers import snapshot
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["distill", "features", "fresh_cache", "node"]
from distill_runs import distill, features, fresh_cache, node

STEPS, GATE = 5, 3
FEW = 2  # enough for a guided step, the gate, and a step from the cache
TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).resolve().parents[2] / "attention")
INTERRUPT = comfy.model_management.InterruptProcessingException
BRIEF = {"iterations": 1, "learning_rate": 0.02}
EXCITE = {"subjects": "2, 5", "guide_until": 0.4, "thresholds": "0:0.05", "max_refinements": 2}


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return FAMILY.build()


@pytest.fixture
def gate(node_classes):
    return lambda model, **settings: node_classes["TGateCache"].execute(model, gate_at=GATE / STEPS, **settings)[0]


@pytest.fixture
def capture(node_classes):
    return lambda model: node_classes["AttnMapCapture"].execute(model).args[:2]


@pytest.fixture
def excite(node_classes):
    return lambda model, **settings: node_classes["AttendExciteGuider"].execute(
        model, POSITIVE, NEGATIVE, **{**EXCITE, **settings}
    )[0]


def whole(model, gate, capture, excite, order="gate first"):
    """Guider of all model techniques, and the maps."""
    if order == "gate first":
        watched, maps = capture(gate(model))
    else:
        watched, maps = capture(model)
        watched = gate(watched)
    return excite(watched), maps


@pytest.mark.parametrize("order", ["gate first", "capture first"])
def test_the_whole_chain(node, model, gate, capture, excite, caplog, order):
    caplog.set_level("INFO", logger="fovea")
    guider, maps = whole(model, gate, capture, excite, order)
    image, report = run(node, model, guider=guider, steps=STEPS, **BRIEF)
    assert torch.isfinite(image).all() and len(report["steps"]) == STEPS
    assert f"cross-attention reused in {STEPS - GATE} of {STEPS} steps" in caplog.text
    assert "Attend-and-Excite: 2 guided steps" in caplog.text
    assert maps.recorded_steps("positive", 0) == list(range(GATE))
    for name, without in {
        "T-GATE": excite(model),
        "Attend-and-Excite": guider_of(gate(model)),
    }.items():
        other, _ = run(node, model, guider=without, steps=STEPS, **BRIEF)
        assert not torch.allclose(image, other, rtol=1e-3), f"{name} did nothing"
    undistilled = plain(model, guider=whole(model, gate, capture, excite, order)[0], steps=STEPS)
    assert not torch.allclose(image, undistilled, rtol=1e-3)


def test_the_order_of_the_model_nodes_is_free(node, model, gate, capture, excite):
    one, maps = whole(model, gate, capture, excite)
    two, other_maps = whole(model, gate, capture, excite, "capture first")
    images = [run(node, model, guider=guider, steps=STEPS, **BRIEF)[0] for guider in (one, two)]
    assert torch.equal(*images)
    torch.testing.assert_close(maps.heat(), other_maps.heat(), rtol=0, atol=0)


def test_capture_changes_nothing_in_the_whole(node, model, gate, capture, excite):
    watched, _ = whole(model, gate, capture, excite)
    expected, _ = run(node, model, guider=excite(gate(model)), steps=STEPS, **BRIEF)
    assert torch.equal(run(node, model, guider=watched, steps=STEPS, **BRIEF)[0], expected)


def test_guiding_fills_no_cache(node, model, gate, excite, pack, monkeypatch):
    """With nothing moved (scale 0, no refinement) the guided run is T-GATE's own, bit for bit."""
    still = excite(gate(model), scale_factor=0.0, thresholds="")
    assert torch.equal(plain(model, guider=still, steps=STEPS), plain(model, guider=guider_of(gate(model)), steps=STEPS))


def test_guided_steps_after_the_gate_still_look_at_the_prompt(model, gate, excite, caplog):
    """Not how it is meant, but a graph can be wired so: the loss is measured on real attention, not on the cache."""
    caplog.set_level("INFO", logger="fovea")
    late = plain(model, guider=excite(gate(model), guide_until=1.0), steps=STEPS)
    assert torch.isfinite(late).all()
    assert f"Attend-and-Excite: {STEPS} guided steps" in caplog.text
    assert f"cross-attention reused in {STEPS - GATE} of {STEPS} steps" in caplog.text
    early = plain(model, guider=excite(gate(model)), steps=STEPS)
    assert not torch.allclose(late, early, rtol=1e-3)


def test_distilling_passes_run_on_clean_options(node, model, gate, capture):
    """The loss of the first step sees neither cache nor watch: it is that of the plain model."""
    _, report = run(node, model, guider=guider_of(capture(gate(model))[0]), steps=STEPS, **BRIEF)
    _, expected = run(node, model, steps=STEPS, **BRIEF)
    # The latents are those of a plain run up to the gate.
    for step in range(GATE - 1):
        assert report["steps"][step]["loss"] == pytest.approx(expected["steps"][step]["loss"], rel=1e-5)


# --- nothing is left ----------------------------------------------------------------------------------------------------------


def test_a_second_run_equals_the_first_and_the_model_is_as_before(node, model, gate, capture, excite):
    alone = plain(model, steps=STEPS)
    before = snapshot(model)  # of a model that ComfyUI has loaded
    guider, _ = whole(model, gate, capture, excite)
    first, _ = run(node, model, guider=guider, steps=STEPS, **BRIEF)
    again, _ = run(node, model, guider=guider, steps=STEPS, **BRIEF)
    assert torch.equal(first, again)
    assert snapshot(model) == before
    assert torch.equal(plain(model, steps=STEPS), alone)


class Fault:
    """Raises at the n-th call of the network's first attention, whoever calls it."""

    def __init__(self, model, at: int, error: BaseException) -> None:
        self.calls, self.at, self.error = 0, at, error
        first = next(m for name, m in model.model.diffusion_model.named_modules() if name.endswith("attn1.to_q"))
        self.handle = first.register_forward_hook(self._count)

    def _count(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@pytest.mark.newest
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("error", [INTERRUPT, RuntimeError], ids=["interrupt", "failure"])
def test_a_fault_anywhere_leaves_nothing(node, model, gate, capture, excite, features, error, share):
    """At moments spread over the run: a reference's pass, a gradient, a sampling pass, an Adam step."""
    alone = plain(model, steps=STEPS)
    before = snapshot(model)  # of a model that ComfyUI has loaded
    counter = Fault(model, -1, error())
    try:
        run(node, model, guider=whole(model, gate, capture, excite)[0], steps=STEPS, **BRIEF)
    finally:
        counter.handle.remove()
    features.CACHE.clear()  # or the second run would have fewer calls
    fault = Fault(model, 1 + int(share * counter.calls), error("stopped here"))
    guider, maps = whole(model, gate, capture, excite)
    try:
        with pytest.raises(error, match="stopped here"):
            run(node, model, guider=guider, steps=STEPS, **BRIEF)
    finally:
        fault.handle.remove()
    assert snapshot(model) == before
    assert torch.equal(plain(model, steps=STEPS), alone)
    assert not torch.is_inference_mode_enabled()
    gone = weakref.ref(guider)
    del guider, maps, fault  # whose error holds the frames it came through
    gc.collect()
    assert gone() is None


class OutOfMemory(TorchDispatchMode):
    """Every operation that a function of the pack asks for by itself is one where memory may run out: all are noted, and at
    the first one of ``at`` it does."""

    def __init__(self, at: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.at, self.raised, self.sites = at, False, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        site = None if self.raised else self._site()
        if site is not None:
            self.sites.setdefault(site)
            if site == self.at and not self.raised:
                self.raised = True
                raise comfy.model_management.OOM_EXCEPTION("no memory left")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _site() -> tuple[str, str] | None:
        """File and function of the pack whose line it is, or None where it is ComfyUI's or torch's own business."""
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        inside = frame is not None and frame.f_code.co_filename.startswith(OURS)
        return (Path(frame.f_code.co_filename).relative_to(OURS).as_posix(), frame.f_code.co_name) if inside else None


@pytest.mark.newest
@pytest.mark.slow
def test_out_of_memory_anywhere_leaves_nothing(node, model, gate, capture, excite, features):
    """Handled with less memory, or ComfyUI's own error; in either case nothing is left, and the next run is right."""

    def chain():
        features.CACHE.clear()
        return run(node, model, guider=whole(model, gate, capture, excite)[0], steps=FEW, **BRIEF)[0]

    # Adam's first step is the gradient's sign: where that is rounding, less memory may turn it around, in each of the steps.
    turned = 2 * BRIEF["learning_rate"] * FEW
    expected, alone = chain(), plain(model, steps=STEPS)
    before = snapshot(model)
    with OutOfMemory() as watched:
        chain()
    assert {"tgate", "maps", "gradient", "excite", "distill"} <= {file.split("/")[0] for file, _ in watched.sites}
    for site in watched.sites:
        with OutOfMemory(site) as short:
            try:
                torch.testing.assert_close(chain(), expected, rtol=0, atol=turned)
            except comfy.model_management.OOM_EXCEPTION as error:
                assert "no memory left" in str(error)
        assert short.raised, site
        assert snapshot(model) == before, site
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(plain(model, steps=STEPS), alone)
    assert torch.equal(chain(), expected)
