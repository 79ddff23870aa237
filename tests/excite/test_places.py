"""Subjects in places of their own, or in those of masks."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from host_inprocess import host_node
from scenes import detect, evaluate
from tiny_unet import cond, small_model

pytestmark = pytest.mark.newest

SCENE = "a [red circle] and a [blue square]"
ITS_LAYERS = {"attention_grid": 16, "layers": "output"}


@pytest.fixture(scope="module")
def places(pack):
    from fovea_attention.attention.excite import places

    return places


def halves(first, second):
    """A batch of two masks: the given quarter of the image for each subject, as (top, left) of 0 or 1."""
    masks = torch.zeros(2, 256, 256)
    for mask, (top, left) in zip(masks, (first, second), strict=True):
        mask[top * 128 : top * 128 + 128, left * 128 : left * 128 + 128] = 1
    return masks


@torch.inference_mode()
def sampled(node_classes, text=SCENE, images=1, steps=10, seed=1, node="AttendExciteGuider", **settings):
    """Decoded images of the embedded model, (images, 256, 256, 3)."""
    model, clip, vae = evaluate.load()
    positive = node_classes["FoveaPrompt"].execute(clip, text)[0]
    negative = host_node("CLIPTextEncode")(clip, "")[0]
    latent = host_node("EmptyLatentImage")(width=256, height=256, batch_size=images)[0]
    run, settings = evaluate.sampling_node, {**ITS_LAYERS, **settings}
    if node == "AttendExciteGuider":
        guider = node_classes[node].execute(model, positive, negative, cfg=5.0, **settings)[0]
    else:
        guided = node_classes[node].execute(model, **settings)[0]
        guider = run("CFGGuider", model=guided, positive=positive, negative=negative, cfg=5.0)
    found = run(
        "SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=seed), guider=guider, latent_image=latent,
        sampler=run("KSamplerSelect", sampler_name="euler"),
        sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0),
    )["samples"]  # fmt: skip
    return host_node("VAEDecode")(vae=vae, samples={"samples": found})[0]


def middle(image, colour, shape):
    """Where an object is, (x, y) from 0 to 1."""
    left, top, right, bottom = detect.find(image, colour, shape).box
    return (left + right) / 2, (top + bottom) / 2


@pytest.mark.parametrize("corners", [((0, 0), (1, 1)), ((1, 1), (0, 0))])
def test_masks_say_where_the_subjects_are(node_classes, corners):
    image = sampled(node_classes, subject_masks=halves(*corners), layout_strength=2.0)[0]
    circle, square = middle(image, "red", "circle"), middle(image, "blue", "square")
    for axis, (first, second) in enumerate(((corners[0][1], corners[1][1]), (corners[0][0], corners[1][0]))):
        assert (circle[axis] > square[axis]) == (first > second)
        assert abs(circle[axis] - square[axis]) > 0.15


def test_own_places_with_the_guider_and_with_the_model_node_are_one_image(node_classes):
    own = sampled(node_classes, layout="own places", steps=6)
    assert torch.equal(sampled(node_classes, layout="own places", steps=6, node="FoveaAttendExcite"), own)
    assert not torch.equal(sampled(node_classes, steps=6), own)


def test_images_of_a_batch_have_places_of_their_own(node_classes):
    settings = {"layout": "own places", "steps": 4, "max_refinements": 2}
    both = sampled(node_classes, images=2, **settings)
    torch.testing.assert_close(sampled(node_classes, **settings), both[:1], rtol=0, atol=2e-3)


def test_without_strength_nothing_changes(node_classes):
    free = sampled(node_classes, steps=4)
    assert torch.equal(sampled(node_classes, steps=4, layout="own places", layout_strength=0.0), free)


GRIDS = [(16, 16), (8, 24), (24, 8), (3, 5), (1, 9)]


@pytest.mark.parametrize(
    ("count", "grid"),
    [(count, grid) for grid in GRIDS for count in range(1, 9) if count <= max(grid[0] * grid[1] // 4, 1)],  # as the nodes allow
)
def test_equal_parts_do_not_overlap(places, count, grid):
    parts = places.equal_parts(count, grid)
    assert parts.shape == (count, *grid) and bool((parts.sum((1, 2)) > 0).all())
    assert count == 1 or float(parts.sum(0).max()) == 1
    if count == 1:
        assert bool((parts == 1).all())


def test_parts_go_to_the_subjects_that_are_strongest_there(places):
    found = places.Places(places.PlaceSettings(places.Layout.OWN_PLACES), 2, [1, 1])
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, :, 5], maps[0, 1, :, 3] = 0.9, 0.9
    assert float(found.loss(maps, torch.tensor([1]))) < float(found.loss(maps.flip(1), torch.tensor([1])))


def test_the_loss_is_what_the_paper_says(places):
    maps, masks = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 3, 8, 8)
    masks[:, 0, :4], masks[:, 1, 4:, :3], masks[:, 2] = 1, 1, 1
    tokens = (1, 2, 3)
    found = places.misplaced(maps, masks, tokens)
    for image in range(2):
        wanted = 0.0
        for subject in range(3):
            inside, outside = (maps[image, subject][masks[image, subject] == value] for value in (1, 0))
            lost = 1 - float(inside.topk(max(int(len(inside) * 0.3), 1)).values.mean())
            if len(outside):
                lost += float(outside.topk(max(int(len(outside) * 0.2), 1)).values.mean())
            wanted += lost / tokens[subject]
        assert float(found[image]) == pytest.approx(wanted, abs=1e-5)


def area():
    return host_node("ConditioningSetArea")(cond(4), 64, 64, 0, 0, 1.0)[0]


MASK = torch.ones(2, 32, 32)
BLACK = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])


@pytest.mark.parametrize(
    ("settings", "positive", "message"),
    [
        ({"subject_masks": MASK[:1]}, None, "holds 1 masks for 2 subjects"),
        ({"subject_masks": BLACK}, None, "mask 2 is black everywhere"),
        ({"subject_masks": MASK * float("nan")}, None, "NaN"),
        ({"layout_strength": float("inf")}, None, "layout_strength is inf"),
        ({"layout": "own places"}, lambda: [*cond(1), *cond(3)], "layout places the subjects of one prompt"),
        ({"subject_masks": MASK}, lambda: [*cond(1), *area()], "subject_masks places the subjects of one prompt"),
    ],
)
def test_what_cannot_be_placed_is_refused_on_the_node(node_classes, settings, positive, message):
    with pytest.raises(ValueError, match=message):
        node_classes["AttendExciteGuider"].execute(
            small_model(), positive() if positive else cond(1), cond(2), subjects="2, 5", **settings
        )


def test_a_single_prompt_with_an_area_is_refused_before_sampling(node_classes):
    guider = node_classes["AttendExciteGuider"].execute(small_model(), area(), cond(2), subjects="2, 5", layout="own places")[0]
    noise = torch.zeros(1, 4, 12, 12)
    with torch.inference_mode(), pytest.raises(ValueError, match="layout places the subjects of one prompt"):
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), disable_pbar=True)
