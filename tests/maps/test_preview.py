"""`AttnMapPreview` on real runs of the embedded model: every view, its masks and figures, and what it says to bad input."""

from __future__ import annotations

import base64
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import folder_paths
import host_inprocess
import pytest
import torch

pytestmark = pytest.mark.newest

CHECKPOINT = host_inprocess.ROOT / "dev" / "scenes" / "fovea-scenes.safetensors"
VIEWS = ["overlay", "steps", "layers", "self-attention", "convergence", "segments"]
WORD_VIEWS = [view for view in VIEWS if view != "self-attention"]
STEPS = 6


@pytest.fixture(scope="module")
def nodes_of_pack(pack: Any) -> Any:
    """The node classes, from their own files."""

    class Nodes:
        prompt = importlib.import_module("fovea_attention.nodes.prompt").FoveaPrompt
        capture = importlib.import_module("fovea_attention.nodes.attn_capture").AttnMapCapture
        preview = importlib.import_module("fovea_attention.nodes.attn_preview").AttnMapPreview

    return Nodes


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, Any]:
    """The embedded model, its text encoder and its decoder."""
    host_inprocess.register_demo_model()
    return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=True, output_clip=True)[:3]


@pytest.fixture(scope="module")
def sampled(nodes_of_pack: Any, loaded: tuple[Any, Any, Any]) -> Any:
    """Runs the embedded model under capture; returns the maps and the decoded images."""
    model, clip, vae = loaded

    def run(
        text: str = "a [red circle] and a [blue square]", negative: str = "a green ring", *, width: int = 256, height: int = 256,
        batch: int = 1, steps: int = STEPS, cfg: float = 5.0, plain: bool = False, **settings: Any,
    ) -> tuple[Any, torch.Tensor]:  # fmt: skip
        watched, maps = nodes_of_pack.capture.execute(model, **settings).args
        shape = vae.encode(torch.zeros(1, height, width, 3)).shape
        start = torch.zeros(batch, *shape[1:])
        conds = []
        for written in (text, negative):
            if plain:
                conds.append(clip.encode_from_tokens_scheduled(clip.tokenize(written)))
            else:
                conds.append(nodes_of_pack.prompt.execute(clip, written).args[0])
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(start, 7)
            latent = comfy.sample.sample(
                watched, noise, steps, cfg, "euler", "normal", *conds, start, seed=7, disable_pbar=True
            )  # fmt: skip
            return maps, vae.decode(latent)

    return run


@pytest.fixture(scope="module")
def run(sampled: Any) -> tuple[Any, torch.Tensor]:
    """One image with two subjects, and everything captured."""
    return sampled(self_attention=True)


