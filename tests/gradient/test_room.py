"""ComfyUI makes room for gradient passes before a run, and nothing of that stays; "free memory" takes what is kept for later."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.samplers
import pytest
import torch
from distill_runs import distill, features, fresh_cache, models, node, run  # noqa: F401
from families import FAMILIES
from host_inprocess import pack_nodes

pytestmark = pytest.mark.newest
FAMILY = FAMILIES["sd15"]
MEMORY = {"low": 1, "auto": 2, "fast": 3}


def sampled(guider, batch=2):
    latent = FAMILY.latent(batch)
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", 1)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    options = guider.model_options
    with torch.inference_mode():
        guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    assert guider.model_options is options and "memory_required" not in guider.model_patcher.model.__dict__


def test_attend_and_excite(asked):
    """In the order of what the settings keep; 'auto' asks for what it needs where memory is short, for every image."""
    model, execute = FAMILY.build(), pack_nodes()["AttendExciteGuider"].execute
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(FAMILY.conds(1), FAMILY.conds(2))
    sampled(plain)
    for memory in MEMORY:
        sampled(execute(model, FAMILY.conds(1), FAMILY.conds(2), cfg=7.0, subjects="2, 5", memory=memory)[0])
    least = [minimum for _, minimum in asked]
    assert least == sorted(least) and len({*least}) == 1 + len(MEMORY)


def test_attention_distillation(asked, node, models):  # noqa: F811
    for memory in MEMORY:
        run(node, models["eps"], steps=1, iterations=1, memory=memory)
    low, auto, fast = (minimum for _, minimum in asked)
    assert 0 < low <= auto < fast  # one image: 'low' and 'auto' ask for the same


def test_free_memory_takes_the_references_too(node, features):  # noqa: F811
    """ComfyUI's button unloads all models, and its executor forgets what nodes have returned."""
    with torch.inference_mode():
        model = FAMILY.build()
    run(node, model, steps=1, iterations=1)
    assert features.CACHE.bytes > 0
    del model
    comfy.model_management.unload_all_models()
    gc.collect()
    assert features.CACHE.bytes == 0
