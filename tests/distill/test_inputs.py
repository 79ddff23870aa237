"""What is connected to Attention Distillation in the forms in which other nodes give it, and what is refused by name."""

from __future__ import annotations

import argparse
import io
from contextlib import nullcontext

import comfy.samplers
import numpy
import pytest
import tiny_dit
import torch
from distill_runs import FAMILY, NULL, SIZE, GivenNoise, Noise, distill, features, fresh_cache, guider_of, random_latent, run
from families import FAMILIES
from PIL import Image, ImageDraw, ImageFilter
from scenes import evaluate

__all__ = ["distill", "features", "fresh_cache"]

BRIEF = {"iterations": 1, "learning_rate": 0.02, "steps": 1}


@pytest.fixture(scope="module")
def node(node_classes):
    return node_classes["AttentionDistillSampler"].execute


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return FAMILY.build()


@pytest.fixture
def no_sampling(monkeypatch):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", lambda *_, **__: pytest.fail("sampled"))


def halves() -> torch.Tensor:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    return mask


# --- masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda m: m[0], lambda m: m[None], lambda m: m[..., None]])
def test_masks_of_every_form_give_one_image(node, model, form):
    settings = {"method": "optimise", **BRIEF}
    expected, _ = run(node, model, reference_mask=halves(), target_mask=halves().flip(2), **settings)
    found, _ = run(node, model, reference_mask=form(halves()), target_mask=form(halves().flip(2)), **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 2, 3, 8, 8), r"reference_mask has the shape \(1, 2, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), r"reference_mask has the shape \(1, 3, 8, 8\)"),
        (torch.zeros(1, 0, 8), "reference_mask has the shape"),
        (torch.full((1, 8, 8), float("nan")), "reference_mask holds values that are no numbers"),
        (torch.eye(64)[None], "reference_mask marks so little of the reference"),
    ],
)
def test_masks_that_cannot_be_are_named(node, model, no_sampling, mask, message):
    if "little" in message:
        mask = mask * (torch.arange(64) == 5)
    with pytest.raises(ValueError, match=message):
        run(node, model, reference_mask=mask, **BRIEF)


