"""Prompts that act in a part of the image or of the run only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_inprocess import host_node
from scenes import evaluate

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def scenes(node_classes):
    """The embedded model, a function that encodes, and the negative prompt."""
    model, clip, _ = evaluate.load()
    with torch.inference_mode():
        return model, lambda text: node_classes["FoveaPrompt"].execute(clip, text)[0], host_node("CLIPTextEncode")(clip, "")[0]


@pytest.fixture
def sample(node_classes, scenes, caplog):
    """Sample with guidance in the first two of eight steps; returns the latent and what the run said."""
    caplog.set_level("INFO", logger="fovea")
    model, _, negative = scenes

    @torch.inference_mode()
    def run(positive: Any, batch: int = 1, **settings: Any) -> tuple[torch.Tensor, str]:
        settings = {"guide_until": 0.25, "thresholds": "", **settings}
        guided = node_classes["FoveaAttendExcite"].execute(model, **settings)[0]
        caplog.clear()
        latent = host_node("KSampler")(
            model=guided, seed=1, steps=8, cfg=5.0, sampler_name="euler", scheduler="normal", positive=positive,
            negative=negative, latent_image={"samples": torch.zeros(batch, 3, 32, 32)}, denoise=1.0,
        )[0]["samples"]  # fmt: skip
        return latent, next(line for line in caplog.messages if line.startswith("Attend-and-Excite"))

    return run


def masked(conditioning, mask, area="default"):
    return host_node("ConditioningSetMask")(conditioning, mask, area, 1.0)[0]


def half(images: int = 1) -> torch.Tensor:
    mask = torch.zeros(images, 64, 64)
    mask[..., :32] = 1
    return mask


@pytest.mark.parametrize("area", ["default", "mask bounds"])
@pytest.mark.parametrize("batch", [1, 2])
def test_subjects_are_looked_for_where_their_prompt_acts(sample, scenes, monkeypatch, batch, area):
    from fovea_attention.attention.excite import objective

    _, encode, _ = scenes
    seen = []
    monkeypatch.setattr(objective, "strengths", lambda maps: seen.append(maps.detach()) or maps.flatten(2).amax(-1))
    right = 1 - half()
    one = masked(encode("a [red circle]"), half(), area) + masked(encode("a blue square"), right, area)
    sample(one, batch=batch)
    assert len(seen) == 2 and all(len(maps) == batch for maps in seen)
    for maps in seen:
        width = maps.shape[-1]
        assert bool((maps[..., : width // 2].flatten(1).amax(1) > 0).all())
        if area == "default":
            assert not bool(maps[..., width // 2 :].any())


def test_a_white_mask_is_no_mask(sample, scenes):
    _, encode, _ = scenes
    plain, said = sample(encode("a [red circle] and a [blue square]"))
    white, same = sample(masked(encode("a [red circle] and a [blue square]"), torch.ones(1, 64, 64)))
    assert torch.equal(plain, white) and said == same


def test_each_image_of_a_batch_has_its_own_mask(sample, scenes, monkeypatch):
    from fovea_attention.attention.excite import objective

    _, encode, _ = scenes
    seen = []
    monkeypatch.setattr(objective, "strengths", lambda maps: seen.append(maps.detach()) or maps.flatten(2).amax(-1))
    sample(masked(encode("a [red circle]"), torch.cat([half(), 1 - half()])), batch=2)
    for maps in seen:
        middle = maps.shape[-1] // 2
        assert bool(maps[0, ..., :middle].any()) and not bool(maps[0, ..., middle:].any())
        assert bool(maps[1, ..., middle:].any()) and not bool(maps[1, ..., :middle].any())


def test_a_black_mask_leaves_the_other_image_its_guidance(sample, scenes):
    _, encode, _ = scenes
    both, said = sample(masked(encode("a [red circle]"), torch.cat([half(), half()])), batch=2)
    one, same = sample(masked(encode("a [red circle]"), torch.cat([half(), 0 * half()])), batch=2)
    assert torch.allclose(one[0], both[0], atol=1e-5) and bool(one.isfinite().all())
    assert "not guided" not in said + same and "left out" not in same


def test_what_is_never_guided_is_said(sample, scenes):
    _, encode, _ = scenes

    def ranged(conditioning, start, end):
        return host_node("ConditioningSetTimestepRange")(conditioning, start, end)[0]

    both = ranged(encode("a [red circle]"), 0.0, 0.6) + ranged(encode("a [blue square]"), 0.6, 1.0)
    why = '"blue square" not guided: that prompt acts in none of the guided steps'
    assert why in sample(both)[1] and 'weakest subject "red circle"' in sample(both)[1]
    late, said = sample(ranged(encode("a [blue square]"), 0.6, 1.0))
    assert "0 guided steps" in said and why in said
    assert "not guided" not in sample(ranged(encode("a [red circle]"), 0.0, 0.6))[1]
    black = masked(encode("a [blue square]"), torch.zeros(1, 64, 64)) + encode("a [red circle]")
    assert why in sample(black)[1]
