"""Which words a preview shows: lists as people write them, words that are not there, tokens without spaces, padding."""

from __future__ import annotations

import importlib
import json
from typing import Any

import comfy.sample
import folder_paths
import pytest
import tiny_text
import torch
from scenes import evaluate

import nodes

pytestmark = pytest.mark.newest

PROMPT = "a [red circle] and a [blue square]"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, Any]:
    return evaluate.load()


@pytest.fixture(scope="module")
def run(node_classes: dict[str, type], loaded: Any) -> Any:
    """Samples a prompt under capture; returns maps and images."""
    model, clip, vae = loaded

    @torch.inference_mode()
    def sample(text: str = PROMPT, *, plain: bool = False, batch: int = 1, side: int = 64) -> tuple[Any, torch.Tensor]:
        watched, maps = node_classes["AttnMapCapture"].execute(model).args
        marked = node_classes["FoveaPrompt"].execute
        encode = (lambda clip, text: clip.encode_from_tokens_scheduled(clip.tokenize(text))) if plain else None
        conds = [encode(clip, each) if encode else marked(clip, each).args[0] for each in (text, "")]
        start = torch.zeros(batch, 3, side // 8, side // 8)
        noise = comfy.sample.prepare_noise(start, 1)
        latent = comfy.sample.sample(watched, noise, 2, 4.0, "euler", "normal", *conds, start, seed=1, disable_pbar=True)
        return maps, vae.decode(latent)

    return sample


@pytest.fixture(scope="module")
def sampled(run: Any) -> Any:
    return run()


@pytest.fixture
def preview(node_classes: dict[str, type], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    return node_classes["AttnMapPreview"].execute


def report_of(output: Any) -> dict[str, Any]:
    return json.loads(output.args[2], parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


@pytest.mark.parametrize(
    "words",
    ["(red circle:1.3), blue square", "((red circle)); blue square", "[red circle], [blue square]", "red circle\nblue square"],
)
def test_words_are_read_as_they_are_pasted(preview: Any, sampled: Any, words: str) -> None:
    assert torch.equal(preview(*sampled, words=words).args[1], preview(*sampled).args[1])


def test_a_word_of_another_wildcard_has_an_empty_mask_and_a_note(preview: Any, sampled: Any) -> None:
    output = preview(*sampled, words="red, dog, blue")
    masks, report = output.args[1], report_of(output)
    assert len(masks) == 3 and masks[1].max() == 0 and masks[0].max() > 0.9
    assert len(report["notes"]) == 1 and report["notes"][0].startswith("words: 'dog' is not in the prompt.")
    assert output.args[3][1] == output.args[4][1] == 0
    for view in ("steps", "layers", "convergence", "segments"):
        assert len(preview(*sampled, words="red, dog, blue", view=view).args[1]) == 3
    with pytest.raises(ValueError, match="words: 'dog' is not in the prompt"):
        preview(*sampled, words="dog, cat")


def test_words_are_joined_and_taken_away(preview: Any, sampled: Any) -> None:
    red, blue = preview(*sampled, words="red, blue").args[1]
    for view in ("overlay", "steps", "layers", "convergence", "segments"):
        both, without = preview(*sampled, words="red + blue, red - blue", view=view).args[1]
        assert torch.allclose(both, torch.maximum(red, blue), atol=0.35)
        assert float(both.mean()) > float(red.mean()) > float(without.mean())
    assert float(both[blue > 0.9].mean()) > 0.8 and float(without[blue > 0.9].mean()) < 0.2
    with_missing = preview(*sampled, words="red - dog")
    assert torch.equal(with_missing.args[1][0], red) and "'dog' is not in the prompt" in report_of(with_missing)["notes"][0]


def test_start_and_end_are_words(preview: Any, sampled: Any) -> None:
    words = report_of(preview(*sampled, words="<start>, <END>, red"))["pictures"][0]["words"]
    length = len("a red circle and a blue square".split())
    assert [word["tokens"] for word in words] == [[0], [length + 1], [2]]
    assert words[0]["mass"] > 0 and words[1]["mass"] > 0


def test_a_typed_prompt_is_compared_with_the_sampled_one(preview: Any, run: Any, loaded: Any) -> None:
    maps, images = run("a red circle and a blue square", plain=True)
    right = preview(maps, images, clip=loaded[1], text="a red circle and a blue square", words="red, blue")
    assert right.args[1].amax((1, 2)).min() > 0.9
    with pytest.raises(ValueError, match="'text' is not the prompt that was encoded"):
        preview(maps, images, clip=loaded[1], text="a blue circle and a red square", words="red, blue")
    restored = type(maps).from_state_dict(*maps.state_dict())
    assert torch.equal(
        preview(restored, images, clip=loaded[1], text="a red circle and a blue square", words="red, blue").args[1], right.args[1]
    )
    with pytest.raises(ValueError, match="'text' is not the prompt that was encoded"):
        preview(restored, images, clip=loaded[1], text="a blue circle and a red square", words="red, blue")


@pytest.mark.parametrize("name", ["qwen-image", "flux"])
def test_words_without_spaces_are_those_of_the_tokens(name: str, pack: Any) -> None:
    words = importlib.import_module("fovea_attention.attention.maps.words")
    prompts = importlib.import_module("fovea_attention.attention.prompts")
    family = next(key for key in tiny_text.FAMILIES if key.replace("_", "-") == name)
    tokens = prompts.tokenize(tiny_text.FAMILIES[family].build(), "一只红色的猫, sun-glasses, 有一只蓝色的狗 a cat and a cat")
    shown = words.every_word([prompts.PromptInfo(tokens)])
    assert len({tuple(word.places[0]) for word in shown}) == len(shown), "no two words have the same map"
    text = {token.position: token.text for token in tokens.tokens if token.kind == "text"}
    for word in shown:
        if not word.name.isascii():
            spelt = [text[at] for at in word.places[0]]
            assert len(set(spelt)) == 1 or len(word.name) == 1, "no word mixes the tokens of two"
    names = [word.name for word in shown]
    assert names.count("cat") == 1 and "sun-glasses" in names


# --- what is kept, and what is drawn --------------------------------------------------------------------------------------


def test_padding_has_no_maps_of_its_own(preview: Any, sampled: Any) -> None:
    maps, images = sampled
    kept = maps.of()
    assert kept.tokens == 77 and kept.kept is not None and len(kept.kept) < 12
    assert {layer.maps.shape[2] for layer in kept.layers.values()} == {len(kept.kept) + 1}
    whole = maps.heat()
    assert whole.shape[0] == 77 and whole.sum(0).mean() / 2 == pytest.approx(1, rel=1e-2), "nothing is lost"
    assert torch.equal(whole[2], maps.heat(positions=[2])[0])
    tensors, metadata = maps.state_dict()
    assert json.loads(metadata["fovea.attn_maps"])["version"] == 2
    restored = type(maps).from_state_dict(tensors, metadata)
    assert torch.equal(preview(restored, images).args[1], preview(maps, images).args[1])


def test_padding_is_told_from_metadata_or_from_rows_of_zeros(pack: Any) -> None:
    padding_of = importlib.import_module("fovea_attention.attention.maps.padding").padding_of
    rows = torch.randn(1, 512, 8)
    assert padding_of(None, rows) == frozenset()
    rows[:, 46:] = 0
    assert padding_of(None, rows) == frozenset(range(46, 512))
    assert padding_of(None, torch.zeros(1, 512, 8)) == frozenset(), "a zeroed conditioning is no padding"
    kinds = ["start", "text", "end", *["pad"] * 5]
    tokens = [[at, "", 0, 0, kind, "l"] for at, kind in enumerate(kinds)]
    known = {"tokens": tokens, "length": 8, "conditioning_length": 8}
    assert padding_of(known, torch.randn(1, 8, 4)) == frozenset(range(3, 8))
    assert padding_of(known, torch.randn(1, 16, 4)) == frozenset(range(3, 8)), "rows joined behind may be words"


def test_many_words_and_images_draw_what_can_be_looked_at(preview: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, images = run("red circle, blue square, green ring, white cross on a yellow triangle", batch=2)
    module = importlib.import_module("fovea_attention.attention.maps.preview")
    monkeypatch.setattr(module, "_MOST_FIGURES", 16)
    every = len({"red", "circle", "blue", "square", "green", "ring", "white", "cross", "on", "a", "yellow", "triangle"})
    most = 16 // 2
    output = preview(maps, images)
    assert len(output.args[0]) == len(output.args[1]) == most * 2 < every * 2
    assert report_of(output)["notes"] == [f"the first {most} of {every} words are shown; name others in 'words'"]
    asked = preview(maps, images, words="red, circle, blue, square, green, ring, white, cross, on")
    assert len(asked.args[0]) == most * 2 and len(asked.args[1]) == 9 * 2, "what is asked for has a mask"
    assert "the first 8 of 9 words are drawn; all have masks" in report_of(asked)["notes"]


def test_figures_have_flat_keys_and_gaps_are_null(preview: Any, run: Any) -> None:
    maps, images = run(batch=2)
    report = report_of(preview(maps, images))
    word = report["pictures"][1]["words"][1]
    assert report["blue square area 2"] == word["area"] and report["blue square strength 2"] == word["mass"]
    assert report["red circle peak x"] == report["pictures"][0]["words"][0]["peak"]["x"]
    for layer in maps.of().layers.values():
        layer.maps[0] = torch.nan
    maps.of().figures.mass[:, 0] = torch.nan
    broken = preview(maps, images)
    assert report_of(broken)["red circle strength"] is None and broken.args[3][0] == 0
    assert any("numbers that are not finite are null" in note for note in report_of(broken)["notes"])


def test_the_largest_part_of_a_mask(pack: Any) -> None:
    largest_part = importlib.import_module("fovea_attention.attention.maps.regions").largest_part
    heat = torch.zeros(32, 48)
    heat[2:6, 2:6] = 1
    heat[12:28, 20:40] = 0.5
    kept = largest_part(heat, 0.4, (128, 192))
    assert kept.shape == (128, 192) and kept[60:100, 90:150].min() == 1 and kept[:32, :40].max() == 0
    assert largest_part(heat, 0.7, (32, 48))[4, 4] == 1 and largest_part(heat, 0.7, (32, 48))[20, 30] == 0
    assert largest_part(torch.zeros(8, 8), 0.4, (16, 16)).max() == 0


def test_masks_are_cleaned_on_request(preview: Any, sampled: Any) -> None:
    masks, cleaned = (preview(*sampled, largest_part=largest).args[1] for largest in (False, True))
    assert (cleaned <= masks + 1e-6).all() and torch.equal(cleaned.amax((1, 2)), masks.amax((1, 2)))


def test_padding_of_a_video_prompt_costs_neither_steps_nor_half_of_the_grid(pack: Any) -> None:
    """Rows as Wan's encoder makes them: 46 of the words, zeros up to 512."""
    recorder = importlib.import_module("fovea_attention.attention.maps.recorder")
    module = importlib.import_module("fovea_attention.attention.maps")
    padding_of = importlib.import_module("fovea_attention.attention.maps.padding").padding_of
    sums = importlib.import_module("fovea_attention.attention.maps.sums")
    host = importlib.import_module("fovea_attention.attention.host")

    class Guider:
        conds: dict[str, list[Any]] = {"positive": [], "negative": []}

    rows = torch.randn(1, 512, 8)
    rows[:, 46:] = 0
    run = recorder.CaptureRun(
        module.CaptureSettings(max_memory_mb=16), host.StepClock.from_sigmas(torch.linspace(1, 0, 11)), Guider()
    )
    run.tracks |= {(name, 0): sums.Track(name, 512, None, None, padding_of(None, rows)) for name in Guider.conds}
    for step in range(2):
        run.step = step
        run.seen_steps.add(step)
        for track in run.tracks.values():
            stored = track.without_padding(torch.rand(1, 1, 512, 4)).shape[-2]
            for block in range(4):
                run.add_text(track, f"block.{block}", 12, torch.rand(1, 1, stored, 5, 30, 52))
            track.finish_step(step, run.memory.keeps_steps)
        run.memory.fit(lambda: run.memory.projected_bytes(run.clock.steps - len(run.seen_steps)))
    assert stored == 47 and run.memory.keeps_steps and not run.notes
    assert {track.finest for track in run.tracks.values()} == {(5, 15, 26)}


# --- prompts that another node has changed --------------------------------------------------------------------------------


def test_a_prompt_that_another_node_changed_is_noted_or_named(node_classes: dict[str, type], preview: Any, loaded: Any) -> None:
    model, clip, vae = loaded
    marked = node_classes["FoveaPrompt"].execute
    one, other, negative = (marked(clip, each).args[0] for each in ("a green star", PROMPT, ""))
    average = nodes.ConditioningAverage().addWeighted

    @torch.inference_mode()
    def maps_of(positive: Any) -> tuple[Any, torch.Tensor]:
        watched, maps = node_classes["AttnMapCapture"].execute(model).args
        start = torch.zeros(2, 3, 8, 8)
        noise = comfy.sample.prepare_noise(start, 1)
        latent = comfy.sample.sample(
            watched, noise, 2, 4.0, "euler", "normal", positive, negative, start, seed=1, disable_pbar=True
        )
        return maps, vae.decode(latent)

    for strength, noted in ((1.0, False), (0.5, True)):
        maps, images = maps_of(average(one, other, strength)[0])
        for each in (maps, type(maps).from_state_dict(*maps.state_dict())):
            notes = report_of(preview(each, images, words="green"))["notes"]
            assert any("'conditioning_to'" in note for note in notes) == noted
    each_image = [[torch.cat([one[0][0], other[0][0]]), one[0][1]]]
    for changed, said in ((average(one, other, 0.0)[0], "replaced the prompt"), (each_image, "different prompt for each image")):
        maps, images = maps_of(changed)
        for each in (maps, type(maps).from_state_dict(*maps.state_dict())):
            for typed in ({}, {"clip": clip, "text": "a green star"}):
                with pytest.raises(ValueError, match=f"words of the positive prompt cannot be read.*{said}") as refusal:
                    preview(each, images, words="green", **typed)
                assert "exactly as it was sampled" not in str(refusal.value)
