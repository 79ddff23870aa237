"""The ATTN_MAPS handle: aggregation, selection, and what it says when something is not there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

pytestmark = pytest.mark.newest

TOKENS, SIZE = 5, (6, 4)


@pytest.fixture
def api(pack):
    import fovea_attention.attention.maps as api

    return api


def make(api, *, heads_kept: bool = True, steps: bool = True, area=None, frames: int = 1, batch: int = 2):
    """A recording of two layers: 'input.1' fine with 2 heads, 'output.0' coarse with 4."""
    generator = torch.Generator().manual_seed(5)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    layers = {
        "input.1": api.LayerMaps(2, rand(batch, 2, TOKENS, frames, *SIZE)),
        "output.0": api.LayerMaps(4, rand(batch, 4 if heads_kept else 1, TOKENS, frames, 3, 2)),
    }
    figures = api.StepFigures(rand(3, batch, TOKENS), rand(3, batch, TOKENS), rand(3, batch, TOKENS))
    maps = api.PromptMaps(
        "positive", TOKENS, (frames, *SIZE), layers, steps=[0, 1, 3], figures=figures, area=area, rows=TOKENS,
        metadata={"text": "a cat"}, step_maps=rand(3, batch, TOKENS, frames, *SIZE).half() if steps else None,
        self_attention=[api.SelfAttention((frames, *SIZE), 6, rand(batch, frames * 24, frames * 24).softmax(-1))],
    )  # fmt: skip
    return api.AttnMaps(api.Recording([4.0, 3.0, 2.0, 1.0, 0.0], batch, (frames, *SIZE), [maps], ["a note"], {"family": "U-Net"}))


def daam(entries: list[torch.Tensor]) -> torch.Tensor:
    """DAAM's formula as trace.py states it: every head's map to one size, clamped, the mean over all of them."""
    merged = [interpolate(maps.flatten(0, 1)[:, None], size=SIZE, mode="bicubic").clamp_(min=0)[:, 0] for maps in entries]
    stacked = [maps.view(heads.shape[0], TOKENS, *SIZE) for maps, heads in zip(merged, entries, strict=True)]
    return torch.cat(stacked).mean(0)


def test_heat_is_daams_mean_over_heads_of_all_layers(api):
    maps = make(api)
    layers = maps.of().layers
    for batch in range(2):
        expected = daam([layers[name].maps[batch, :, :, 0] for name in ("input.1", "output.0")])
        torch.testing.assert_close(maps.heat(batch=batch), expected, atol=1e-6, rtol=0)
    coarse = daam([layers["output.0"].maps[0, :, :, 0]])
    torch.testing.assert_close(maps.heat(layers=["output.0"]), coarse, atol=1e-6, rtol=0)
    one_head = daam([layers["input.1"].maps[0, 1:2, :, 0], layers["output.0"].maps[0, 1:2, :, 0]])
    torch.testing.assert_close(maps.heat(heads=[1]), one_head, atol=1e-6, rtol=0)


def test_a_layer_with_averaged_heads_keeps_its_weight(api):
    maps = make(api, heads_kept=False)
    layers = maps.of().layers
    fine = daam([layers["input.1"].maps[0, :, :, 0]])
    coarse = daam([layers["output.0"].maps[0, :, :, 0]])
    torch.testing.assert_close(maps.heat(), (fine * 2 + coarse * 4) / 6, atol=1e-6, rtol=0)


def test_heat_selects_tokens_steps_frames_and_size(api):
    maps = make(api, frames=3)
    whole = maps.heat()
    assert whole.shape == (TOKENS, *SIZE)
    assert torch.equal(maps.heat(positions=[3, 0]), whole[[3, 0]])
    frames = torch.stack([maps.heat(frame=frame) for frame in range(3)])
    torch.testing.assert_close(frames.mean(0), whole)
    assert torch.equal(maps.heat(step=3), maps.of().step_maps[2, 0].float().mean(1))
    larger = maps.heat(size=(12, 8))
    torch.testing.assert_close(larger, interpolate(whole[None], size=(12, 8), mode="bicubic")[0].clamp(min=0))


def test_an_area_is_placed_on_the_image(api):
    maps = make(api, area=(0.5, 0.25, 0.5, 0.5))
    heat = maps.heat(size=(12, 8))
    assert heat.shape == (TOKENS, 12, 8)
    inside = torch.zeros(12, 8, dtype=torch.bool)
    inside[6:12, 2:6] = True
    assert bool((heat[:, inside] > 0).any()) and not bool(heat[:, ~inside].any())


def test_self_attention_answers_for_the_cell_under_the_point(api):
    maps = make(api)
    matrix = maps.of().self_attention[0].matrix
    row, column = 5, 1
    looked = maps.self_attention((column + 0.5) / SIZE[1], (row + 0.5) / SIZE[0], batch=1)
    torch.testing.assert_close(looked, matrix[1, row * SIZE[1] + column].view(SIZE))
    assert torch.equal(maps.self_attention(1.0, 1.0), maps.self_attention(0.99, 0.99))
    assert maps.self_attention(0.5, 0.5, size=(12, 8)).shape == (12, 8)


def test_convergence_of_a_word_is_the_relative_change_of_its_tokens_together(api):
    maps = make(api)
    figures = maps.of().figures
    steps, change, mass = maps.convergence([[1, 2], [4]], batch=1)
    assert steps == [0, 1, 3] and change.shape == mass.shape == (2, 3)
    expected = math.sqrt(figures.change[2, 1, 1:3].sum() / figures.norm[2, 1, 1:3].sum())
    assert change[0, 2].item() == pytest.approx(expected, rel=1e-5)
    assert mass[1, 0].item() == pytest.approx(figures.mass[0, 1, 4].item())


def test_an_empty_handle_says_what_to_do(api):
    handle = api.AttnMaps()
    for use in (handle.require, handle.heat, lambda: handle.layers, handle.state_dict):
        with pytest.raises(ValueError, match="Connect that model to the sampler"):
            use()


def test_a_handle_survives_copies_and_takes_over_the_last_run(api):
    handle = api.AttnMaps()
    assert copy.deepcopy({"options": [handle]})["options"][0] is handle
    first, second = make(api).require(), make(api, batch=1).require()
    handle.fill(first)
    assert handle.require() is first
    handle.fill(second)
    assert handle.require() is second


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda maps: maps.heat(prompt="negative"), "negative prompt"),
        (lambda maps: maps.heat(batch=2), "no image 2"),
        (lambda maps: maps.heat(cond=1), "no entry 1"),
        (lambda maps: maps.heat(layers=["input.9"]), r"input\.9.*input\.1, output\.0"),
        (lambda maps: maps.heat(layers=[]), "nothing to show"),
        (lambda maps: maps.heat(positions=[TOKENS]), f"no token {TOKENS}"),
        (lambda maps: maps.heat(heads=[0]), "per_head"),
        (lambda maps: maps.heat(step=2), "Step 2 has no map; steps with one: 0, 1, 3"),
        (lambda maps: maps.heat(step=1, layers=["input.1"]), "name it in 'layers'"),
        (lambda maps: maps.heads("middle"), "middle"),
    ],
)
def test_what_is_not_there_is_named(api, use, message):
    with pytest.raises(ValueError, match=message):
        use(make(api, heads_kept=False))


def test_missing_detail_names_the_switch(api):
    maps = make(api, steps=False)
    assert not maps.has_steps
    with pytest.raises(ValueError, match="'per_step'"):
        maps.heat(step=0)
    maps.of().self_attention.clear()
    with pytest.raises(ValueError, match="'self_attention'"):
        maps.self_attention(0.5, 0.5)


def test_a_run_without_anything_recorded_says_why(api):
    maps = api.AttnMaps(api.Recording([1.0, 0.0], 0, (1, 1, 1), [], ["the model is compiled"]))
    with pytest.raises(ValueError, match="Nothing could be recorded in this run: the model is compiled"):
        maps.heat()


def test_save_and_load_keep_everything(api, tmp_path):
    maps = make(api, area=(0.0, 0.0, 0.5, 1.0))
    tensors, metadata = maps.state_dict()
    save_file(tensors, tmp_path / "maps.safetensors", metadata)
    with safe_open(tmp_path / "maps.safetensors", "pt") as file:
        loaded = api.AttnMaps.from_state_dict(load_file(tmp_path / "maps.safetensors"), file.metadata())
    assert torch.equal(loaded.heat(batch=1), maps.heat(batch=1))
    assert torch.equal(loaded.heat(step=3), maps.heat(step=3))
    assert torch.equal(loaded.self_attention(0.2, 0.7), maps.self_attention(0.2, 0.7))
    for before, after in zip(maps.convergence([[1]])[1:], loaded.convergence([[1]])[1:], strict=True):
        assert torch.equal(before, after)
    for name in ("steps", "sigmas", "batch", "grid", "frames", "layers", "prompts", "notes", "meta"):
        assert getattr(loaded, name) == getattr(maps, name)
    assert loaded.conditioning() == [{"text": "a cat"}] and loaded.of().area == maps.of().area
    assert loaded.state_dict()[1] == metadata


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, text: ({}, {"format": "pt"}), "holds no attention maps"),
        (lambda tensors, text: ({}, {"fovea.attn_maps": text}), "damaged"),
        (lambda tensors, text: (tensors, {"fovea.attn_maps": text[:-9]}), "damaged"),
        (lambda tensors, text: (tensors, {"fovea.attn_maps": text.replace('"version": 1', '"version": 99')}), "newer Fovea"),
        (lambda tensors, text: ({**tensors, "0.layer.1": torch.zeros(3, 2)}, {"fovea.attn_maps": text}), "damaged"),
        (lambda tensors, text: ({**tensors, "0.steps": tensors["0.steps"][:2]}, {"fovea.attn_maps": text}), "damaged.*shape"),
        (lambda tensors, text: (tensors, {"fovea.attn_maps": "[1, 2]"}), "damaged"),
    ],
    ids=["another file", "no tensors", "cut metadata", "newer version", "flat tensor", "short tensor", "another structure"],
)
def test_a_bad_file_is_refused(api, damage, message):
    tensors, metadata = make(api).state_dict()
    with pytest.raises(ValueError, match=message):
        api.AttnMaps.from_state_dict(*damage(tensors, metadata["fovea.attn_maps"]))


def test_layer_names(pack):
    from fovea_attention.attention.networks import list_layers, parse_layers

    names = ["input.1", "input.2", "input.4.0", "input.4.1", "middle", "output.3.0", "output.3.1", "output.4", "output.5"]
    assert parse_layers("", names) == names
    assert parse_layers("output.3-5, MIDDLE", names) == ["middle", "output.3.0", "output.3.1", "output.4", "output.5"]
    assert parse_layers("input.4", names) == ["input.4.0", "input.4.1"]
    assert parse_layers("output.3.0 - 1; input.1", names) == ["input.1", "output.3.0", "output.3.1"]
    assert parse_layers("input.1-4", names) == names[:4]
    assert parse_layers("output", names) == names[5:]
    assert list_layers(names) == "input.1-2, input.4.0-1, middle, output.3.0-1, output.4-5"
    for wrong in ("input.3", "output.3-9", "double.0", "4", "output.", "middle-2"):
        with pytest.raises(ValueError, match=rf"'{wrong}'.*Its layers: input\.1-2"):
            parse_layers(wrong, names)
