"""Attention Distillation in windows: what a window gives is what a run on that part alone gives."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from distill_runs import FAMILY, NEGATIVE, POSITIVE, Noise, distill, features, fresh_cache, guider_of, plain, random_latent, run
from families import FAMILIES

import nodes

__all__ = ["distill", "features", "fresh_cache"]

SIDE = 16  # of a window, in latent pixels
WIDE = (SIDE, 2 * SIDE)
APART = {"window": SIDE * 8, "window_stride": SIDE * 8}
BRIEF = {"iterations": 2, "learning_rate": 0.02, "adain": "off"}


@pytest.fixture(scope="module")
def node(node_classes):
    return node_classes["AttentionDistillSampler"].execute


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return FAMILY.build()


@pytest.fixture(scope="module")
def windows(pack):
    import fovea_attention.attention.distill.windows as windows

    return windows


class PartOfNoise(Noise):
    """Columns of the noise of a wider latent."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def generate_noise(self, latent):
        wide = torch.randn(1, 4, *WIDE, generator=torch.Generator().manual_seed(self.seed))
        return wide[..., self.first : self.first + latent["samples"].shape[-1]]


def wide_latent() -> torch.Tensor:
    return torch.zeros(1, 4, *WIDE)


# --- where they are ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (33, 17), (9, 64)])
@pytest.mark.parametrize(("side", "stride"), [(0, 1), (8, 8), (8, 3), (16, 5), (64, 8)])
def test_windows_cover_the_latent_and_stay_inside(windows, size, side, stride):
    found = windows.windows_of(*size, side, stride)
    seen = torch.zeros(size)
    for window in found:
        part = window.of(seen)
        assert part.shape == (min(side or max(size), size[0]), min(side or max(size), size[1]))
        part.add_(1)
    assert seen.min() >= 1 and len(set(found)) == len(found)
    tops = sorted({window.top for window in found})
    assert all(second - first <= stride for first, second in zip(tops, tops[1:], strict=False))


def test_parts_are_averaged_where_they_overlap(windows):
    found = windows.windows_of(4, 6, 4, 1)
    x = torch.rand(2, 3, 4, 6)
    together = windows.average([window.of(x) * (place + 1) for place, window in enumerate(found)], found, x)
    columns = torch.tensor([1, 1.5, 2, 2, 2.5, 3])
    assert torch.allclose(together, x * columns)
    assert torch.allclose(windows.average([window.of(x) for window in found], found, x), x)


# --- what is done in them ---------------------------------------------------------------------------------------------------


def test_a_window_that_holds_everything_changes_nothing(node, model):
    found, report = run(node, model, window=SIDE * 8, window_stride=8, **BRIEF)
    expected, other = run(node, model, **BRIEF)
    assert torch.equal(found, expected) and report["windows"] == other["windows"] == 1