def drawn(size: int) -> Image.Image:
    """A disc in white and a strip in grey."""
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    draw.ellipse([size // 4, size // 8, 3 * size // 4, 5 * size // 8], fill=255)
    draw.rectangle([size // 8, 3 * size // 4, 3 * size // 4, 7 * size // 8], fill=128)
    return mask


def as_jpeg(mask: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    mask.save(file, "JPEG", quality=quality)
    return Image.open(file)


def as_mask(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.asarray(image.convert("L")).astype("float32") / 255)[None]


SOFT = {
    "JPEG 90": (256, lambda mask: as_jpeg(mask, 90), 0.001),
    "JPEG 20": (256, lambda mask: as_jpeg(mask, 20), 0.01),
    "scaled down": (1024, lambda mask: mask.resize((256, 256), Image.Resampling.LANCZOS), 0.01),
    "scaled down to little": (256, lambda mask: mask.resize((64, 64), Image.Resampling.LANCZOS), 0.03),
    "blurred": (256, lambda mask: mask.filter(ImageFilter.GaussianBlur(4)), 0.06),
}


@pytest.mark.newest
@pytest.mark.parametrize("way", SOFT)
def test_stray_greys_go_to_the_regions_they_came_from(pack, way):
    from fovea_attention.attention.distill.masks import matching_labels

    size, soften, wrong = SOFT[way]
    mask = drawn(size)
    soft = soften(mask)
    hard = as_mask(mask.resize(soft.size, Image.Resampling.NEAREST))
    for reference, target in ((hard, as_mask(soft)), (as_mask(soft), hard)):
        labels = matching_labels(reference, target)
        assert set(labels.target.unique().tolist()) == set(labels.reference.unique().tolist()) == {0, 128, 255}
        assert (labels.target != labels.reference).float().mean() < wrong
        assert any("soft edges or compression" in note for note in labels.notes)


@pytest.mark.newest
def test_flat_greys_stay_as_they_are(pack):
    """Also numbers of regions, which are neighbouring greys, thin lines, and greys that only one mask has."""
    from fovea_attention.attention.distill.masks import labels_of, matching_labels

    numbers = (torch.arange(64) // 8).expand(1, 64, 64) / 255
    line = torch.zeros(1, 64, 64)
    line[:, 5, :] = 200 / 255
    line[:, 6:40] = 1
    area = torch.where(torch.arange(64) < 32, 200 / 255, 1.0).expand(1, 64, 64)
    for reference, target in ((numbers, numbers), (area, line), (halves(), 0.5 * halves() + 0.5 * halves().transpose(1, 2))):
        labels = matching_labels(reference, target)
        assert torch.equal(labels.reference, labels_of(reference)) and torch.equal(labels.target, labels_of(target))
        assert labels.notes == []
    moved = matching_labels(halves(), halves() * 0.99)
    assert moved.target.unique().tolist() == [0, 255] and "grey 252 of target_mask was taken for 255" in moved.notes[0]


@pytest.mark.newest
@pytest.mark.parametrize("steps", [64, 256, 1024])
def test_gradients_are_no_regions(pack, steps):
    from fovea_attention.attention.distill.masks import matching_labels

    with pytest.raises(ValueError, match="different grey values"):
        matching_labels(halves(), torch.linspace(0, 1, steps).expand(1, steps, steps))


def test_what_was_done_to_a_mask_is_said(node, model, caplog):
    caplog.set_level("INFO", logger="fovea")
    soft = torch.nn.functional.avg_pool2d(halves(), 5, 1, 2)
    _, report = run(node, model, method="optimise", reference_mask=halves(), target_mask=soft, **BRIEF)
    assert "of target_mask lay between its greys [0, 255]" in report["notes"][0]
    assert caplog.messages[-1].endswith(report["notes"][0])


# --- what of the references counts ------------------------------------------------------------------------------------------


def two_patterns() -> torch.Tensor:
    return torch.cat([random_latent(11, size=(16, 8)), random_latent(12, size=(16, 8)) * 2 + 5], dim=-1)


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_a_reference_mask_alone_leaves_the_rest_out(node, model, features, method):
    """What lies outside it in the colours and in the keys and values changes nothing."""
    settings = {"method": method, "adain": "on", "reference_mask": halves(), **BRIEF}
    base = model.model
    found, _ = run(node, model, reference=two_patterns(), **settings)
    free, _ = run(node, model, reference=two_patterns(), **{**settings, "reference_mask": torch.ones(1, 8, 8)})
    unmasked, _ = run(node, model, reference=two_patterns(), **{**settings, "reference_mask": None})
    assert (free - unmasked).abs().mean() < 1e-3 * unmasked.abs().mean()
    assert (found - unmasked).abs().mean() > 0.05 * unmasked.abs().mean()
    if method == "optimise":  # the colours are those of the white part before the first step of Adam
        inside = base.process_latent_in(two_patterns())[..., 8:]
        means = found.mean((0, 2, 3)) - inside.mean((0, 2, 3))
        assert means.abs().max() < 0.05 * inside.std()


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_weights_of_references(node, model, method):
    both = random_latent(11, 2)
    settings = {"method": method, "adain": "on", **BRIEF}
    alike, _ = run(node, model, reference=both, **settings)
    first, _ = run(node, model, reference=both[:1], **settings)

    def weighted(text: str) -> torch.Tensor:
        return run(node, model, reference=both, reference_weights=text, **settings)[0]

    assert torch.equal(weighted(" 2,2 "), alike)
    assert torch.equal(weighted("1, 0"), first)
    assert (weighted("1, 1e-7") - first).abs().mean() < 1e-3 * first.abs().mean()
    between = weighted("1, 0.3")
    assert (between - first).abs().mean() > 0.005 and (between - alike).abs().mean() > 0.005


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "has 1 numbers and there are 2 references"),
        ("1, x", "reference_weights is '1, x'"),
        ("1, -1", "reference_weights is '1, -1'"),
        ("0, 0", "reference_weights is '0, 0'"),
        ("1, nan", "reference_weights is '1, nan'"),
    ],
)
def test_weights_that_cannot_be_are_named(node, model, no_sampling, text, message):
    with pytest.raises(ValueError, match=message):
        run(node, model, reference=random_latent(11, 2), reference_weights=text)


# --- latents and prompts ----------------------------------------------------------------------------------------------------


def test_latents_of_one_frame_are_images(node, model):
    content = random_latent(21)
    expected, _ = run(node, model, content={"samples": content}, **BRIEF)
    found, _ = run(
        node, model, latent=torch.zeros(1, 4, 1, *SIZE), reference=random_latent(11)[:, :, None],
        content={"samples": content[:, :, None]}, **BRIEF,
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
@pytest.mark.parametrize("size", [(1, 64), (3, 3)])
def test_small_and_long_references_give_numbers(node, model, method, size):
    result, _ = run(node, model, reference=random_latent(11, size=size), method=method, adain="on", **BRIEF)
    assert result.isfinite().all()


def test_a_flat_reference_gives_its_colour(node, model):
    flat = torch.tensor([1.0, -2, 3, 0.5])[None, :, None, None].expand(1, 4, *SIZE)
    result, _ = run(node, model, reference=flat, adain="on", method="optimise", **BRIEF)
    assert (result - model.model.process_latent_in(flat)).abs().max() < 0.05


def test_a_reference_of_one_latent_pixel_is_named(node, model, no_sampling):
    with pytest.raises(ValueError, match=r"reference is a single latent pixel \(8 x 8 pixels of an image\)"):
        run(node, model, reference=random_latent(11, size=(1, 1)))
    with pytest.raises(ValueError, match="reference is a latent of shape .* which holds nothing"):
        run(node, model, reference=torch.zeros(0, 4, *SIZE))


def test_a_reference_of_which_the_model_leaves_nothing_is_named(node, model):
    """The tiny network's norms have a single value there; those of real ones have ten."""
    with pytest.raises(ValueError, match="reference 1 is 2 x 2 latent pixels, which is too small for this model"):
        run(node, model, reference=random_latent(11, size=(2, 2)), **BRIEF)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_null_prompt_of_another_encoder_is_named(node, no_sampling, name):
    family = FAMILIES[name]
    model = family.build()
    right = family.conds(7)
    wrong = [[torch.zeros(1, 7, right[0][0].shape[-1] + 8), dict(right[0][1])]]
    guider = guider_of(model, 1.0, family.conds(1), family.conds(2))
    with torch.inference_mode(), pytest.raises(ValueError, match="null_prompt has .* encoded with the CLIP of another model"):
        node(
            Noise(), guider, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), {"samples": family.latent()},
            {"samples": family.latent()}, wrong,
        )  # fmt: skip


TEXT = [[torch.zeros(1, 77, 768), {}]]


@pytest.mark.parametrize(
    ("has_null", "null", "message"),
    [
        (True, TEXT, "null_prompt is a text, .* second output, null class, to null_prompt"),
        (False, TEXT, "null_prompt is a text, .* without a null class. Connect DiT Class Label's first output"),
        (False, tiny_dit.labels(-1), "null_prompt is no class, .* without a null class. Connect DiT Class Label's first output"),
        (True, tiny_dit.labels(-1), ""),
        (False, tiny_dit.labels(3), ""),
    ],
)
def test_a_null_prompt_that_is_none_for_a_dit_is_named(node, tmp_path, node_classes, has_null, null, message):
    from fovea_attention.attention.dit import load_dit

    network = tiny_dit.tiny(classes=10, null_class=has_null)
    file = tiny_dit.write(tmp_path / "DiT.pt", {"model": tiny_dit.bare(network), "args": argparse.Namespace(num_classes=10)})
    latent = {"samples": torch.randn(1, 4, 8, 8)}
    with torch.inference_mode(), pytest.raises(ValueError, match=message) if message else nullcontext():
        node(
            Noise(), guider_of(load_dit(file), 1.0, tiny_dit.labels(3), tiny_dit.labels(3)),
            comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), latent, latent, null, iterations=1,
        )  # fmt: skip


def test_a_pooled_prompt_of_another_encoder_is_named(node, no_sampling):
    family = FAMILIES["flux"]
    model = family.build()
    (text, options), *_ = family.conds(7)
    wrong = [[text, {**options, "pooled_output": torch.zeros(1, options["pooled_output"].shape[-1] + 8)}]]
    guider = guider_of(model, 1.0, family.conds(1), family.conds(2))
    with torch.inference_mode(), pytest.raises(ValueError, match="null_prompt has .* values for the whole prompt"):
        node(
            Noise(), guider, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), {"samples": family.latent()},
            {"samples": family.latent()}, wrong,
        )  # fmt: skip


def test_a_reference_as_an_image_is_encoded_with_the_vae(node, no_sampling, monkeypatch):
    """And takes the place of the latent, whatever that was encoded with."""
    model, clip, vae = evaluate.load()
    monkeypatch.undo()
    null = evaluate.encode(clip, [""])
    image = torch.rand(1, 128, 192, 3, generator=torch.Generator().manual_seed(3))
    latent = torch.zeros(1, vae.latent_channels, 16, 16)
    with torch.inference_mode():
        encoded = vae.encode(image)

        def distilled(reference, **settings):
            guider = guider_of(model, 1.0, null, null)
            return node(
                Noise(), guider, comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 1.0]), {"samples": latent},
                {"samples": reference}, null, iterations=1, **settings,
            ).args[0]["samples"]  # fmt: skip

        expected = distilled(encoded)
        found = distilled(torch.randn_like(latent), reference_image=image, vae=vae)
        assert torch.equal(found, expected)
        for settings, missing in (({"vae": vae}, "reference_image"), ({"reference_image": image}, "vae")):
            with pytest.raises(ValueError, match=f"is connected, but {missing} is not"):
                distilled(latent, **settings)


