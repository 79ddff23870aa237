"""Tiles along one axis, large tiles in windows, tilings of other nodes, and the nodes around a tile."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
import torch.nn.functional as F
from distill_runs import FAMILY, Noise, Shifted, distill, features, fresh_cache, guider_of, plain, random_latent, run, sigmas_of
from host_inprocess import host_node
from scenes import evaluate
from tiny_unet import sample

__all__ = ["distill", "features", "fresh_cache"]

SAME = 1e-4
DISTILLED = 1e-3  # signs of gradients that are zero but for rounding
BRIEF = {"iterations": 1, "learning_rate": 0.02, "steps": 2}


@pytest.fixture(scope="module")
def node(node_classes):
    return node_classes["AttentionDistillSampler"].execute


@pytest.fixture(scope="module")
def seamless(node_classes):
    return lambda model, axis="both": node_classes["FoveaSeamless"].execute(model, axis=axis)[0]


@pytest.fixture
def model():
    with torch.inference_mode():
        return FAMILY.build()


def follows(make, shifts: tuple[int, int]) -> float:
    """How far the image of shifted noise is from the shifted image, in parts of its spread."""
    image, shifted = make(Shifted()), make(Shifted(shifts))
    return float((image.roll(shifts, (-2, -1)) - shifted).abs().mean() / image.std())


# --- one axis ---------------------------------------------------------------------------------------------------------------

DOWN, ACROSS = (8, 0), (0, -8)


@pytest.mark.parametrize(("axis", "joined", "ended"), [("horizontal", ACROSS, DOWN), ("vertical", DOWN, ACROSS)])
def test_one_axis_repeats_and_the_other_ends(node, model, seamless, axis, joined, ended):
    """In the plain sampler, and in Attention Distillation, whose gradient goes round the same edges."""
    latent = torch.zeros(1, 4, 16, 16)
    tiled = seamless(model, axis)

    def sampled(noise):
        return plain(tiled, latent=latent, noise=noise)

    def distilled(noise):
        return run(node, tiled, latent=latent, noise=noise, **BRIEF)[0]

    assert follows(sampled, joined) < SAME and follows(sampled, ended) > 100 * SAME
    assert follows(distilled, joined) < DISTILLED and follows(distilled, ended) > 10 * DISTILLED


def test_the_axis_of_a_model_is_the_last_one_and_leaves_nothing(node, model, seamless):
    """Its convolutions are as they were, and references are kept for each axis alone."""
    conds = FAMILY.conds(1), FAMILY.conds(2)
    before = sample(model, *conds, steps=2)
    convolutions = [module for module in model.model.modules() if isinstance(module, torch.nn.Conv2d)]

    def state():
        return [(type(module), module.padding_mode, "_conv_forward" in module.__dict__) for module in convolutions]

    kinds = state()
    across = seamless(model, "horizontal")
    image = sample(across, *conds, steps=2)
    assert torch.equal(sample(seamless(seamless(model, "vertical"), "horizontal"), *conds, steps=2), image)
    both = sample(seamless(across, "both"), *conds, steps=2)
    assert torch.equal(both, sample(seamless(model), *conds, steps=2)) and not torch.equal(both, image)
    assert torch.equal(sample(model, *conds, steps=2), before)
    assert state() == kinds
    sample(across, *conds, steps=1)
    comfy.model_management.unload_all_models()
    assert state() == kinds
    order = [model, across, seamless(model, "vertical"), seamless(model), across, model]
    computed = [run(node, of, adain="off", **BRIEF)[1]["reference_features"]["computed"] for of in order]
    assert computed == [2, 2, 2, 2, 0, 0]


def test_another_axis_is_named(model, node_classes):
    for name, inputs in (("FoveaSeamless", {}), ("FoveaSeamlessDecode", {"vae": None})):
        value = model if name == "FoveaSeamless" else {"samples": torch.zeros(1, 4, 8, 8)}
        with pytest.raises(ValueError, match="axis is 'round': use both, horizontal, vertical"):
            node_classes[name].execute(value, axis="round", **inputs)


# --- large tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "axis", "size", "shifts"),
    [
        ("guided sampling", "both", (24, 24), (8, -8)),
        ("optimise", "both", (16, 24), (8, -8)),  # windows across, the model itself down
        ("guided sampling", "horizontal", (16, 24), (0, 8)),
    ],
)
def test_windows_go_over_joined_edges(node, model, seamless, method, axis, size, shifts):
    settings = {
        "window": 128,
        "window_stride": 64,
        "method": method,
        "latent": {"samples": torch.zeros(1, 4, *size)},
        **BRIEF,
        "steps": 1,
    }
    tiled = seamless(model, axis)
    assert follows(lambda noise: run(node, tiled, noise=noise, **settings)[0], shifts) < DISTILLED
    if method == "optimise":
        assert follows(lambda noise: run(node, model, noise=noise, **settings)[0], shifts) > 10 * DISTILLED


def test_windows_over_the_edges_average_what_a_window_gives(node, model, seamless):
    """Each is the plain model on a part of the rolled latent; T-GATE is told of one step each."""
    areas = [(16, 16, top, left) for top in (0, 8, 16) for left in (0, 8, 16)]
    x, noise = torch.zeros(1, 4, 24, 24), Noise().generate_noise({"samples": torch.zeros(1, 4, 24, 24)})
    still = {"iterations": 1, "learning_rate": 1e-12, "adain": "off", "steps": 1}
    found, report = run(node, seamless(model), latent={"samples": x}, window=128, window_stride=64, **still)
    assert report["windows"] == len(areas)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    sigmas = sigmas_of(model, 1)
    for height, width, top, left in areas:

        class Part(Noise):
            def generate_noise(self, latent, top=top, left=left):
                return noise.roll((-top, -left), (-2, -1))[..., :16, :16]

        part = F.pad(plain(model, steps=len(sigmas) - 1, latent=torch.zeros(1, 4, 16, 16), noise=Part()), (0, 8, 0, 8))
        total += part.roll((top, left), (-2, -1))
        count += F.pad(torch.ones(1, 4, height, width), (0, 8, 0, 8)).roll((top, left), (-2, -1))
    assert (found - total / count).abs().max() < 1e-3 * found.abs().max()


@pytest.mark.newest
def test_masks_content_and_t_gate_go_through_windows_over_the_edges(node, model, seamless, node_classes):
    content = random_latent(21, size=(16, 24))
    hole = torch.zeros(1, 1, 16, 24)
    hole[..., 4:20] = 1
    latent = {"samples": random_latent(31, size=(16, 24)), "noise_mask": hole}
    masks = {"reference_mask": torch.arange(4).float().repeat(4, 1)[None] / 5}
    masks["target_mask"] = masks["reference_mask"].transpose(1, 2)
    gated = node_classes["TGateCache"].execute(seamless(model), gate_at=0.4, sp_interval=2)[0]
    settings = {**BRIEF, "steps": 3, "content": {"samples": content}, "window": 128, "window_stride": 64, **masks}
    found, report = run(node, gated, latent=latent, **settings)
    assert found.isfinite().all() and report["windows"] == 3
    known = model.model.process_latent_in(latent["samples"])
    assert (found - known)[..., :4].abs().max() < 1e-4 * known.abs().max()


# --- tilings of other nodes -------------------------------------------------------------------------------------------------


def convolve_round(left_right: bool, top_bottom: bool):
    def forward(self, x, weight, bias):
        left, right, top, bottom = self._reversed_padding_repeated_twice
        x = F.pad(x, (left, right, 0, 0), mode="circular" if left_right else "constant")
        x = F.pad(x, (0, 0, top, bottom), mode="circular" if top_bottom else "constant")
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    return forward


def convolutions_of(model):
    modules = model.model.diffusion_model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, torch.nn.Conv2d) and any(module.padding)]


def convolving(left_right: bool, top_bottom: bool):
    """A node that replaces the convolutions' function: in the model itself, or by object patches."""

    def changed(model, in_place: bool):
        clone = model if in_place else model.clone()
        for name, module in convolutions_of(model):
            function = convolve_round(left_right, top_bottom).__get__(module)
            if in_place:
                module._conv_forward = function
            else:
                clone.add_object_patch(f"diffusion_model.{name}._conv_forward", function)
        return clone

    return changed


