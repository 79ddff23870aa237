"""What a node did in a run is told to the browser, for the node that it is about: whoever samples, and from the cache too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import graph_runs
import pytest
from graph_runs import Graph, node
from tiny_dit import bare, tiny, write

GATE = {
    "gate_at": 0.5, "cfg_after_gate": "drop (keep positive)", "sp_interval": 1, "fi_interval": 1, "warm_up": 0, "mode": "fixed",
    "tolerance": 0.05, "cache_device": "auto",
}  # fmt: skip
Told = list[dict[str, Any]]


def sampler(model: str, seed: int = 1, steps: int = 2, **changed: Any) -> dict[str, Any]:
    inputs = {
        "model": [model, 0], "seed": seed, "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["5", 0], "denoise": 1.0,
    }  # fmt: skip
    return node("KSampler", **{**inputs, **changed})


def base(side: int = 128) -> Graph:
    return {
        "1": node("TestScenes"),
        "2": node("FoveaPrompt", clip=["1", 1], text="a [red circle]"),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": node("TestEmpty", side=side, batch=1),
    }


def gated(key: str = "4", **changed: Any) -> Graph:
    return {key: node("TGateCache", model=["1", 0], **{**GATE, **changed})}


def shown(sampled: str) -> Graph:
    return {f"d{sampled}": node("VAEDecode", samples=[sampled, 0], vae=["1", 2]), f"k{sampled}": kept(f"d{sampled}")}


def kept(image: str) -> dict[str, Any]:
    return node("TestKeep", key=image, image=[image, 0])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What is sent to the browser, in its order."""
    messages: Told = []

    def send_sync(self: Any, event: str, message: Any, client: str | None = None) -> None:
        if event == "fovea.text":
            assert client == "browser"
            messages.append(message)

    monkeypatch.setattr(graph_runs.Server, "send_sync", send_sync)
    monkeypatch.setattr(graph_runs.Server, "client_id", "browser")
    return messages


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[Graph], Any]]:
    """A fresh ComfyUI with the named cache, whose executor keeps the browser that asked."""
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TestExpand", Expand)

    def fresh(cache: str = "CLASSIC") -> Callable[[Graph], Any]:
        run = graph_runs.executor(monkeypatch, cache)
        return lambda graph: run(graph, {"client_id": "browser"})

    return fresh