GREY = torch.rand(1, 64, 64, 1, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("image", [GREY, torch.cat([GREY, GREY * 0 + 1], dim=-1)], ids=["grey", "grey and alpha"])
def test_grey_images_are_encoded(node, node_classes, image):
    model, clip, vae = evaluate.load()
    null = evaluate.encode(clip, [""])
    latent = {"samples": torch.zeros(1, vae.latent_channels, 16, 16)}

    def encoded(image):
        return node_classes["FoveaSeamlessEncode"].execute(image, vae)[0]["samples"]

    def distilled(image):
        return node(
            Noise(), guider_of(model, 1.0, null, null), comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 1.0]),
            latent, latent, null, iterations=1, reference_image=image, vae=vae,
        ).args[0]["samples"]  # fmt: skip

    with torch.inference_mode():
        for make in (encoded, distilled):
            assert torch.equal(make(image), make(GREY.repeat(1, 1, 1, 3)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 7, 64, 3), "is 64 x 7 pixels, which is less than one latent pixel .* Use a larger image"),
        (torch.full((1, 64, 64, 3), float("nan")), "holds values that are no numbers"),
        (GREY.repeat(1, 1, 1, 3) * 255, "holds values up to 25.*, not colours from 0 to 1. Divide the image by 255"),
        ((GREY * 255).to(torch.uint8), "holds whole numbers .* Divide the image by 255"),
        (GREY[0], "is an image of shape"),
    ],
)
def test_images_that_cannot_be_encoded_are_named(node, node_classes, no_sampling, image, message):
    model, clip, vae = evaluate.load()
    null = evaluate.encode(clip, [""])
    latent = {"samples": torch.zeros(1, vae.latent_channels, 16, 16)}
    with torch.inference_mode():
        with pytest.raises(ValueError, match=f"pixels {message}"):
            node_classes["FoveaSeamlessEncode"].execute(image, vae)
        with pytest.raises(ValueError, match=f"reference_image {message}"):
            node(
                Noise(), guider_of(model, 1.0, null, null), comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 1.0]),
                latent, latent, null, reference_image=image, vae=vae,
            )  # fmt: skip


