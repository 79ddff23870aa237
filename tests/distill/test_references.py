"""Several references: of different sizes, as images or latents, together or one for each image."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from distill_runs import (
    FAMILY,
    SIZE,
    GivenNoise,
    Noise,
    distill,
    features,
    fresh_cache,
    guider_of,
    node,
    random_latent,
    run,
)
from scenes import evaluate

__all__ = ["distill", "features", "fresh_cache", "node"]

pytestmark = pytest.mark.newest

BRIEF = {"iterations": 2, "learning_rate": 0.02}
METHODS = pytest.mark.parametrize("method", ["guided sampling", "optimise"])


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return FAMILY.build()


def latent_of(*args, **kwargs):
    return {"samples": random_latent(*args, **kwargs)}


# --- of different sizes -----------------------------------------------------------------------------------------------------


def test_references_of_several_inputs_are_those_of_a_batch(node, model):
    both = random_latent(11, 2)
    batch, _ = run(node, model, reference=both, **BRIEF)
    apart, report = run(node, model, reference=both[:1], reference_3={"samples": both[1:]}, **BRIEF)
    assert torch.equal(batch, apart) and report["references"] == 2


@METHODS
def test_references_of_different_sizes_are_not_cropped(node, model, method):
    """Each counts with all of its pixels: with no weight for the others, it gives what it gives alone."""
    small, wide = random_latent(11, size=(8, 8)), random_latent(12, size=(16, 24))
    settings = {"method": method, "reference_2": {"samples": wide}, **BRIEF}
    together, report = run(node, model, reference=small, **settings)
    second, _ = run(node, model, reference=small, reference_weights="0, 1", **settings)
    alone, _ = run(node, model, reference=wide, method=method, **BRIEF)
    first, _ = run(node, model, reference=small, method=method, **BRIEF)
    assert report["references"] == 2 and torch.equal(second, alone)
    assert min(float((together - other).abs().mean()) for other in (alone, first)) > 1e-3


def test_masks_go_with_references_of_different_sizes(node, model):
    """The white of one and nothing of the other: what the first gives through its mask alone."""
    small, wide = random_latent(11, size=(8, 8)), random_latent(12, size=(16, 24))
    half = torch.zeros(1, 32, 32)
    half[:, :16] = 1
    masks = torch.cat([half, torch.zeros(1, 32, 32)])
    found, _ = run(node, model, reference=small, reference_2={"samples": wide}, reference_mask=masks, adain="off", **BRIEF)
    alone, _ = run(node, model, reference=small, reference_mask=half, adain="off", **BRIEF)
    assert (found - alone).abs().mean() < 1e-4 * alone.std()


def test_a_further_reference_may_be_an_image(node):
    model, clip, vae = evaluate.load()
    null = evaluate.encode(clip, [""])
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3))
    latent = torch.zeros(1, vae.latent_channels, 16, 16)
    with torch.inference_mode():
        encoded = vae.encode(image)

        def distilled(**references):
            return node(
                Noise(), guider_of(model, 1.0, null, null), comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 1.0]),
                {"samples": latent}, {"samples": torch.ones_like(latent)}, null, iterations=1, **references,
            ).args[0]["samples"]  # fmt: skip

        assert torch.equal(distilled(reference_2=image, vae=vae), distilled(reference_2={"samples": encoded}))
        with pytest.raises(ValueError, match="reference_2 is connected, but vae is not"):
            distilled(reference_2=image)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.zeros(1, 16, *SIZE), r"reference_2 is a latent of shape \(1, 16, 16, 16\)"),
        (torch.zeros(1, 4, 1, 1), "reference_2 is a single latent pixel"),
        (torch.full((1, 4, *SIZE), float("nan")), "reference_2 holds values that are no numbers"),
    ],
)
def test_the_wrong_reference_is_named(node, model, monkeypatch, reference, message):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *_, **__: pytest.fail("sampling has begun"))
    with pytest.raises(ValueError, match=message):
        run(node, model, reference_2={"samples": reference}, **BRIEF)


# --- one for each image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "case"),
    [("guided sampling", case) for case in ("", "masks", "inpaint", "windows", "other sizes")]
    + [("optimise", case) for case in ("", "masks", "other sizes")],
)
def test_an_image_with_a_reference_of_its_own_is_that_of_its_own_run(node, model, method, case):
    size = (16, 24) if case == "windows" else SIZE
    noise, latents = random_latent(2, 2, size) / 5, random_latent(31, 2, size) * (case == "inpaint")
    own = [random_latent(11), random_latent(12, size=(8, 24) if case == "other sizes" else SIZE)]
    masks = {"reference_mask": torch.rand(2, 1, 4, generator=torch.Generator().manual_seed(1)).round().repeat(1, 4, 1)}
    masks["reference_mask"][:, :, 0], masks["reference_mask"][:, :, 1] = 0, 1
    masks["target_mask"] = masks["reference_mask"].flip(0)

    def of(images: slice, **settings):
        latent = {"samples": latents[images]}
        if case == "inpaint":
            latent["noise_mask"] = (torch.arange(SIZE[1]) % 6 < 4).float().expand(1, 1, *SIZE)
        if case == "masks":
            settings |= {name: mask[images] for name, mask in masks.items()}
        if case == "windows":
            settings |= {"window": 128, "window_stride": 64}
        return run(node, model, latent=latent, noise=GivenNoise(noise[images]), method=method, **settings, **BRIEF)

    references = {"reference": own[0], "reference_2": {"samples": own[1]}}
    together, report = of(slice(0, 2), reference_per_image=True, **references)
    assert report["reference_per_image"] and report["references"] == 2
    for place, reference in enumerate(own):
        alone, _ = of(slice(place, place + 1), reference=reference)
        assert (together[place] - alone[0]).abs().mean() < 2e-3 * alone.std()
    mixed, _ = of(slice(0, 2), **references)
    assert (together - mixed).abs().mean() > 1e-2 * mixed.std()


def test_one_reference_is_for_all_images(node, model):
    settings = {"latent": torch.zeros(2, 4, *SIZE), **BRIEF}
    on, report = run(node, model, reference_per_image=True, **settings)
    off, _ = run(node, model, **settings)
    assert torch.equal(on, off) and not report["reference_per_image"]


@pytest.mark.parametrize(
    ("references", "settings", "message"),
    [
        (2, {}, "reference_per_image is on, and there are 2 references for the 3 images of latent_image"),
        (3, {"reference_weights": "1, 1, 2"}, "reference_weights is '1, 1, 2', but with reference_per_image"),
    ],
)
def test_references_that_do_not_go_with_the_images_are_named(node, model, monkeypatch, references, settings, message):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *_, **__: pytest.fail("sampling has begun"))
    with pytest.raises(ValueError, match=message):
        run(
            node, model, latent=torch.zeros(3, 4, *SIZE), reference=random_latent(11, references), reference_per_image=True,
            **settings, **BRIEF,
        )  # fmt: skip