def mode_in_place(model):
    for _, module in convolutions_of(model):
        module.padding_mode = "circular"
    return model


TILINGS = {
    "replaced": lambda model: convolving(True, False)(model, in_place=True),
    "patches": lambda model: convolving(True, False)(model, in_place=False),
    "mode": mode_in_place,
}


@pytest.mark.parametrize("way", TILINGS)
def test_tilings_of_other_nodes_are_seen(node, model, pack, way):
    """They are not cut into windows, keep references of their own, and their gradient goes round the edges."""
    from fovea_attention.attention import host

    network = model.model.diffusion_model
    assert host.joined_edges(model, network) == (False, False)
    run(node, model, **BRIEF)
    tiled = TILINGS[way](model)
    assert host.joined_edges(tiled, network) == (way == "mode", True)
    _, report = run(node, tiled, **BRIEF)
    assert report["reference_features"]["reused"] == 0
    with pytest.raises(ValueError, match="window cannot be used with another node's tiling"):
        run(node, tiled, latent=torch.zeros(1, 4, 24, 24), window=128, **BRIEF)
    latent = torch.zeros(1, 4, 16, 16)
    assert follows(lambda noise: run(node, tiled, latent=latent, noise=noise, **BRIEF)[0], ACROSS) < DISTILLED