def test_a_vae_of_another_model_is_named(node, no_sampling):
    _, _, vae = evaluate.load()
    family = FAMILIES["flux"]
    guider = guider_of(family.build(), 1.0, family.conds(1), family.conds(2))
    with torch.inference_mode(), pytest.raises(ValueError, match="vae gives latents of shape"):
        node(
            Noise(), guider, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), {"samples": family.latent()},
            {"samples": family.latent()}, family.conds(7), reference_image=torch.zeros(1, 64, 64, 3), vae=vae,
        )  # fmt: skip


# --- batches and costs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_an_image_of_a_batch_with_content_is_that_of_its_own_run(node, model, method):
    noise, content = random_latent(2, 2) / 5, random_latent(3, 2)
    settings = {"method": method, **BRIEF}
    both, _ = run(node, model, latent=content, content={"samples": content}, noise=GivenNoise(noise), **settings)
    for image in (slice(0, 1), slice(1, 2)):
        alone, _ = run(
            node, model, latent=content[image], content={"samples": content[image]}, noise=GivenNoise(noise[image]), **settings
        )
        assert (both[image] - alone).abs().mean() < 1e-3 * alone.std()


def test_a_large_reference_and_many_windows_are_announced_before_sampling(node, model, caplog, monkeypatch):
    caplog.set_level("INFO", logger="fovea")
    said = []
    sample = comfy.samplers.CFGGuider.sample
    monkeypatch.setattr(
        comfy.samplers.CFGGuider, "sample", lambda *args, **kwargs: said.extend(caplog.messages) or sample(*args, **kwargs)
    )
    _, report = run(node, model, reference=random_latent(11, size=(32, 40)), **BRIEF)
    assert said == [
        "Attention Distillation: the reference is large, 40 x 32 latent pixels, 5 times as many as the model sees of the image "
        "at once (16 x 16). Every step takes several times as long as with a reference of the image's size: scale it down before "
        "VAE Encode."
    ]
    assert report["notes"] == [said[0].removeprefix("Attention Distillation: ").removesuffix(".")]
    said.clear(), caplog.clear()
    run(node, model, latent=torch.zeros(1, 4, 16, 32), window=128, window_stride=64, **BRIEF)
    assert said == [
        "Attention Distillation: 3 windows, so this run has 1 steps of 3 model calls for each prompt and 1 times 3 gradient "
        "passes; a larger window_stride (64) needs fewer."
    ]


def test_the_bar_moves_inside_an_iteration(node, model, monkeypatch, pack):
    from fovea_attention.attention import host

    places = []
    monkeypatch.setattr(host.Progress, "show", lambda self, place: places.append(place))
    run(node, model, latent=torch.zeros(1, 4, 16, 32), window=128, window_stride=64, **{**BRIEF, "iterations": 2})
    assert places == pytest.approx([1, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3])


def test_features_of_a_model_that_is_gone_are_gone(node, features):
    """After "Unload Models and Execution Cache" nothing of them is left in memory."""
    import gc

    with torch.inference_mode():
        model = FAMILY.build()
    run(node, model, null_prompt=NULL, **BRIEF)
    assert features.CACHE.bytes > 0
    del model
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    assert features.CACHE.bytes == 0
