"""Every shipped workflow runs: those of the demo models on a real server, where their images show what they promise."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_server import HostServer, SavedImage
from PIL import Image
from widgets import WIDGET_TYPES
from workflows.workflow_files import computing_nodes, load, other_models

from workflows import workflow_files

pytestmark = pytest.mark.server

# The rest is in test_workflows_of_other_models.py.
WORKFLOWS = [path for path in workflow_files.shipped() if not other_models(load(path))]

# Of those that distil, which take longest, the others show that the sampler works on the oldest host.
LONG = (
    "repaint an image", "seamless and large textures", "style from an image", "style from several images", "texture",
    "texture by labels",
)  # fmt: skip
each_run = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.newest if path.stem.endswith(LONG) else ()) for path in WORKFLOWS],
    ids=lambda path: path.stem,
)


@dataclass
class Run:
    """A finished run of a shipped workflow: the images of each node by its title, and what the server logged meanwhile."""

    shown: dict[str, list[np.ndarray]]
    log: str

    @property
    def images(self) -> dict[str, np.ndarray]:
        """The last one of each node."""
        return {title: images[-1] for title, images in self.shown.items()}


def fetched(server: HostServer, picture: SavedImage) -> np.ndarray:
    """An image of a run: (rows, columns, 3), 0..255."""
    with Image.open(io.BytesIO(server.fetch(picture))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)


@pytest.fixture(scope="module")
def run(server: HostServer, object_info: dict[str, Any]) -> Callable[[Path], Run]:
    """Runs a workflow on the real server, once however many tests ask."""

    @functools.cache
    def finished(path: Path) -> Run:
        before = len(server.log_text())
        workflow = load(path)
        titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
        result = server.run(workflow_files.convert(workflow, object_info))  # raises unless the server reports success
        images: dict[str, list[np.ndarray]] = {}
        for picture in result.images:
            images.setdefault(titles[picture.node], []).append(fetched(server, picture))
        return Run(images, server.log_text()[before:])

    return finished


@each_run
def test_it_runs_on_the_real_server(path: Path, run: Callable[[Path], Run], object_info: dict[str, Any]) -> None:
    """Everything that it shows stands on the canvas, not in a sub-graph."""
    images = run(path).images
    viewers = [node for node in load(path)["nodes"] if object_info.get(node["type"], {}).get("output_node")]
    assert set(images) == {node["title"] for node in viewers} and len(images) == len(viewers)
    for title, pixels in images.items():
        assert min(pixels.shape[:2]) >= 64
        assert pixels.std() > 10, f"the image of {title} is of one colour"


def the_only(path: Path, kind: str) -> dict[str, Any]:
    """The node of a kind, wherever it is in the workflow."""
    (node,) = (node for node in computing_nodes(load(path)) if node["type"] == kind)
    return node


def steps_of(path: Path) -> int:
    """The steps of its runs, which all have the same number."""
    places = {"KSampler": 2, "BasicScheduler": 1}
    nodes = [node for node in computing_nodes(load(path)) if node["type"] in places]
    (steps,) = {node["widgets_values"][places[node["type"]]] for node in nodes}
    return steps


def defaults(kind: str, object_info: dict[str, Any]) -> dict[str, Any]:
    inputs = object_info[kind]["input"]
    specs = {**inputs["required"], **inputs["optional"]}
    return {name: options[0]["default"] for name, (kind, *options) in specs.items() if kind in WIDGET_TYPES}


# ------------------------------------------------------------------------------------------ T-GATE


T_GATE = [workflow_files.find(f"T-GATE{model} - same image, faster") for model in ("", " for SDXL", " for Flux")]


@pytest.mark.parametrize("path", T_GATE, ids=lambda path: path.stem)
def test_the_t_gate_workflows_show_the_nodes_defaults(path: Path, object_info: dict[str, Any]) -> None:
    """When the defaults move, the templates move with them."""
    assert the_only(path, "TGateCache")["widgets_values"] == [*defaults("TGateCache", object_info).values()]


@pytest.mark.parametrize("path", T_GATE, ids=lambda path: path.stem)
def test_the_t_gate_workflows_compare_equal_runs(path: Path, object_info: dict[str, Any]) -> None:
    """Their two samplers differ in their model and in nothing else."""
    prompt = workflow_files.convert(load(path), object_info)
    plain, faster = (entry["inputs"] for entry in prompt.values() if entry["class_type"] == "KSampler")
    assert {name for name in plain if plain[name] != faster[name]} == {"model"}


def test_the_t_gate_workflow_saves_steps_and_keeps_the_image(run: Callable[[Path], Run]) -> None:
    finished = run(T_GATE[0])
    assert re.search(rf"T-GATE: [1-9]\d* of {steps_of(T_GATE[0])} steps skipped", finished.log)
    plain, faster = finished.images.values()
    difference = float(np.abs(plain - faster).mean())
    assert 0 < difference < 40, "another image, but of the same scene"


# ------------------------------------------------------------------------------------------ Attend-and-Excite


EXCITE = workflow_files.FOLDER / "Attend-and-Excite - every subject in the image.json"


def test_the_excite_workflow_shows_the_nodes_defaults(object_info: dict[str, Any]) -> None:
    """But for what its note explains: the demo model wants a finer grid, other layers and its own cfg, subjects their places."""
    own = the_only(EXCITE, "AttendExciteGuider")["widgets_values"]
    usual = defaults("AttendExciteGuider", object_info)
    differing = {name for (name, value), value_here in zip(usual.items(), own, strict=True) if value_here != value}
    assert differing <= {"cfg", "attention_grid", "layers", "layout"}


def test_the_excite_workflow_compares_equal_runs(object_info: dict[str, Any]) -> None:
    """Its two samplers differ in their guider and in nothing else, and the guiders have the same model, prompts and cfg."""
    prompt = workflow_files.convert(load(EXCITE), object_info)

    def inputs(kind: str) -> list[dict[str, Any]]:
        return [entry["inputs"] for entry in prompt.values() if entry["class_type"] == kind]

    plain, guided = inputs("SamplerCustomAdvanced")
    assert {name for name in plain if plain[name] != guided[name]} == {"guider"}
    (ordinary,), (ours,) = inputs("CFGGuider"), inputs("AttendExciteGuider")
    assert {name for name in ordinary if ordinary[name] != ours[name]} == set()


def test_the_excite_workflow_guides_half_of_the_steps(run: Callable[[Path], Run]) -> None:
    finished = run(EXCITE)
    assert f"Attend-and-Excite: {round(0.5 * steps_of(EXCITE))} guided steps" in finished.log
    assert np.abs(finished.images["Plain image"] - finished.images["Every subject"]).mean() > 1, "another image"


# ------------------------------------------------------------------------------------------ masks from words


REDRAW = workflow_files.FOLDER / "Masks from words - redraw one word.json"
CROP = workflow_files.FOLDER / "Masks from words - crop and detail.json"
REGIONS = workflow_files.FOLDER / "Masks from words - a prompt for each region.json"


def drawn(picture: np.ndarray, colour: str, shape: str) -> bool:
    """Whether the detector finds this object in this colour."""
    from scenes import detect

    return detect.find(torch.from_numpy(picture / 255), colour, shape).right


def test_the_word_is_redrawn_and_nothing_else(run: Callable[[Path], Run]) -> None:
    before, after = (run(REDRAW).images[title] for title in ("First image", "Only the word redrawn"))
    assert drawn(before, "red", "circle") and drawn(before, "blue", "square")
    assert drawn(after, "green", "triangle") and drawn(after, "blue", "square") and not drawn(after, "red", "circle")
    same = np.abs(before - after).max(axis=2) < 2
    assert same.mean() > 0.4, "the image outside of the mask"


def test_each_region_follows_its_own_prompt(run: Callable[[Path], Run]) -> None:
    image = run(REGIONS).images["Every region by its prompt"]
    assert drawn(image, "green", "triangle") and drawn(image, "yellow", "star")


@pytest.mark.newest
def test_the_crop_follows_the_word(run: Callable[[Path], Run], server: HostServer, object_info: dict[str, Any]) -> None:
    """With the other word the crop is around the other object; only the named one is sampled again, at twice its size or so."""
    from scenes import detect

    objects = {"green triangle": ("green", "triangle"), "red star": ("red", "star")}
    shipped, other = objects
    prompt = workflow_files.convert(load(CROP), object_info)
    by_title = {entry["_meta"]["title"]: entry["inputs"] for entry in prompt.values()}
    assert by_title["The word becomes a mask"]["words"] == shipped
    by_title["The word becomes a mask"]["words"], by_title["Prompt of the detail"]["text"] = other, f"a {other}"
    prompt["first"] = {"class_type": "PreviewImage", "inputs": {"images": by_title["The word becomes a mask"]["images"]}}
    images = {
        prompt[picture.node].get("_meta", {}).get("title", picture.node): fetched(server, picture)
        for picture in server.run(prompt).images
    }
    first, finished = images["first"], {shipped: run(CROP).images, other: images}
    found = {words: detect.find(torch.from_numpy(first / 255), *parts) for words, parts in objects.items()}
    assert all(finding.right for finding in found.values())

    for named, unnamed in (objects, reversed(objects)):
        crop, again, pasted = (finished[named][title] for title in ("The crop", "Sampled again", "Pasted back"))
        assert drawn(crop, *objects[named]) and drawn(again, *objects[named]) and not drawn(crop, *objects[unnamed])
        enlarged = detect.find(torch.from_numpy(crop / 255), *objects[named]).mask
        assert enlarged.sum() > 2 * found[named].mask.sum(), "its area"
        cell = len(first) // detect.GRID
        changed = (np.abs(pasted - first).max(axis=2) > 8).reshape(detect.GRID, cell, detect.GRID, cell).any(axis=(1, 3))
        assert changed[found[named].mask.numpy()].any() and not changed[found[unnamed].mask.numpy()].any()


# ------------------------------------------------------------------------------------------ DiT


DIT = workflow_files.FOLDER / "DiT - class to image.json"
DIT_FASTER = workflow_files.FOLDER / "DiT - faster, and where it looks.json"


def test_the_dit_workflow_draws_what_its_classes_say(run: Callable[[Path], Run]) -> None:
    """The trained transformer, through the real server, judged by the detector: three of the four or better."""
    from scenes import detect, draw

    labels = the_only(DIT, "DiTClassLabel")["widgets_values"][1]
    classes = [draw.class_parts(int(label))[1:] for label in labels.split(",")]
    (images,) = run(DIT).shown.values()
    assert len(images) == len(classes)
    found = [detect.find(torch.from_numpy(picture / 255), *parts) for picture, parts in zip(images, classes, strict=True)]
    assert sum(finding.right for finding in found) >= 3


def test_the_other_dit_workflow_reuses_self_attention(run: Callable[[Path], Run]) -> None:
    finished = run(DIT_FASTER)
    assert re.search(r"T-GATE: .*negative prompt skipped in [1-9]\d*, self-attention reused in [1-9]", finished.log)
    assert 0 < np.abs(finished.images["Plain"] - finished.images["Faster"]).mean() < 40
