"""After a run of any kind the model is as it was, and the cache is gone."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from leftovers import snapshot
from tiny_unet import cond, sample, small_model


class Stop(Exception):
    pass


def fail_at(step: int, error: BaseException):
    def callback(at, *_):
        if at == step:
            raise error

    return callback


@pytest.fixture
def gated(node_classes):
    def apply(model, **settings):
        return node_classes["TGateCache"].execute(model, gate_at=0.4, sp_interval=2, fi_interval=2, **settings)[0]

    return apply


@pytest.mark.parametrize("mode", ["fixed", "auto"])
def test_a_normal_run_leaves_nothing(gated, mode):
    model = small_model()
    with_tgate = gated(model, mode=mode, tolerance=0.5)
    sample(model, steps=2)  # loads the model
    before = snapshot(model), snapshot(with_tgate)
    sample(with_tgate)
    assert (snapshot(model), snapshot(with_tgate)) == before


# Steps 1, 3 and 6: while planning, just before the gate opens, and while the cache is in use.
@pytest.mark.parametrize("step", [1, 3, 6])
@pytest.mark.parametrize(
    "error",
    [Stop(), comfy.model_management.InterruptProcessingException(), comfy.model_management.OOM_EXCEPTION("no memory")],
    ids=["exception", "interrupt", "out of memory"],
)
def test_a_run_that_ends_early_leaves_nothing(gated, error, step):
    model = small_model()
    plain = sample(model, steps=10)
    with_tgate = gated(model)
    expected = sample(with_tgate)
    before = snapshot(model), snapshot(with_tgate)
    with pytest.raises(type(error)):
        sample(with_tgate, callback=fail_at(step, error))
    assert (snapshot(model), snapshot(with_tgate)) == before
    assert torch.equal(sample(model, steps=10), plain)
    assert torch.equal(sample(with_tgate), expected)


@pytest.mark.parametrize("call", [2, 5, 9], ids=["planning", "before the gate", "reusing"])
def test_an_error_inside_the_network_leaves_nothing(gated, call):
    """The error comes while modules have another forward and hooks are registered."""
    model = small_model()
    with_tgate = gated(model)
    expected = sample(with_tgate)
    before = snapshot(model)
    calls = 0

    def broken(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop

    handle = model.model.diffusion_model.out.register_forward_hook(broken)
    with pytest.raises(Stop):
        sample(with_tgate)
    handle.remove()
    assert snapshot(model) == before
    assert torch.equal(sample(with_tgate), expected)


def test_after_an_interrupt_another_size_and_a_low_denoise_are_fresh_runs(gated):
    model = small_model()
    with_tgate = gated(model)
    start = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(5))
    expected = sample(with_tgate, latent_image=start, denoise=0.3)
    with pytest.raises(Stop):
        sample(with_tgate, callback=fail_at(6, Stop()))
    assert torch.equal(sample(with_tgate, latent_image=start, denoise=0.3), expected)


def test_the_cache_is_freed(gated, pack, monkeypatch):
    from fovea_attention.attention import tgate

    seen: list[weakref.ref] = []
    original = tgate.AttentionCache.store_mean

    def watch(self, site, shares, output):
        original(self, site, shares, output)
        seen.extend(weakref.ref(tensor) for tensor in self.means.values())

    monkeypatch.setattr(tgate.AttentionCache, "store_mean", watch)
    sample(gated(small_model()))
    gc.collect()
    assert seen and not any(reference() is not None for reference in seen)


def test_a_forward_that_somebody_else_patched_comes_back(gated):
    """Another pack's object patch on an attention module is an instance attribute too."""
    model = small_model()
    attention = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    calls = []

    def other_pack(x, *args, **kwargs):
        calls.append(x.shape[0])
        return type(attention).forward(attention, x, *args, **kwargs)

    patched = gated(model)
    patched.add_object_patch("diffusion_model.middle_block.1.transformer_blocks.0.attn2.forward", other_pack)
    sample(patched)
    assert len(calls) == 4  # the four steps before the gate; reused afterwards
    assert attention.__dict__.get("forward") in (None, other_pack)


def test_the_model_can_be_unloaded_between_runs(gated):
    model = small_model()
    with_tgate = gated(model)
    first = sample(with_tgate)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(with_tgate), first)


def test_conditioning_is_not_changed(gated):
    positive, negative = cond(1), cond(2)
    kept = positive[0][0].clone(), dict(positive[0][1])
    sample(gated(small_model()), positive, negative)
    assert torch.equal(positive[0][0], kept[0]) and positive[0][1] == kept[1]
