"""The style distance of ``python dev eval distill``: what it sees, what it does not see, and what the evaluation is made of."""

from __future__ import annotations

import random

import pytest
import torch
from scenes import detect, draw, evaluate, evaluate_distill
from scenes.style import distance, style

pytestmark = pytest.mark.newest


def ground(colour: str, pattern: str | None, shift: tuple[float, float] = (0.0, 0.0), size: int = 256) -> torch.Tensor:
    scene = draw.Scene((), colour, pattern, None, shift, "")
    return draw.render([scene], size)[0][0].movedim(0, -1)


def apart(one: torch.Tensor, other: torch.Tensor):
    return distance(style(one), style(other))


def test_equal_images_have_no_distance_and_order_does_not_matter():
    one, other = ground("navy", "striped"), ground("brown", "dotted")
    assert apart(one, one).total == 0
    assert apart(one, other) == apart(other, one)


@pytest.mark.parametrize("pattern", draw.PATTERNS)
def test_a_image_that_is_moved_keeps_its_style(pattern):
    """Up to what comes in at the border."""
    one = ground("navy", pattern)
    moved, rolled = ground("navy", pattern, (2.7, 5.3)), one.roll((40, -56), (0, 1))
    assert apart(one, moved).total < 0.05
    assert apart(one, rolled).colours < 1e-3 and apart(one, rolled).total < 0.05
    assert apart(one, ground("navy", None)).total > 0.2


@pytest.mark.parametrize("pattern", draw.PATTERNS)
def test_other_colours_are_a_distance_of_colours(pattern):
    found = [apart(ground("navy", pattern), ground(colour, pattern)) for colour in ("brown", "gray", "black")]
    assert all(one.colours > 0.05 for one in found)
    assert all(one.texture < 0.03 for one in found)


def test_another_pattern_is_a_distance_of_texture():
    patterns = [ground("navy", pattern) for pattern in draw.PATTERNS]
    for i, one in enumerate(patterns):
        for other in patterns[:i]:
            assert apart(one, other).texture > 0.04
    assert apart(patterns[0], patterns[0].flip(0)).texture > 0.04, "stripes the other way"


def test_the_distance_grows_with_the_change():
    one, other = ground("navy", None), ground("navy", "dotted")
    found = [apart(one, one.lerp(other, share)).total for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == sorted(found) and found[0] == 0
    colours = [apart(one, (one + shift).clamp(0, 1)).colours for shift in (0.05, 0.1, 0.2)]
    assert colours == sorted(colours)


def test_images_may_differ_in_size():
    assert apart(ground("navy", "striped"), ground("navy", "striped", size=128)).total < 0.02
    wide = torch.cat([ground("navy", "dotted")] * 2, dim=1)
    assert apart(ground("navy", "dotted"), wide).total < 0.03


def test_a_drawing_in_the_style_is_nearer_than_one_in_another():
    references = evaluate_distill.draw_references(len(evaluate_distill.GROUPS))
    assert [reference.group for reference in references] == list(evaluate_distill.GROUPS)
    for number, reference in enumerate(references):
        near = apart(reference.image, evaluate_distill.another_in_the_style(reference, number)).total
        far = [apart(reference.image, other.image).total for other in references if other is not reference]
        assert near < sum(far) / len(far)


def test_contents_are_scenes_that_the_detector_knows():
    images, prompts = evaluate_distill.draw_contents(6)
    assert all(finding.right for image in evaluate.score(images, prompts) for finding in image)


def test_an_object_that_fills_the_image_has_no_shape():
    found = detect.find(torch.tensor(draw.COLOURS["red"]).expand(256, 256, 3), "red", "circle")
    assert found.present and not found.right


@pytest.fixture(scope="module")
def setup():
    return evaluate_distill.Setup(*evaluate.load(), steps=2, transfer_steps=2)


def test_injected_keys_and_values_are_the_references(setup):
    """An image that is its own reference, with the same noise, is not changed by them."""
    reference = evaluate_distill.draw_reference("striped", random.Random(1))
    latent = setup.encoded(reference.image[None])["samples"]
    null = evaluate.encode(setup.clip, [""])
    with torch.inference_mode():
        injection = evaluate_distill.KeyValueInjection(setup.model, latent, null[0][0], setup.layers())
        sigmas = setup.run(setup.model, [""], 0, 4)["sigmas"][:2]

        def first_step(model, noise, positive):
            guider = evaluate.sampling_node("CFGGuider", model=model, positive=positive, negative=null, cfg=1.0)
            sampler = evaluate.sampling_node("KSamplerSelect", sampler_name="euler")
            return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)

        prompt = evaluate.encode(setup.clip, ["a red circle"])
        own = first_step(setup.model, injection.noise, null)
        torch.testing.assert_close(first_step(injection.model, injection.noise, null), own, rtol=1e-3, atol=1e-3)
        assert (first_step(injection.model, -injection.noise, prompt) - first_step(setup.model, -injection.noise, prompt)).any()
    assert set(injection.stored) == {("output", 0), ("output", 2)}


ONE_OF_EACH_KIND = {
    "style": ("K/V injection", "AdaIN alone", "distilled, quick, end_at 0.8"),
    "transfer": ("optimised, every second step at 0.1", "guided from content, denoise 0.5"),
}


def test_both_parts_measure_their_rows(setup, capsys):
    for part, first in (("style", "plain"), ("transfer", "content as it is")):
        rows = ONE_OF_EACH_KIND[part]
        assert set(rows) < set(evaluate_distill.ROWS[part])
        report, images = evaluate_distill.PARTS[part](setup, 2, rows)
        assert set(rows) < set(report) and report[first]["share of first row"]["value"] == 1
        for row in report.values():
            assert row["distance"]["low"] <= row["distance"]["value"] <= row["distance"]["high"]
            assert len(row["pictures"]) == 2
        shown = 2 + len(rows) + (part == "style")  # the reference, the first row and, of styles, a drawing
        assert images.shape == (2 * shown, 256, 256, 3)
    assert report["content as it is"]["objects right"]["share"] == 1
    assert "distilled, quick, end_at 0.8" in capsys.readouterr().out


@pytest.mark.parametrize("row", [*evaluate_distill.DISTILLED, *evaluate_distill.TRANSFERRED])
def test_rows_are_settings_of_the_node(node_classes, row):
    known = {entry.id for entry in node_classes["AttentionDistillSampler"].GET_SCHEMA().inputs}
    assert {**evaluate_distill.DISTILLED, **evaluate_distill.TRANSFERRED}[row].keys() <= known