MASKS = {"reference_mask": (torch.arange(SIDE * 8) // 50).float()[None, None].expand(1, 64, -1) / 5}


@pytest.mark.newest
@pytest.mark.parametrize(
    ("method", "case"),
    [("guided sampling", case) for case in ("", "masks", "inpaint", "T-GATE")]
    + [("optimise", case) for case in ("", "content", "masks")],
)
def test_windows_side_by_side_give_what_each_part_gives_alone(node, model, node_classes, method, case):
    """The references are the same for all of them, and where windows do not overlap nothing is averaged.

    (The noise of a content image is drawn for its size, so only ``optimise``, which needs none, can be compared with one.)
    """
    content = random_latent(21, size=WIDE)
    target = (torch.arange(WIDE[1]) % 7).float()[None, None].expand(1, WIDE[0], -1) / 5
    hole = (torch.arange(WIDE[1]) % 12 < 8).float()[None, None, None].expand(1, 1, *WIDE)
    gated = {"gate_at": 0.4, "sp_interval": 2, "cfg_after_gate": "keep"}
    guided = node_classes["TGateCache"].execute(model, **gated)[0] if case == "T-GATE" else model

    def latent_and_settings(columns: slice):
        latent = {"samples": random_latent(31, size=WIDE)[..., columns] if case == "inpaint" else wide_latent()[..., columns]}
        settings = dict(BRIEF)
        if case == "content":
            settings["content"] = {"samples": content[..., columns]}
        elif case == "masks":
            settings |= {**MASKS, "target_mask": target[..., columns]}
        elif case == "inpaint":
            latent["noise_mask"] = hole[..., columns]
        return latent, settings

    steps = 5 if case == "T-GATE" else 2
    latent, settings = latent_and_settings(slice(None))
    kept = {"steps": steps, "method": method, "guider": guider_of(guided)}
    found, report = run(node, model, latent=latent, noise=PartOfNoise(0), **kept, **settings, **APART)
    assert report["windows"] == 2
    losses = []
    for first in (0, SIDE):
        columns = slice(first, first + SIDE)
        latent, settings = latent_and_settings(columns)
        kept["guider"] = guider_of(guided)
        alone, of_part = run(node, model, latent=latent, noise=PartOfNoise(first), **kept, **settings)
        moved = (alone - latent["samples"]).abs().mean()
        assert (found[..., columns] - alone).abs().mean() < 1e-3 * moved
        losses.append(torch.tensor([step["loss"] for step in of_part["steps"]]))
    assert torch.allclose(torch.tensor([step["loss"] for step in report["steps"]]), torch.stack(losses).mean(0), rtol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_overlapping_windows_denoise_as_prompts_for_areas_do(node, model, sampler):
    """An optimisation step that moves nothing leaves MultiDiffusion, which ComfyUI does for prompts with areas."""
    areas = [(SIDE, SIDE, 0, left) for left in (0, 8, 16)]

    def everywhere(conditioning):
        return [[conditioning[0][0], {"area": area, "strength": 1.0}] for area in areas]

    still = {"iterations": 1, "learning_rate": 1e-12, "adain": "off"}
    settings = {"latent": {"samples": wide_latent()}, "sampler": sampler}
    cut, report = run(node, model, window=SIDE * 8, window_stride=64, **settings, **still)
    by_areas = guider_of(model, positive=everywhere(POSITIVE), negative=everywhere(NEGATIVE))
    expected, other = run(node, model, guider=by_areas, **settings, **still)
    assert report["windows"] == 3 and other["windows"] == 1
    assert (cut - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (cut - plain(model, latent=wide_latent(), sampler=sampler)).abs().max() > 1e-2 * expected.abs().max()


def test_references_are_looked_at_once_for_all_windows(node, model):
    _, report = run(node, model, latent={"samples": wide_latent()}, window=SIDE * 8, window_stride=64, **BRIEF)
    assert report["reference_features"] == {"reused": 0, "computed": 2}


# --- what cannot be cut into windows ----------------------------------------------------------------------------------------


def test_what_needs_the_whole_image_is_refused_before_sampling(node, model, node_classes, monkeypatch):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *_, **__: pytest.fail("sampling has begun"))
    latent = {"samples": wide_latent()}
    excite, _ = node_classes["AttendExciteGuider"].execute(model, POSITIVE, NEGATIVE, subjects="2, 5")
    area = nodes.ConditioningSetArea().append(POSITIVE, 64, 64, 0, 0, 1.0)[0]
    for guider, message in (
        (excite, "Attend-and-Excite"),
        (guider_of(model, positive=area), "prompts for an area"),
    ):
        with pytest.raises(ValueError, match=f"window cannot be used with {message}"):
            run(node, model, guider=guider, latent=latent, **BRIEF, **APART)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 32}, "window is 32: use 0"),
        ({"window": -8}, "window is -8: use 0"),
        ({"window": 128, "window_stride": 136}, "window_stride is 136 and window 128: .* leave gaps"),
        ({"window": 128, "window_stride": 0}, "window_stride is 0 and window 128"),
    ],
)
def test_windows_that_cannot_be_are_named(node, model, settings, message):
    with pytest.raises(ValueError, match=message):
        run(node, model, latent={"samples": wide_latent()}, **BRIEF, **settings)


def test_sdxl_is_told_the_size_of_a_window(node, pack, monkeypatch):
    """As published, the network hears the size of what it looks at."""
    from fovea_attention.attention import host

    family = FAMILIES["sdxl"]
    with torch.inference_mode():
        model = family.build()
    told = []
    processed = host.processed_cond

    def watched(base_model, cond, like, *args):
        told.append((cond.get("width"), tuple(like.shape[-2:])))
        return processed(base_model, cond, like, *args)

    monkeypatch.setattr(host, "processed_cond", watched)
    guider = guider_of(model, positive=family.conds(1), negative=family.conds(2))
    null = family.conds(7)
    run(node, model, guider=guider, null_prompt=null, layers="", latent={"samples": wide_latent()}, steps=1, **BRIEF, **APART)
    assert told == [(None, (SIDE, SIDE))] * 2 + [(SIDE * 8, (16, 16))]
