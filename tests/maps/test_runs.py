"""Maps belong to the run that made the image, whatever ComfyUI's caches and the order of nodes do."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from typing import Any

import comfy.sample
import folder_paths
import graph_runs
import pytest
import torch
from graph_runs import Graph, node
from scenes import evaluate

import nodes

pytestmark = pytest.mark.newest

PROMPT = "a [red circle] and a [blue square]"
SHOWN = {
    "words": "", "view": "segments", "prompt": "positive", "normalize": "each word", "threshold": 0.4, "opacity": 0.6,
    "colormap": "turbo", "query_x": 0.5, "query_y": 0.5,
}  # fmt: skip


@pytest.fixture
def comfy_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., Callable[[Graph, str], Any]]:
    """A fresh ComfyUI with the named cache."""
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    return lambda cache="CLASSIC": graph_runs.executor(monkeypatch, cache)


def sampler(seed: int, latent: Any, denoise: float = 1.0) -> dict[str, Any]:
    settings = {
        "steps": 2,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": ["2", 0],
        "negative": ["3", 0],
    }
    return node("KSampler", model=["4", 0], seed=seed, latent_image=latent, denoise=denoise, **settings)


def base(**capture: Any) -> Graph:
    settings = {"layers": "", "per_step": True, "per_head": False, "self_attention": False, "max_memory_mb": 512, **capture}
    return {
        "1": node("TestScenes"),
        "2": node("FoveaPrompt", clip=["1", 1], text=PROMPT),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("AttnMapCapture", model=["1", 0], **settings),
        "5": node("TestEmpty", side=128, batch=1),
    }


def shown(sampled: str, **inputs: Any) -> Graph:
    """Return decoder, preview and what keeps its outputs, for one sampler."""
    preview = node("AttnMapPreview", attn_maps=["4", 1], images=[f"d{sampled}", 0], **{**SHOWN, **inputs})
    return {
        f"d{sampled}": node("VAEDecode", samples=[sampled, 0], vae=["1", 2]),
        f"p{sampled}": preview,
        f"k{sampled}": node("TestKeep", key=sampled, mask=[f"p{sampled}", 1], text=[f"p{sampled}", 2], maps=["4", 1]),
    }


def colour(graph: Graph, preview: str) -> Graph:
    changed = copy.deepcopy(graph)
    changed[preview]["inputs"]["colormap"] = "gray"
    return changed


def test_each_image_has_the_maps_of_its_sampler(comfy_with: Any) -> None:
    """Two seeds of one size and a second pass of the first, whatever the order of the nodes, and after a change of colours."""
    one = {**base(), "6": sampler(1, ["5", 0]), **shown("6")}
    alone = comfy_with()(one)["6"]["mask"].clone()
    graph = {**one, "7": sampler(2, ["5", 0]), **shown("7"), "8": sampler(3, ["6", 0], 0.6), **shown("8")}
    wanted: dict[str, torch.Tensor] = {}
    for keys in (list(graph), list(reversed(graph))):
        run = comfy_with()
        found = run({key: graph[key] for key in keys})
        assert torch.equal(found["6"]["mask"], alone)
        masks = {key: found[key]["mask"].clone() for key in ("6", "7", "8")}
        assert len(found["6"]["maps"].runs) == 3, "all are shown, so all are kept"
        assert not torch.allclose(masks["6"], masks["7"], atol=0.05) and not torch.equal(masks["6"], masks["8"])
        for key, mask in (wanted or masks).items():
            assert torch.equal(masks[key], mask)
        wanted = masks
    assert torch.equal(run(colour(graph, "p6"))["6"]["mask"], alone)


def test_an_image_from_the_cache_is_not_shown_with_the_maps_of_another_run(comfy_with: Any) -> None:
    run = comfy_with("LRU")
    first, second = ({**base(), "6": sampler(seed, ["5", 0]), **shown("6")} for seed in (1, 2))
    run(first)
    maps = run(second)["6"]["maps"]
    assert len(maps.runs) == 1, "one run's memory"
    with pytest.raises(RuntimeError, match="The maps of this image are not kept: ComfyUI took it from its cache"):
        run(colour(first, "p6"))
    assert run(colour(second, "p6")), "the maps of the second run are still there"


def test_a_preview_that_is_added_later_finds_the_run_or_says_why_not(comfy_with: Any) -> None:
    run = comfy_with("LRU")
    keep = {"k": node("TestKeep", key="k", image=["d6", 0], maps=["4", 1])}
    first, second = ({**base(), "6": sampler(seed, ["5", 0]), **shown("6")} for seed in (1, 2))
    without = [{key: each for key, each in {**graph, **keep}.items() if key not in ("p6", "k6")} for graph in (first, second)]
    run(without[0])
    assert run(first)["6"]["mask"].max() > 0.9
    run(without[1])
    with pytest.raises(RuntimeError, match="The maps of this image are not kept"):
        run(colour(first, "p6"))


def test_runs_that_nothing_shows_are_let_go(comfy_with: Any) -> None:
    graph = {**base(), "6": sampler(1, ["5", 0]), "8": sampler(3, ["6", 0], 0.6), **shown("8")}
    del graph["k8"]["inputs"]["maps"]  # a node that takes all maps may want any of them
    run = comfy_with()
    run(graph)
    with pytest.raises(RuntimeError, match=r"The maps of this image are not kept.*node 6"):
        run({**graph, **shown("6")})


# --- outside a queue ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, Any]:
    return evaluate.load()


@pytest.fixture
def sampled(node_classes: dict[str, type], loaded: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Samples with a captured model; returns the latent and its image."""
    _, clip, vae = loaded

    @torch.inference_mode()
    def run(model: Any, seed: int = 1, side: int = 128, batch: int = 1, text: str = PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
        conds = [node_classes["FoveaPrompt"].execute(clip, each).args[0] for each in (text, "")]
        start = torch.zeros(batch, 3, side // 8, side // 8)
        noise = comfy.sample.prepare_noise(start, seed)
        latent = comfy.sample.sample(model, noise, 3, 4.0, "euler", "normal", *conds, start, seed=seed, disable_pbar=True)
        return latent, vae.decode(latent)

    return run


@pytest.fixture
def preview(node_classes: dict[str, type], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., Any]:
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    return node_classes["AttnMapPreview"].execute


@pytest.fixture
def captured(node_classes: dict[str, type], loaded: Any) -> Callable[..., tuple[Any, Any]]:
    return lambda **settings: node_classes["AttnMapCapture"].execute(loaded[0], **settings).args


def notes_of(output: Any) -> str:
    return "; ".join(json.loads(output.args[2])["notes"])


def test_an_image_is_known_by_what_it_looks_like_and_a_latent_for_certain(captured: Any, sampled: Any, preview: Any) -> None:
    model, maps = captured()
    alone = {}
    for seed in (1, 2):
        single, own = captured()
        latent, image = sampled(single, seed)
        alone[seed] = preview(own, image).args[1], latent, image
    for seed in (1, 2):
        sampled(model, seed)
    for mask, latent, image in alone.values():
        assert torch.equal(preview(maps, image).args[1], mask)
        assert torch.equal(preview(maps, torch.rand_like(image), latent={"samples": latent}).args[1], mask)
    with pytest.raises(ValueError, match="latent: none of the 2 kept runs ended with this latent"):
        preview(maps, image, latent={"samples": latent + 1})
    sampled(model, 3, side=192)
    assert torch.equal(preview(maps, alone[1][2]).args[1], alone[1][0]), "the size is told apart too"
    with pytest.raises(ValueError, match=r"images is 1 of 128 x 64, but the captured model sampled 1 of 128 x 128 and 1 of 192"):
        preview(maps, torch.zeros(1, 64, 128, 3))


def test_several_runs_stay_within_one_limit(captured: Any, sampled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fovea_attention.attention import host

    capture = importlib.import_module("fovea_attention.attention.maps.capture")
    model, maps = captured(max_memory_mb=1, self_attention=True)
    for number in range(3):
        monkeypatch.setattr(capture.host, "executing_node", lambda number=number: host.NodeCall("1", str(number), 0))
        sampled(model, number, side=256)
        assert sum(run.bytes for run in maps.runs) <= 2**20
    assert len(maps.runs) > 1 and any(
        "to keep several runs within 1 MB" in note for run in maps.runs for note in run.recording.notes
    )


def test_stages_that_continue_one_another_are_one_run(captured: Any, loaded: Any, preview: Any, node_classes: Any) -> None:
    _, clip, vae = loaded
    conds = [node_classes["FoveaPrompt"].execute(clip, text).args[0] for text in (PROMPT, "")]
    advanced = nodes.KSamplerAdvanced().sample
    outputs = []
    with torch.inference_mode():
        for stages in (((0, 4),), ((0, 2), (2, 4))):
            model, maps = captured(self_attention=True)
            latent: dict[str, Any] = {"samples": torch.zeros(1, 3, 16, 16)}
            for start, end in stages:
                leftover = "disable" if end == 4 else "enable"
                noise = "enable" if start == 0 else "disable"
                settings = (noise, 5, 4, 4.0, "euler", "normal", *conds, latent, start, end, leftover)
                latent = advanced(model, *settings)[0]
            image = vae.decode(latent["samples"])
            outputs.append([preview(maps, image, view=view) for view in ("overlay", "steps", "convergence", "self-attention")])
    for whole, joined in zip(*outputs, strict=True):
        assert torch.allclose(whole.args[1], joined.args[1], atol=0.01), "heads are clamped run by run"
    whole, joined = (json.loads(entry[0].args[2]) for entry in outputs)
    assert joined["steps"] == whole["steps"] == 4 and not joined["notes"]
    for one, other in zip(whole["pictures"][0]["words"], joined["pictures"][0]["words"], strict=True):
        assert one["steps"]["step"] == other["steps"]["step"]
        assert one["steps"]["mass"] == pytest.approx(other["steps"]["mass"], rel=1e-3)
        assert one["steps"]["change"][1:] == pytest.approx(other["steps"]["change"][1:], rel=0.02)


def test_one_image_of_a_batch_is_named(captured: Any, sampled: Any, preview: Any) -> None:
    model, maps = captured()
    _, images = sampled(model, batch=3)
    masks = preview(maps, images).args[1]
    for at in range(3):
        assert torch.equal(preview(maps, images[at : at + 1], batch_index=at).args[1], masks[2 * at : 2 * at + 2])
        assert torch.equal(preview(maps, images, batch_index=at).args[1], masks[2 * at : 2 * at + 2])
    with pytest.raises(ValueError, match="batch_index is 3, but 3 images were sampled: use 0 to 2"):
        preview(maps, images, batch_index=3)
    with pytest.raises(ValueError, match="or one image of it with its number in 'batch_index'"):
        preview(maps, images[:1].flip(2))
    with pytest.raises(ValueError, match="frame is 2, but the sampled latent is an image"):
        preview(maps, images, frame=2)


# --- video ------------------------------------------------------------------------------------------------------------


def test_frames_of_a_video_follow_the_causal_layout(pack: Any) -> None:
    pairing = importlib.import_module("fovea_attention.attention.maps.pairing")
    assert [pairing.latent_frame(at, 81, 21) for at in range(81)] == [(at + 3) // 4 for at in range(81)]
    assert [pairing.latent_frame(at, 9, 2) for at in range(9)] == [0] + [1] * 8
    assert [pairing.latent_frame(at, 6, 6) for at in range(6)] == list(range(6))
    assert [pairing.latent_frame(at, 4, 3) for at in (0, 3)] == [0, 2], "spread where no layout fits"


def test_a_frame_of_a_video_is_named(pack: Any) -> None:
    api = importlib.import_module("fovea_attention.attention.maps")
    pairing = importlib.import_module("fovea_attention.attention.maps.pairing")
    layers = {"block.0": api.LayerMaps(1, torch.rand(2, 1, 2, 3, 4, 4))}
    maps = api.AttnMaps(api.Recording([1.0, 0.0], 2, (3, 4, 4), [api.PromptMaps("positive", 2, (3, 4, 4), layers, [0])]))
    lone, video = torch.zeros(1, 32, 32, 3), torch.zeros(18, 32, 32, 3)
    unnamed = pairing.paired(maps, lone, "positive")
    assert unnamed.sources[0].frame == 0 and "first of 9 frames" in unnamed.notes[0]
    assert [pairing.paired(maps, lone, "positive", 1, at).sources[0].frame for at in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    found = pairing.paired(maps, video, "positive", frame=5)
    assert len(found.images) == 2 and [(each.batch, each.frame) for each in found.sources] == [(0, 2), (1, 2)]
    assert [each.batch for each in pairing.paired(maps, video, "positive", 1).sources] == [1] * 9
    with pytest.raises(ValueError, match="frame is 9, but the sampled video has 9 frames: use 0 to 8"):
        pairing.paired(maps, lone, "positive", frame=9)