@pytest.fixture
def preview(nodes_of_pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node, on a host with a temp folder of its own."""
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    return nodes_of_pack.preview.execute


def report_of(output: Any) -> dict[str, Any]:
    return json.loads(output.args[2])


def words_of(output: Any, image: int = 0) -> list[str]:
    return [word["word"] for word in report_of(output)["pictures"][image]["words"]]


# --- every view -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", WORD_VIEWS)
def test_every_view_of_words(preview: Any, run: Any, view: str) -> None:
    maps, images = run
    output = preview(maps, images, view=view)
    shown, masks, _, strengths, areas = output.args
    assert shown.ndim == 4 and shown.shape[3] == 3 and shown.dtype == torch.float32
    assert shown.min() >= 0 and shown.max() <= 1 and shown.std() > 0.05
    assert len(shown) == {"overlay": 2, "steps": 2}.get(view, 1)
    assert masks.shape == (2, 256, 256)
    assert masks.amax((1, 2)) == pytest.approx([1, 1], abs=0.02) and masks.amin((1, 2)) == pytest.approx([0, 0], abs=0.02)
    assert ((masks > 0.05) & (masks < 0.95)).float().mean() > 0.1, "soft"
    assert words_of(output) == ["red circle", "blue square"]
    assert len(output.ui["images"]) == len(shown)
    words = report_of(output)["pictures"][0]["words"]
    assert strengths == [word["mass"] for word in words] and areas == [word["area"] for word in words]


def test_words_look_at_what_they_name(preview: Any, run: Any) -> None:
    """The maps are those of the image: where a word looks most, the image has its colour."""
    maps, images = run
    output = preview(maps, images)
    for mask, figures, channel in zip(output.args[1], report_of(output)["pictures"][0]["words"], (0, 2), strict=True):
        looked = images[0][mask > 0.7].mean(0)
        elsewhere = images[0][mask < 0.3].mean(0)
        contrast = [float(color[channel] - color.mean()) for color in (looked, elsewhere)]
        assert contrast[0] > contrast[1]
        peak = figures["peak"]
        assert mask[int(peak["y"] * 256), int(peak["x"] * 256)] > 0.7
        assert 0 < figures["lowest"] < figures["mean"] < peak["value"] <= 1
        assert figures["area"] == pytest.approx(float((mask >= 0.4).float().mean()), abs=0.06)
        assert 0 < figures["entropy"] < 1
        assert figures["mass"] >= figures["mean"], "the tokens of a phrase together get more than their mean"
        assert figures["steps"]["step"] == list(range(1, STEPS + 1))
        assert figures["steps"]["change"][0] is None and all(change > 0 for change in figures["steps"]["change"][1:])


def test_self_attention_from_a_place(preview: Any, run: Any) -> None:
    maps, images = run
    first = preview(maps, images, view="self-attention", query_x=0.1, query_y=0.1)
    second = preview(maps, images, view="self-attention", query_x=0.9, query_y=0.9)
    assert first.args[0].shape == second.args[0].shape and len(first.args[0]) == 1
    assert first.args[1].shape == (1, 256, 256)
    assert not torch.allclose(first.args[1], second.args[1], atol=0.05)
    assert report_of(first)["pictures"][0]["query"] == {"x": 0.1, "y": 0.1}


def test_the_negative_prompt_has_maps_of_its_own(preview: Any, run: Any) -> None:
    maps, images = run
    output = preview(maps, images, prompt="negative")
    assert words_of(output) == ["a", "green", "ring"], "it has no subjects, so every word is shown"


def test_words_are_chosen_in_the_order_they_are_asked_for(preview: Any, run: Any) -> None:
    maps, images = run
    output = preview(maps, images, words=" square, Red Circle ,a#2,square")
    assert words_of(output) == ["square", "Red Circle", "a#2"]
    alone = preview(maps, images, words="square")
    assert torch.equal(output.args[1][0], alone.args[1][0])
    assert report_of(preview(maps, images, words="a"))["pictures"][0]["words"][0]["tokens"] == [1, 5], "every occurrence"


def test_the_mean_over_occurrences_is_daams(preview: Any, run: Any) -> None:
    maps, images = run
    expected = maps.heat(positions=[1, 5]).mean(0) / STEPS
    figures = report_of(preview(maps, images, words="a"))["pictures"][0]["words"][0]
    assert figures["peak"]["value"] == pytest.approx(float(expected.max()), rel=1e-3)
    assert figures["mean"] == pytest.approx(float(expected.mean()), rel=1e-3)


def test_normalize_of_masks(preview: Any, run: Any) -> None:
    maps, images = run
    each, together, none = (
        preview(maps, images, words="red, and", normalize=name).args[1] for name in ("each word", "all words", "none")
    )
    assert each.amax((1, 2)) == pytest.approx([1, 1], abs=0.02)
    assert together.max() == pytest.approx(1, abs=0.02) and together.amax((1, 2)).min() < 0.99
    heats = maps.heat() / STEPS
    assert none.max() == pytest.approx(float(torch.stack([heats[2], heats[4]]).max()), abs=0.02)
    assert torch.equal(together.amax((1, 2)).argmax(), none.amax((1, 2)).argmax())


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("view", ["overlay", "segments"])
def test_thresholds_at_their_ends(preview: Any, run: Any, view: str, threshold: float) -> None:
    maps, images = run
    output = preview(maps, images, view=view, threshold=threshold)
    areas = [word["area"] for word in report_of(output)["pictures"][0]["words"]]
    assert areas == [1.0, 1.0] if threshold == 0 else all(0 < area < 0.02 for area in areas)
    plain = preview(maps, images, view=view)
    assert torch.equal(output.args[1], plain.args[1]), "masks stay soft"


@pytest.mark.parametrize("colormap", ["turbo", "viridis", "jet", "gray"])
def test_colormaps_change_the_image_only(preview: Any, run: Any, colormap: str) -> None:
    maps, images = run
    output = preview(maps, images, words="red", colormap=colormap, opacity=1.0)
    heat = output.args[0][0][:512, :512]
    gray = float((heat[..., 0] - heat[..., 1]).abs().mean()) < 0.02
    assert gray == (colormap == "gray")


def test_opacity_zero_shows_the_image(preview: Any, run: Any) -> None:
    maps, images = run
    shown = preview(maps, images, words="red", opacity=0.0).args[0][0][:512, :512]
    small = torch.nn.functional.interpolate(shown.permute(2, 0, 1)[None], (256, 256), mode="area")[0].permute(1, 2, 0)
    assert (small - images[0]).abs().mean() < 0.02


# --- batches, shapes, steps, heads --------------------------------------------------------------------------------------


def test_batches_pair_each_image_with_its_own_maps(preview: Any, sampled: Any) -> None:
    maps, images = sampled(width=384, batch=2)
    for view in WORD_VIEWS:
        output = preview(maps, images, view=view)
        assert output.args[1].shape == (4, 256, 384), "image by image, in the order of the words"
        assert len(report_of(output)["pictures"]) == 2
    both = preview(maps, images)
    assert len(both.args[0]) == 4
    swapped = preview(maps, images.flip(0))
    assert torch.equal(both.args[1], swapped.args[1].roll(2, 0)), "maps follow the images"
    assert not torch.allclose(both.args[1][0], both.args[1][2], atol=0.1)


def test_one_captured_image_serves_any_number(preview: Any, run: Any) -> None:
    maps, images = run
    masks = preview(maps, images.repeat(3, 1, 1, 1)).args[1]
    assert masks.shape[0] == 6 and torch.equal(masks[:2], masks[4:])


def test_other_sizes_of_the_same_shape_fit(preview: Any, run: Any) -> None:
    maps, _ = run
    for side in (8, 100, 1000):
        output = preview(maps, torch.rand(1, side, side, 3), words="red")
        assert output.args[1].shape == (1, side, side)
        assert output.args[0].shape[2] == max(side, 512)


def test_images_with_alpha_are_shown(preview: Any, run: Any) -> None:
    maps, images = run
    shown = preview(maps, torch.cat([images, torch.ones_like(images[..., :1])], -1)).args[0]
    assert torch.equal(shown, preview(maps, images).args[0])


def test_heads_side_by_side(preview: Any, sampled: Any) -> None:
    maps, images = sampled(per_head=True)
    heads = maps.heads(maps.layers[0])
    assert heads > 1
    plain = preview(*sampled(), view="layers").args[0]
    shown = preview(maps, images, view="layers").args[0]
    assert len(shown) == 2 and len(plain) == 1, "a table for each word"


def test_one_step(preview: Any, sampled: Any) -> None:
    maps, images = sampled(steps=1, self_attention=True)
    for view in VIEWS:
        assert preview(maps, images, view=view).args[0].std() > 0.02
    assert report_of(preview(maps, images))["pictures"][0]["words"][0]["steps"]["change"] == [None]


def test_the_gate_of_t_gate_is_marked(run: Any, pack: Any) -> None:
    views = importlib.import_module("fovea_attention.attention.maps.views")
    maps, _ = run
    request = importlib.import_module("fovea_attention.attention.maps.request").Request(default_gate=lambda steps: 2)
    assert views._gate(maps, request) == views.Marker(2.5, "T-GATE gate (default)")
    maps.meta["tgate_gate"] = 4
    try:
        assert views._gate(maps, request) == views.Marker(4.5, "T-GATE gate")
    finally:
        del maps.meta["tgate_gate"]


def test_a_prompt_of_300_words(preview: Any, sampled: Any) -> None:
    text = " ".join(["red circle and blue square on"] * 50)
    maps, images = sampled(text, steps=2)
    output = preview(maps, images)
    assert words_of(output) == ["red", "circle", "and", "blue", "square", "on"]
    assert len(report_of(preview(maps, images, words="circle"))["pictures"][0]["words"][0]["tokens"]) == 50
    assert len(preview(maps, images, words="circle#50").args[1]) == 1


# --- prompts that FoveaPrompt did not encode ----------------------------------------------------------------------------


def test_plain_prompts_need_their_encoder_and_text(preview: Any, sampled: Any, loaded: Any) -> None:
    text = "a white ring in pastel style"  # which no other test encodes: a prompt that was marked once is known again
    maps, images = sampled(text, plain=True)
    with pytest.raises(ValueError, match="Prompt with Subjects.*clip"):
        preview(maps, images)
    clip = loaded[1]
    with pytest.raises(ValueError, match="'text' is empty"):
        preview(maps, images, clip=clip)
    output = preview(maps, images, clip=clip, text=text)
    assert words_of(output) == text.split()
    marked, pictures = sampled(text)
    assert torch.allclose(output.args[1], preview(marked, pictures).args[1])


def test_a_text_that_is_too_long_for_the_sampled_prompt(preview: Any, sampled: Any, loaded: Any) -> None:
    maps, images = sampled("a red circle", plain=True, negative="")
    with pytest.raises(ValueError, match="Write the prompt exactly as it was sampled"):
        preview(maps, images, clip=loaded[1], text=" ".join(["circle"] * 120))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_maps_of_no_run(preview: Any, pack: Any) -> None:
    empty = importlib.import_module("fovea_attention.attention.maps").AttnMaps()
    for view in VIEWS:
        with pytest.raises(ValueError, match="no attention maps yet: no sampler has run"):
            preview(empty, torch.zeros(1, 64, 64, 3), view=view)


def test_a_word_that_is_not_there(preview: Any, run: Any) -> None:
    maps, images = run
    with pytest.raises(ValueError, match="words: 'dog' is not in the prompt.*red, circle, and, blue, square"):
        preview(maps, images, words="dog, cat")
    with pytest.raises(ValueError, match="occurrence 3"):
        preview(maps, images, words="a#3")


def test_an_empty_prompt(preview: Any, sampled: Any) -> None:
    maps, images = sampled(negative="")
    with pytest.raises(ValueError, match="has no words"):
        preview(maps, images, prompt="negative")


def test_a_prompt_that_was_not_computed(preview: Any, sampled: Any) -> None:
    maps, images = sampled(cfg=1.0)
    with pytest.raises(ValueError, match="No attention was recorded for the negative prompt"):
        preview(maps, images, prompt="negative")


def test_views_of_what_was_not_captured(preview: Any, sampled: Any) -> None:
    maps, images = sampled(per_step=False)
    with pytest.raises(ValueError, match="Switch on 'per_step'"):
        preview(maps, images, view="steps")
    with pytest.raises(ValueError, match="Switch on 'self_attention'"):
        preview(maps, images, view="self-attention")
    assert preview(maps, images, view="convergence").args[0].std() > 0.05


def test_images_that_do_not_fit(preview: Any, sampled: Any) -> None:
    maps, images = sampled(batch=3)
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"images has {count} images, but 3 were sampled"):
            preview(maps, images[:1].repeat(count, 1, 1, 1))
    for shape in ((3, 256, 128, 3), (3, 100, 256, 3)):
        with pytest.raises(ValueError, match=f"images is {shape[2]} x {shape[1]}"):
            preview(maps, torch.zeros(*shape))


@pytest.mark.parametrize("name", ["threshold", "opacity", "query_x", "query_y"])
def test_values_out_of_range(preview: Any, run: Any, name: str) -> None:
    maps, images = run
    for value in (-0.01, 1.01):
        with pytest.raises(ValueError, match=f"{name} is {value:g}"):
            preview(maps, images, **{name: value})


@pytest.mark.parametrize("view", VIEWS)
def test_an_interrupt_while_it_is_drawn_leaves_nothing(
    preview: Any, run: Any, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled at the last of its pauses: no file, and the next preview is as if it had not been."""
    maps, images = run
    pauses = 0

    def count() -> None:
        nonlocal pauses
        pauses += 1

    def cancel() -> None:
        nonlocal pauses
        pauses -= 1
        if not pauses:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    with monkeypatch.context() as patch:
        patch.setattr("fovea_attention.attention.host.progress.check_interrupted", count)
        expected = preview(maps, images, view=view)
    assert pauses > (view != "self-attention")  # there is a pause at each image, in other views at each word too
    shutil.rmtree(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(comfy.model_management.InterruptProcessingException):
        patch.setattr("fovea_attention.attention.host.progress.check_interrupted", cancel)
        preview(maps, images, view=view)
    assert pauses == 0 and not tmp_path.exists()
    again = preview(maps, images, view=view)
    assert torch.equal(again.args[0], expected.args[0]) and torch.equal(again.args[1], expected.args[1])
    assert again.args[2] == expected.args[2]


# --- for the front end --------------------------------------------------------------------------------------------------


def pointing_of(output: Any) -> dict[str, Any]:
    (file,) = output.ui["fovea_words"]
    assert file["type"] == "temp" and not file["subfolder"]
    return json.loads(Path(folder_paths.get_temp_directory(), file["filename"]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("view", ["overlay", "steps", "layers", "segments", "self-attention"])
def test_every_image_can_be_pointed_at(preview: Any, run: Any, view: str) -> None:
    """The file says which words look at a place, whatever words the view shows."""
    maps, images = run
    output = preview(maps, images, view=view)
    content = pointing_of(output)
    assert content["words"] == ["a", "red", "circle", "and", "blue", "square"]
    columns, rows = content["grid"]
    levels = torch.frombuffer(bytearray(base64.b64decode(content["maps"][0]["levels"])), dtype=torch.uint8)
    levels = levels.view(len(content["words"]), rows, columns).float() / 255
    shares = levels * torch.tensor(content["maps"][0]["highest"])[:, None, None]
    assert torch.allclose(shares[1], maps.heat(positions=[2])[0] / STEPS, atol=2e-3)
    assert len(content["pictures"]) == len(output.args[0])
    for image, sheet in zip(content["pictures"], output.args[0], strict=True):
        assert image["map"] == 0 and image["panels"]
        for x, y, width, height in image["panels"]:
            assert x >= 0 and y >= 0 and x + width <= sheet.shape[1] and y + height <= sheet.shape[0]


def test_charts_cannot_be_pointed_at(preview: Any, run: Any) -> None:
    maps, images = run
    assert "fovea_words" not in preview(maps, images, view="convergence").ui


def test_images_of_unknown_prompts_cannot_be_pointed_at(preview: Any, sampled: Any) -> None:
    maps, images = sampled(plain=True, self_attention=True)
    assert "fovea_words" not in preview(maps, images, view="self-attention").ui


def test_the_file_stays_small(run: Any, pack: Any) -> None:
    pointing = importlib.import_module("fovea_attention.attention.maps.hover")
    assert pointing._grid((64, 64), 6) == (64, 64)
    assert pointing._grid((256, 128), 1) == (64, 32)
    height, width = pointing._grid((64, 64), 300 * 16)
    assert height * width * 300 * 16 <= 1_600_000 and height == width
