"""Attention Distillation in windows: what a window gives is what a run on that part alone gives."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from distill_runs import (
    CFG,
    FAMILY,
    NEGATIVE,
    POSITIVE,
    Noise,
    Shifted,
    distill,
    features,
    fresh_cache,
    guider_of,
    plain,
    random_latent,
    run,
    tiny_controlnet,
    with_control,
)
from families import FAMILIES
from host_inprocess import host_node
from tiny_unet import small_model

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


# --- prompts for an area, and ControlNet ------------------------------------------------------------------------------------


OTHER = FAMILY.conds(5)
LEFT, RIGHT = (SIDE, SIDE, 0, 0), (SIDE, SIDE, 0, SIDE)


def for_area(prompt, area):
    return [[prompt[0][0], {"area": area, "strength": 1.0}]]


def parts_alone(node, model, guiders, **settings) -> torch.Tensor:
    """What each half of a wide latent gives in a run of its own."""
    parts = [
        run(node, model, latent=wide_latent()[..., :SIDE], noise=PartOfNoise(first), guider=guider, **settings)[0]
        for first, guider in zip((0, SIDE), guiders, strict=True)
    ]
    return torch.cat(parts, dim=3)


def test_prompts_for_an_area_act_in_the_windows_that_show_it(node, model):
    areas = for_area(POSITIVE, LEFT) + for_area(OTHER, RIGHT)
    found, report = run(
        node, model, latent=wide_latent(), noise=PartOfNoise(0), guider=guider_of(model, positive=areas), **BRIEF, **APART
    )
    alone = parts_alone(node, model, [guider_of(model, positive=each) for each in (POSITIVE, OTHER)], **BRIEF)
    other = parts_alone(node, model, [guider_of(model, positive=each) for each in (OTHER, POSITIVE)], **BRIEF)
    assert report["windows"] == 2
    assert (found - alone).abs().mean() < 1e-3 * alone.std() < 1e-1 * (found - other).abs().mean()


def for_mask(prompt, columns: slice = slice(None)):
    mask = torch.zeros(1, SIDE * 8, 2 * SIDE * 8)
    mask[..., columns] = 1
    return host_node("ConditioningSetMask")(prompt, mask, "default", 1.0)[0]


@pytest.mark.parametrize("noise_mask", [False, True])
def test_masks_weigh_all_prompts_alike_in_overlapping_windows(node, model, noise_mask):
    """CFG leaves nothing of a prompt against itself, and a mask of ones on both of them changes nothing."""
    latent = {"samples": wide_latent()}
    if noise_mask:
        latent["noise_mask"] = torch.linspace(0, 1, WIDE[1]).expand(1, 1, *WIDE).contiguous()

    def image(positive, negative, cfg: float):
        guider = guider_of(model, cfg, positive, negative)
        return run(node, model, guider=guider, latent=latent, window=SIDE * 8, window_stride=64, **BRIEF)[0]

    masked = for_mask(POSITIVE)
    for negative in (POSITIVE, masked):
        plainly = image(masked, negative, 1.0)
        assert (image(masked, negative, 8.0) - plainly).abs().max() < 1e-3 * plainly.std()
    found = image(masked, NEGATIVE, CFG)
    assert (found - image(masked, for_mask(NEGATIVE), CFG)).abs().max() < 1e-3 * found.std()


@pytest.mark.parametrize("case", ["whole", "chained", "area"])
def test_a_window_sees_its_part_of_the_image_of_a_controlnet(node, case):
    """Also where a ControlNet follows another one, and where the prompt that has it is for an area."""
    model, control = small_model(), tiny_controlnet()
    hint = torch.rand(1, SIDE * 8, 2 * SIDE * 8, 3, generator=torch.Generator().manual_seed(1))

    def guider(columns: slice, area=None):
        prompts = POSITIVE, NEGATIVE
        if area is not None:
            prompts = for_area(POSITIVE, area) + for_area(OTHER, RIGHT), for_area(NEGATIVE, area) + for_area(NEGATIVE, RIGHT)
        positive, negative = with_control(control, hint[:, :, columns], *prompts)
        if case == "chained":
            positive, negative = with_control(control.copy(), 1 - hint[:, :, columns], positive, negative)
        return guider_of(model, positive=positive, negative=negative)

    columns = slice(0, SIDE * 8), slice(SIDE * 8, None)
    whole = guider(columns[0], LEFT) if case == "area" else guider(slice(None))
    settings = {"layers": "", "steps": 2, **BRIEF}
    found, _ = run(node, model, latent=wide_latent(), noise=PartOfNoise(0), guider=whole, **settings, **APART)
    alone = parts_alone(node, model, [guider(each) for each in columns], **settings)
    without = parts_alone(node, model, [guider_of(model)] * 2, **settings)
    seen = SIDE if case == "area" else 2 * SIDE
    difference, effect = ((found - other)[..., :seen].abs().mean() for other in (alone, without))
    assert difference < 1e-3 * alone.std() and difference < 0.02 * effect
    assert control.cond_hint is None and control.timestep_range is None  # as it was


@pytest.mark.parametrize("way", ["area", "bounds of a mask"])
def test_windows_over_the_edges_keep_areas_where_they_are(node, model, node_classes, way):
    """What repeats across may be moved across, with a prompt for the upper rows; bounds of a mask only save time."""
    tiled = node_classes["FoveaSeamless"].execute(model, axis="horizontal")[0]
    upper = torch.zeros(1, 16, 24)
    upper[:, :8] = 1

    def image(noise, bounds: bool = True):
        limits = {"area": (8, 24, 0, 0)} if way == "area" else {"mask": upper, "set_area_to_bounds": bounds}
        positive = [*POSITIVE, [OTHER[0][0], {"strength": 4.0, **limits}]]
        settings = {"latent": {"samples": torch.zeros(1, 4, 16, 24)}, "window": 128, "window_stride": 64, "steps": 1}
        return run(node, tiled, noise=noise, guider=guider_of(tiled, positive=positive), **BRIEF | settings)[0]

    found = image(Shifted())
    if way == "area":
        assert (found.roll((0, 8), (-2, -1)) - image(Shifted((0, 8)))).abs().mean() < 1e-3 * found.std()
    else:
        assert (found - image(Shifted(), bounds=False)).abs().mean() < 1e-3 * found.std()


@pytest.mark.newest
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "area", [(8, 8, 0, 0), (16, 40, 4, 10), (2, 3, 30, 0), (64, 99, 16, 20), (1, 1, 7, 7), (2, 20, 20, 0, 4, 8)]
)
def test_areas_weigh_as_in_comfyui(pack, area, masked):
    from fovea_attention.attention.host.window_prompts import area_weights

    sizes = (3, 48, 64)[-2 if len(area) == 4 else -3 :]
    x = torch.zeros(1, 4, *sizes)
    cond = {"area": area, "model_conds": {}, "uuid": None}
    if masked:
        cond["mask"] = torch.ones(1, *sizes)
    theirs = comfy.samplers.get_area_and_mult(cond, x, torch.ones(1))
    whole = torch.zeros(sizes)
    half = len(sizes)
    places = tuple(slice(start, start + size) for size, start in zip(theirs.area[:half], theirs.area[half:], strict=True))
    whole[places] = theirs.mult[0, 0]
    assert torch.allclose(area_weights(area, sizes, feathered=not masked)[0], whole)


# --- what cannot be cut into windows ----------------------------------------------------------------------------------------


def test_what_needs_the_whole_image_is_refused_before_sampling(node, model, node_classes, monkeypatch):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *_, **__: pytest.fail("sampling has begun"))
    latent = {"samples": wide_latent()}
    excite, _ = node_classes["AttendExciteGuider"].execute(model, POSITIVE, NEGATIVE, subjects="2, 5")
    placed = [[POSITIVE[0][0], {"gligen": ("position", None, [])}]]
    imageless = [[POSITIVE[0][0], {"control": tiny_controlnet()}]]
    for guider, message in (
        (excite, "Attend-and-Excite"),
        (guider_of(model, positive=placed), "GLIGEN"),
        (guider_of(model, positive=imageless), "a ControlNet that has no image"),
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
