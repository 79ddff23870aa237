"""The embedded model: what it is trained on, how it is judged, and that the real host loads and runs it."""

from __future__ import annotations

import random

import pytest
import torch
from host_inprocess import host_node
from scenes import detect, draw, evaluate

pytestmark = pytest.mark.newest

WANTED = 210  # objects


@pytest.fixture(scope="module")
def drawn() -> list[tuple[torch.Tensor, draw.Scene]]:
    """Plain scenes of one to three objects, small and large images in turn: [H, W, 3] and the scene."""
    rng = random.Random(11)
    scenes = [draw.sample(rng, objects=1 + i % 3, style=None) for i in range(WANTED // 2)]
    return [(draw.render([scene], (32, 256)[i % 2])[0][0].movedim(0, -1), scene) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def loaded():
    """MODEL, CLIP, VAE of the shipped file through ComfyUI's own loader."""
    return evaluate.load()


def other(names, name: str) -> str:
    names = list(names)
    return names[(names.index(name) + 1) % len(names)]


def test_detector_finds_every_drawn_object(drawn):
    found = [(detect.find(image, item.colour, item.shape), item) for image, scene in drawn for item in scene.items]
    assert len(found) >= 200
    assert [item for finding, item in found if not finding.right] == []
    for finding, item in found:
        left, top, right, bottom = (edge * draw.WORLD for edge in finding.box)
        assert left - 1 <= item.x <= right + 1 and top - 1 <= item.y <= bottom + 1


def test_detector_refuses_wrong_shape(drawn):
    for image, scene in drawn[::3]:
        for item in scene.items:
            finding = detect.find(image, item.colour, other(draw.SHAPES, item.shape))
            assert finding.present and not finding.right and finding.shape == item.shape


def test_detector_refuses_colours_and_objects_that_are_not_there(drawn):
    for image, scene in drawn[::3]:
        missing = next(c for c in draw.COLOURS if c not in {item.colour for item in scene.items})
        for item in scene.items:
            assert not detect.find(image, missing, item.shape).present
    ground, _ = draw.render([draw.Scene((), "navy", "dotted", None, (0.0, 0.0), "")], 256)
    assert not any(detect.find(ground[0].movedim(0, -1), colour, "circle").present for colour in draw.COLOURS)


def test_detector_mask_is_the_object(drawn):
    for image, scene in drawn[::5]:
        _, masks = draw.render([scene], 32)
        for slot, item in enumerate(scene.items):
            found, truth = detect.find(image, item.colour, item.shape).mask, masks[0, slot] > 0.5
            assert (found & truth).sum() / (found | truth).sum() > 0.6


def test_drawing_is_deterministic_and_styles_are_drawn():
    def batch() -> tuple[torch.Tensor, list[str]]:
        rng = random.Random(5)
        scenes = [draw.sample(rng) for _ in range(200)]
        return draw.render(scenes)[0], [scene.caption for scene in scenes]

    (images, captions), (again, same) = batch(), batch()
    assert torch.equal(images, again) and captions == same
    assert images.shape == (200, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    for style in draw.STYLES:
        assert 4 <= sum(f"in {style} style" in caption for caption in captions) <= 30


def test_large_and_small_drawings_agree_and_windows_are_parts_of_the_whole():
    rng = random.Random(6)
    scenes = [draw.sample(rng) for _ in range(24)]
    small, large = draw.render(scenes, 32)[0], draw.render(scenes, 256)[0]
    assert (torch.nn.functional.avg_pool2d(large, 8) - small).abs().mean() < 0.01
    window = draw.render(scenes, 128, corner=torch.tensor([[8.0, 4.0]]).expand(24, 2), extent=16.0)[0]
    assert torch.allclose(window, large[:, :, 32:160, 64:192], atol=1e-4)


def test_words_are_single_tokens_and_captions_tokenise_as_the_host_does():
    from comfy import sd1_clip
    from scenes import network

    tokens = network.CaptionTokens()
    assert {word: len(ids) for word, ids in tokens.by_word.items() if len(ids) != 1} == {"checkered": 2}
    host, rng = sd1_clip.SD1Tokenizer(), random.Random(3)
    for _ in range(60):
        caption = draw.sample(rng).caption
        assert [pair[0] for pair in host.tokenize_with_weights(caption)["l"][0]] == tokens([caption])[0].tolist()


def test_prompt_positions_name_their_words():
    from comfy import sd1_clip

    for prompt in evaluate.prompts(5, 3):
        ids = [pair[0] for pair in sd1_clip.SD1Tokenizer().tokenize_with_weights(prompt.text)["l"][0]]
        for i, item in enumerate(prompt.items):
            for kind, word in zip(("colour", "shape"), item, strict=True):
                token = sd1_clip.SD1Tokenizer().tokenize_with_weights(word)["l"][0][1][0]
                assert ids[prompt.token(i, kind)] == token


def test_training_text_encoder_equals_the_hosts(loaded):
    from safetensors.torch import load_file
    from scenes import network
    from scenes.network import layout

    weights = load_file(evaluate.CHECKPOINT)
    vocabulary = weights[layout.VOCABULARY_IDS].tolist()
    text = network.TextEncoder(vocabulary)
    state = {k.removeprefix(layout.TEXT_PREFIX): v.float() for k, v in weights.items() if k.startswith(layout.TEXT_PREFIX)}
    text.load_words({**state, "embeddings.token_embedding.weight": weights[layout.VOCABULARY_ROWS].float()}, vocabulary)
    caption = "a red circle and a blue square in neon style"
    with torch.no_grad():
        ours = text(network.CaptionTokens()([caption]))
    assert torch.allclose(ours, evaluate.encode(loaded[1], [caption])[0][0].float(), atol=2e-2)


def test_shipped_file_is_small_and_half_precision():
    from safetensors import safe_open

    assert evaluate.CHECKPOINT.stat().st_size <= 25_000_000
    with safe_open(evaluate.CHECKPOINT, "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a dict
    assert kinds == {torch.float16, torch.int32}


def test_encoder_is_the_exact_area_average(loaded):
    pixels = torch.rand(2, 256, 256, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latent = host_node("VAEEncode")(vae=loaded[2], pixels=pixels)[0]["samples"]
    expected = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8) * 2 - 1
    assert latent.shape == (2, 3, 32, 32)
    assert (latent.float().cpu() - expected).abs().max() < 1e-3


def test_decoder_gives_back_drawn_images(loaded):
    rng = random.Random(8)
    pictures = draw.render([draw.sample(rng, style=None) for _ in range(4)], 256)[0].movedim(1, -1)
    with torch.inference_mode():
        latent = host_node("VAEEncode")(vae=loaded[2], pixels=pictures)[0]
        decoded = host_node("VAEDecode")(vae=loaded[2], samples=latent)[0]
    assert decoded.shape == pictures.shape
    assert (decoded.float().cpu() - pictures).abs().mean() < 0.02


def test_host_nodes_make_a_image_that_does_not_depend_on_the_batch(loaded):
    chosen = evaluate.prompts(2)
    together = evaluate.generate(*loaded, chosen, steps=3, batch=2)
    alone = evaluate.generate(*loaded, chosen, steps=3, batch=1)
    assert together.shape == (2, 256, 256, 3)
    assert (together - alone).abs().max() < 1e-2


def test_interval_of_a_share():
    low, high = evaluate.wilson(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-3) and high == pytest.approx(0.9448, abs=1e-3)
