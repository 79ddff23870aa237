"""Seamless Tiling: the model and the decoder no longer know where the image ends."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from distill_runs import FAMILY, Shifted, distill, features, fresh_cache, plain, run
from families import FAMILIES
from host_inprocess import host_node
from scenes import evaluate
from tiny_unet import sample

__all__ = ["distill", "features", "fresh_cache"]

SIZE = (32, 16)
SHIFTS = (8, -8)  # whole cells of the smallest feature map
SAME = 1e-4


@pytest.fixture(scope="module")
def node(node_classes):
    return node_classes["AttentionDistillSampler"].execute


@pytest.fixture(scope="module")
def seamless(node_classes):
    return lambda model: node_classes["FoveaSeamless"].execute(model)[0]


@pytest.fixture
def model():
    with torch.inference_mode():
        return FAMILY.build()


def difference(image: torch.Tensor, shifted: torch.Tensor) -> float:
    """How far ``shifted`` is from the shifted ``image``, in parts of its spread."""
    return float((image.roll(SHIFTS, (-2, -1)) - shifted).abs().mean() / image.std())


def padding_modes(model) -> set[str]:
    return {module.padding_mode for module in model.model.modules() if isinstance(module, torch.nn.Conv2d)}


def test_shifted_noise_gives_the_shifted_image(model, seamless):
    latent = torch.zeros(1, 4, *SIZE)
    joined = seamless(model)
    assert difference(plain(joined, latent=latent), plain(joined, latent=latent, noise=Shifted(SHIFTS))) < SAME
    assert difference(plain(model, latent=latent), plain(model, latent=latent, noise=Shifted(SHIFTS))) > 10 * SAME


def test_t_gate_and_capture_work_on_it(model, seamless, node_classes):
    """In both orders: what they keep of one step goes round the edges as the model does."""
    latent = torch.zeros(1, 4, *SIZE)
    gate = {"gate_at": 0.5, "sp_interval": 2}
    for build in (
        lambda: node_classes["TGateCache"].execute(seamless(model), **gate)[0],
        lambda: seamless(node_classes["TGateCache"].execute(model, **gate)[0]),
        lambda: node_classes["AttnMapCapture"].execute(seamless(model))[0],
    ):
        of = build()
        images = [plain(of, latent=latent, steps=4, noise=Shifted(shifts)) for shifts in ((0, 0), SHIFTS)]
        assert difference(*images) < SAME


@pytest.mark.newest
def test_subjects_are_guided_on_it(model, seamless, node_classes):
    joined = seamless(model)
    guider, _ = node_classes["AttendExciteGuider"].execute(joined, FAMILY.conds(1), FAMILY.conds(2), subjects="2, 5")
    guided = plain(joined, latent=torch.zeros(1, 4, *SIZE), guider=guider, steps=4)
    assert guided.isfinite().all() and not torch.allclose(guided, plain(joined, latent=torch.zeros(1, 4, *SIZE), steps=4))


def test_distilled_images_are_seamless_too(node, model, seamless):
    """The gradient goes round the edges as well."""
    settings = {"latent": {"samples": torch.zeros(1, 4, *SIZE)}, "iterations": 1, "learning_rate": 0.02, "steps": 2}
    joined = seamless(model)

    def changes(of):
        return difference(*(run(node, of, noise=Shifted(shifts), **settings)[0] for shifts in ((0, 0), SHIFTS)))

    assert changes(joined) < 1e-3 < changes(model)


def test_references_seen_by_a_seamless_model_are_kept_for_it_alone(node, model, seamless):
    settings = {"iterations": 1, "adain": "off"}
    reports = [run(node, each, **settings)[1] for each in (model, seamless(model), seamless(model), model)]
    assert [report["reference_features"]["computed"] for report in reports] == [2, 2, 0, 0]


def test_the_model_that_came_in_is_as_it_was(model, seamless):
    before = sample(model, FAMILY.conds(1), FAMILY.conds(2), steps=2)
    joined = seamless(model)
    sample(joined, FAMILY.conds(1), FAMILY.conds(2), steps=2)
    assert "circular" in padding_modes(model)  # loaded as ComfyUI loads any patched model
    assert torch.equal(sample(model, FAMILY.conds(1), FAMILY.conds(2), steps=2), before)
    assert padding_modes(model) == {"zeros"}
    sample(joined, FAMILY.conds(1), FAMILY.conds(2), steps=1)
    comfy.model_management.unload_all_models()
    assert padding_modes(model) == {"zeros"}


def test_twice_is_once(model, seamless):
    once, twice = seamless(model), seamless(seamless(model))
    conds = FAMILY.conds(1), FAMILY.conds(2)
    assert torch.equal(sample(once, *conds, steps=2), sample(twice, *conds, steps=2))


@pytest.mark.parametrize(("method", "has_seam"), [("bicubic", True), ("bislerp", False), ("area", False)])
def test_a_scaling_that_takes_edges_for_ends_is_said(model, seamless, caplog, method, has_seam):
    shrink = host_node("PatchModelAddDownscale", "comfy_extras.nodes_model_downscale")
    latent = torch.zeros(1, 4, 32, 16)

    def shrunk(of):
        return shrink(of, 1, 2.0, 0.0, 1.0, True, method, method)[0]

    for joined in (shrunk(seamless(model)), seamless(shrunk(model))):
        caplog.clear()
        images = [plain(joined, latent=latent, noise=Shifted(shifts)) for shifts in ((0, 0), SHIFTS)]
        assert (difference(*images) > 10 * SAME) == has_seam
        assert any(f"Deep Shrink scales by '{method}'" in text for text in caplog.messages) == has_seam
    caplog.clear()
    plain(shrunk(model), latent=latent)
    assert "Deep Shrink" not in caplog.text


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_transformers_are_refused(name, seamless):
    with pytest.raises(ValueError, match="Seamless Tiling works with U-Nets: SD1.5, SD2 and SDXL"):
        seamless(FAMILIES[name].build())


@pytest.fixture(scope="module")
def vae():
    return evaluate.load()[2]


@pytest.mark.newest
def test_a_decoded_image_has_no_edges(node_classes, vae):
    """Shifting the latent shifts the image. (The decoder's norms are over the whole, so what repeats changes nothing.)"""
    decode = node_classes["FoveaSeamlessDecode"].execute
    channels = vae.latent_channels
    latent = torch.randn(2, channels, 24, 16, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        image, shifted = (decode({"samples": each}, vae)[0] for each in (latent, latent.roll((5, -3), (-2, -1))))
        usual, usual_shifted = (
            host_node("VAEDecode")(vae=vae, samples={"samples": each})[0] for each in (latent, latent.roll((5, -3), (-2, -1)))
        )
    assert image.shape == usual.shape == (2, 192, 128, 3)
    found = (image.roll((40, -24), (1, 2)) - shifted).abs().mean()
    assert found < 0.1 * (usual.roll((40, -24), (1, 2)) - usual_shifted).abs().mean()


def test_a_latent_smaller_than_the_decoder_sees_is_decoded(node_classes, vae):
    with torch.inference_mode():
        image = node_classes["FoveaSeamlessDecode"].execute({"samples": torch.zeros(1, vae.latent_channels, 4, 8)}, vae)[0]
    assert image.shape == (1, 32, 64, 3) and image.isfinite().all()


def test_a_video_is_refused(node_classes, vae):
    with pytest.raises(ValueError, match="a video has no repetitions"):
        node_classes["FoveaSeamlessDecode"].execute({"samples": torch.zeros(1, 4, 3, 8, 8)}, vae)


@pytest.mark.newest
def test_the_demo_model_makes_tiles(node_classes, seamless, vae):
    """Across the edges of a sampled image neighbours differ no more than within it."""
    model, clip, vae = evaluate.load()
    prompt = evaluate.encode(clip, ["a striped navy background"])
    null = evaluate.encode(clip, [""])

    def steps_across(of, decode) -> float:
        latent = torch.zeros(1, vae.latent_channels, 32, 32)
        samples = sample(of, prompt, null, steps=8, cfg=4, latent_image=latent)
        with torch.inference_mode():
            image = decode({"samples": samples}, vae)[0]
        rows = (image - image.roll(1, 1)).abs().mean((2, 3))[0]
        columns = (image - image.roll(1, 2)).abs().mean((1, 3))[0]
        return float((rows[0] / rows[1:].mean() + columns[0] / columns[1:].mean()) / 2)

    joined = steps_across(seamless(model), node_classes["FoveaSeamlessDecode"].execute)
    apart = steps_across(model, lambda samples, vae: host_node("VAEDecode")(vae=vae, samples=samples))
    assert joined < 1.5 < apart, (joined, apart)