def test_a_tiling_that_is_switched_off_is_none(node, model, pack):
    """Packs leave their function in place and pad with zeros again."""
    from fovea_attention.attention import host

    convolving(False, False)(model, in_place=True)
    assert host.joined_edges(model, model.model.diffusion_model) == (False, False)
    run(node, model, latent=torch.zeros(1, 4, 16, 24), window=128, **BRIEF)


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("theirs", "axis", "agree"),
    [
        ((False, False), "both", False),
        ((True, False), "both", False),
        ((True, False), "vertical", False),
        ((True, False), "horizontal", True),
    ],
)
def test_a_tiling_that_wins_over_ours_is_named(model, seamless, caplog, theirs, axis, agree, in_place, ours_first):
    """Also where it comes behind ours, and only where it joins other edges."""
    other = convolving(*theirs)
    tiled = other(seamless(model, axis), in_place) if ours_first else seamless(other(model, in_place), axis)
    plain(tiled, latent=torch.zeros(1, 4, 16, 16), steps=1)
    said = [text for text in caplog.messages if f"another node ({__name__}) has replaced the convolutions" in text]
    assert len(said) == (not agree)


def test_a_tiling_that_was_taken_away_leaves_nothing_in_our_way(model, seamless):
    """ComfyUI puts a method back on the convolutions themselves, where it would hide the one that joins edges."""
    latent = torch.zeros(1, 4, 16, 16)
    plain(convolving(True, False)(model, in_place=False), latent=latent, steps=1)
    tiled = seamless(model, "horizontal")
    assert follows(lambda noise: plain(tiled, latent=latent, noise=noise), ACROSS) < SAME


# --- sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "size", "said"),
    [
        ("both", (24, 16), ""),
        ("both", (18, 17), "halves it 1 times and cannot halve width 136 (use 128 or 144)"),
        ("both", (19, 17), "cannot halve height 152 (use 144 or 160) and width 136 (use 128 or 144)"),
        ("horizontal", (19, 18), ""),
        ("vertical", (19, 18), "cannot halve height 152"),
    ],
)
def test_sides_that_cannot_repeat_are_said_before_sampling(model, seamless, caplog, axis, size, said):
    caplog.set_level("INFO", logger="fovea")
    plain(seamless(model, axis), latent=torch.zeros(1, 4, *size), steps=1)
    messages = [text for text in caplog.messages if text.startswith("Seamless Tiling: the image may show a seam")]
    assert len(messages) == bool(said) and all(said in text for text in messages)


# --- around a tile ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    return evaluate.load()[2]