class Expand:
    """Makes a T-GATE Cache in its own place, as loops and macros do."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "expand", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL", {})}}

    def expand(self, model: Any) -> dict[str, Any]:
        from comfy_execution.graph_utils import GraphBuilder

        builder = GraphBuilder()
        gate = builder.node("TGateCache", model=model, **GATE)
        return {"result": (gate.out(0),), "expand": builder.finalize()}


def test_the_line_of_the_log_is_told_for_the_node(comfy: Any, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """Two runs of one node stand below each other; a later prompt, which takes the node from the cache, starts anew."""
    caplog.set_level(logging.INFO, logger="fovea")
    run = comfy()
    graph = {**base(), **gated(), "6": sampler("4"), **shown("6"), "7": sampler("4", steps=4), **shown("7")}
    run(graph)
    lines = [record.getMessage() for record in caplog.records if "T-GATE" in record.getMessage()]
    assert len(lines) == 2 and {message["node"] for message in told if message["kind"] == "TGateCache"} == {"4"}
    assert told[-1] == {"node": "4", "kind": "TGateCache", "workflow": None, "lines": lines}
    caplog.clear()
    graph["6"]["inputs"]["seed"] = 9
    run(graph)
    (line,) = (record.getMessage() for record in caplog.records if "T-GATE" in record.getMessage())
    assert told[-1]["lines"] == [line]


@pytest.mark.newest
def test_nodes_of_one_kind_are_told_apart(comfy: Any, told: Told) -> None:
    """Two with the same settings, one in a subgraph, with a sampler each."""
    graph = {
        **base(),
        **gated("4"),
        **gated("12:4"),
        "6": sampler("4"),
        "7": sampler("12:4", steps=4),
        **shown("6"),
        **shown("7"),
    }
    comfy()(graph)
    last = {message["node"]: message["lines"] for message in told if message["kind"] == "TGateCache"}
    assert [len(last[key]) for key in ("4", "12:4")] == [1, 1]
    assert "of 2 steps" in last["4"][0] and "of 4 steps" in last["12:4"][0]


@pytest.mark.newest
def test_a_node_that_got_another_id_is_told_under_it(comfy: Any, told: Told) -> None:
    run = comfy("LRU")
    for key in ("4", "9"):
        told.clear()
        run({**base(), **gated(key), "6": sampler(key, seed=int(key)), **shown("6")})
        assert {message["node"] for message in told if message["kind"] == "TGateCache"} == {key}


@pytest.mark.newest
def test_a_node_that_another_one_made_is_told_on_that(comfy: Any, told: Told) -> None:
    comfy()({**base(), "4": node("TestExpand", model=["1", 0]), "6": sampler("4"), **shown("6")})
    assert (told[-1]["node"], told[-1]["kind"]) == ("4", "TestExpand") and told[-1]["lines"][0].startswith("T-GATE: ")


@pytest.mark.newest
def test_what_is_no_longer_so_is_taken_away(comfy: Any, told: Told) -> None:
    """A warning goes when the next run has no reason for it."""
    run = comfy()
    for side, count in ((136, 1), (128, 0)):
        graph = {**base(side), "4": node("FoveaSeamless", model=["1", 0]), "6": sampler("4"), **shown("6")}
        run(graph)
        (message,) = (each for each in told if each["kind"] == "FoveaSeamless")
        assert len(message["lines"]) == count
        told.clear()


@pytest.mark.newest
def test_without_a_browser_only_the_log_is_written(
    comfy: Any, told: Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fovea")
    graph = {**base(), **gated(), "6": sampler("4"), **shown("6")}
    graph_runs.executor(monkeypatch)(graph)
    assert not told and any("T-GATE: cross-attention" in record.getMessage() for record in caplog.records)


class Take:
    """Needs a model and a conditioning, and does nothing with them."""

    OUTPUT_NODE, RETURN_TYPES, FUNCTION, CATEGORY = True, (), "take", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL", {}), "conditioning": ("CONDITIONING", {})}}

    def take(self, model: Any, conditioning: Any) -> dict[str, Any]:
        return {}


@pytest.mark.newest
def test_a_dit_says_which_weights_and_classes_were_taken(
    comfy: Any, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which copy of several in a file, the model's own classes, and what the words of a list were read as."""
    import nodes

    few, many = ({f"c{i}": i for i in range(classes)} for classes in (3, 30))
    for name, names in (("few", few), ("many", many)):
        weights = bare(tiny(depth=1, classes=len(names)))
        write(tmp_path / f"{name}.pt", {"ema": weights, "model": weights, "class_to_idx": names})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TestTake", Take)
    run = comfy()

    def lines(name: str, labels: str) -> dict[str, list[str]]:
        told.clear()
        loader = node("DiTLoader", model_name=f"{name}.pt", prediction="auto", cfg_channels="4", latent_format="auto")
        chosen = node("DiTClassLabel", label="1: goldfish, Carassius auratus", labels=labels)
        run({"1": loader, "2": chosen, "3": node("TestTake", model=["1", 0], conditioning=["2", 0])})
        return {message["node"]: message["lines"] for message in told}

    shown = lines("few", "2, tabby; n02099601")
    loaded, classes = shown["1"]
    assert "weights: 'ema' (the file also has 'model')" in loaded and loaded.endswith("predicts epsilon")
    assert classes == "Load DiT: classes: 0 (c0), 1 (c1), 2 (c2)"
    assert shown["2"] == ["DiT Class Label: 'labels' is used, not 'label': 2, 281 (tabby), 207 (golden retriever)"]
    shown = lines("many", "")
    assert shown["1"][1].endswith("19 (c19) and 10 more") and shown["2"] == []