@pytest.mark.newest
@pytest.mark.parametrize(("axis", "shifts", "seam"), [("both", (5, -3), None), ("horizontal", (0, -3), (5, 0))])
def test_decoding_and_encoding_go_round_the_joined_edges(node_classes, vae, axis, shifts, seam):
    decode, encode = (node_classes[f"FoveaSeamless{name}code"].execute for name in ("De", "En"))

    def changes(make, x, moves, dimensions, scale) -> float:
        one, other = make(x), make(x.roll(moves, dimensions))
        found = one.roll([round(move * scale) for move in moves], dimensions if scale == 1 else (-2, -1))
        return float((found - other).abs().mean() / one.std())

    latent = torch.randn(1, vae.latent_channels, 8, 12, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():

        def decoded(x):
            return decode({"samples": x}, vae, axis=axis)[0].movedim(-1, 1)

        def encoded(x):
            return encode(x.movedim(1, -1), vae, axis=axis)[0]["samples"]

        def usual(x):
            return host_node("VAEDecode")(vae=vae, samples={"samples": x})[0].movedim(-1, 1)

        assert decoded(latent).shape == usual(latent).shape
        found = changes(decoded, latent, shifts, (-2, -1), 8)
        assert found < 0.1 * changes(usual, latent, shifts, (-2, -1), 8)
        if seam is not None:
            assert changes(decoded, latent, seam, (-2, -1), 8) > 3 * found
        image = decoded(latent)
        assert encoded(image).shape == latent.shape
        assert changes(encoded, image, [8 * shift for shift in shifts], (-2, -1), 1 / 8) < 0.02


@pytest.mark.newest
def test_an_image_that_the_vae_would_crop_is_named(node_classes, vae):
    encode = node_classes["FoveaSeamlessEncode"].execute
    with torch.inference_mode():
        with pytest.raises(ValueError, match="pixels has a width of 60, which the VAE would crop to 56"):
            encode(torch.zeros(1, 64, 60, 3), vae)
        assert encode(torch.zeros(1, 64, 60, 3), vae, axis="vertical")[0]["samples"].shape[-2:] == (8, 7)


@pytest.mark.newest
@pytest.mark.parametrize("axis", ["both", "horizontal", "vertical"])
@pytest.mark.parametrize("factor", [1, 3])
def test_a_wrapped_tile_stays_a_tile_through_other_nodes(node_classes, axis, factor):
    wrap, crop = (node_classes[f"FoveaTile{name}"].execute for name in ("Wrap", "Crop"))

    def enlarged_and_blurred(image):
        large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).movedim(-1, 1)
        return F.avg_pool2d(large, 5, 1, 2, count_include_pad=False).movedim(1, -1)

    image = torch.rand(2, 20, 30, 3, generator=torch.Generator().manual_seed(1))
    wrapped, how = wrap(image, margin=40, axis=axis).args  # more than the tile itself
    assert wrapped.shape == (2, 20 + 80 * (axis != "horizontal"), 30 + 80 * (axis != "vertical"), 3)
    found = crop(enlarged_and_blurred(wrapped), how)[0]
    assert found.shape == (2, 20 * factor, 30 * factor, 3)
    shifts = (7 * (axis != "horizontal"), 11 * (axis != "vertical"))
    moved, how = wrap(image.roll(shifts, (1, 2)), margin=40, axis=axis).args
    again = crop(enlarged_and_blurred(moved), how)[0]
    torch.testing.assert_close(again, found.roll([shift * factor for shift in shifts], (1, 2)))


@pytest.mark.newest
def test_tiles_are_cropped_at_whole_pixels_and_shown(node_classes):
    wrap, crop, look = (node_classes[f"FoveaTile{name}"].execute for name in ("Wrap", "Crop", "View"))
    image = torch.rand(1, 20, 30, 3)
    wrapped, how = wrap(image, margin=5).args
    with pytest.raises(ValueError, match="would fall between two pixels"):
        crop(torch.zeros(1, 45, 60, 3), how)
    assert torch.equal(crop(wrapped, how)[0], image)
    four, offset = (look(image, view=view)[0] for view in ("2 x 2", "offset"))
    assert four.shape == (1, 40, 60, 3) and torch.equal(four[:, 20:, 30:], image)
    assert torch.equal(look(offset, view="offset")[0], image)
    with pytest.raises(ValueError, match="view is 'side': use 2 x 2 or offset"):
        look(image, view="side")


@pytest.mark.newest
def test_seams_of_the_demo_model_vanish_along_the_joined_axis_alone(node_classes, seamless, vae):
    model, clip, _ = evaluate.load()
    prompt, null = (evaluate.encode(clip, [text]) for text in ("a striped navy background", ""))
    latent = torch.zeros(1, vae.latent_channels, 32, 32)
    samples = sample(seamless(model, "horizontal"), prompt, null, steps=8, cfg=4, latent_image=latent)
    with torch.inference_mode():
        image = node_classes["FoveaSeamlessDecode"].execute({"samples": samples}, vae, axis="horizontal")[0]
    steps = [(image - image.roll(1, dimension)).abs().mean((3, 3 - dimension))[0] for dimension in (1, 2)]
    rows, columns = (float(step[0] / step[1:].mean()) for step in steps)
    assert columns < 1.5 < rows, (rows, columns)


def test_the_guider_that_came_in_is_as_it_was(node, model, seamless):
    tiled = seamless(model)
    guider = guider_of(tiled)
    before = dict(guider.__dict__)
    run(node, tiled, guider=guider, latent=torch.zeros(1, 4, 16, 24), window=128, window_stride=64, **{**BRIEF, "steps": 1})
    assert guider.__dict__ == before
