"""Every shipped workflow: complete, readable, valid on this host, and it really makes images."""

from __future__ import annotations

import functools
import io
import itertools
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy_lint.schema
import numpy as np
import pytest
import torch
from comfy_cli.layout_quality import score_workflow
from comfy_cli.link_integrity import broken_link_findings
from comfy_lint.linter import lint_workflow
from host_server import HostServer
from PIL import Image
from widgets import WIDGET_TYPES, widget_names

from workflows import thumbnails, workflow_files

WORKFLOWS = workflow_files.shipped()
NOTES = {"Note", "MarkdownNote"}
TITLE_BAR = 30

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
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


def test_there_are_workflows() -> None:
    assert "T-GATE - same image, faster" in {path.stem for path in WORKFLOWS}


def load(path: Path) -> dict[str, Any]:
    return workflow_files.load(path)


def computing(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that are not notes."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node as drawn, with its title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


# ------------------------------------------------------------------------------------------ complete and readable


@each_workflow
def test_it_has_a_thumbnail(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as shown:
        shown.load()
        assert shown.format == "JPEG"
        assert min(shown.size) >= 256 and max(shown.size) <= 1024
        assert np.asarray(shown.convert("L")).std() > 10, "an empty image"
    assert path.with_suffix(".jpg").stat().st_size < 200_000


@each_workflow
def test_a_image_to_drag_onto_the_canvas_carries_it(path: Path) -> None:
    with Image.open(thumbnails.TO_DRAG / f"{path.stem}.png") as picture:
        assert json.loads(picture.info["workflow"]) == load(path), "run `python dev thumbnails`"


@each_workflow
def test_it_uses_core_nodes_and_ours_only(path: Path, object_info: dict[str, Any], node_classes: dict[str, type]) -> None:
    types = {node["type"] for node in computing(load(path))}
    assert types & set(node_classes), "a workflow of this pack uses the pack"
    for kind in types - set(node_classes):
        assert object_info[kind]["python_module"].startswith(("nodes", "comfy_extras")), kind


@each_workflow
def test_its_steps_are_explained_in_numbered_notes(path: Path) -> None:
    workflow = load(path)
    notes = sorted((node for node in workflow["nodes"] if node["type"] in NOTES), key=lambda node: node["pos"][0])
    texts = [node["widgets_values"][0] for node in notes]
    assert [text.lstrip("*# ")[0] for text in texts] == [str(number) for number in range(1, len(texts) + 1)], (
        "1, 2, 3 from the left"
    )
    assert any("checkpoint" in text and "1.5" in text for text in texts), "which checkpoint to choose"


@each_workflow
def test_every_node_lies_in_a_titled_group(path: Path) -> None:
    workflow = load(path)
    assert workflow["groups"] and all(group["title"].strip() for group in workflow["groups"])
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        inside = [
            group["title"]
            for group in workflow["groups"]
            if group["bounding"][0] <= left
            and group["bounding"][1] <= top
            and right <= group["bounding"][0] + group["bounding"][2]
            and bottom <= group["bounding"][1] + group["bounding"][3]
        ]
        assert len(inside) == 1, (node["id"], node["type"], inside)


@each_workflow
def test_it_reads_from_left_to_right_without_overlaps(path: Path) -> None:
    workflow = load(path)
    assert score_workflow(workflow).overlap_area == 0
    left = {node["id"]: node["pos"][0] for node in workflow["nodes"]}
    assert [link for link in workflow["links"] if left[link[3]] < left[link[1]]] == [], "links that run to the left"
    for one, other in itertools.combinations([group["bounding"] for group in workflow["groups"]], 2):
        assert (
            one[0] + one[2] <= other[0]
            or other[0] + other[2] <= one[0]
            or one[1] + one[3] <= other[1]
            or other[1] + other[3] <= one[1]
        )


# ------------------------------------------------------------------------------------------ valid


@each_workflow
def test_its_links_are_whole(path: Path) -> None:
    workflow = load(path)
    assert broken_link_findings(workflow) == ([], [])
    ids = [node["id"] for node in workflow["nodes"]]
    assert len(ids) == len(set(ids)) and max(ids) == workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) == workflow["last_link_id"]
    used = {link[0] for link in workflow["links"]}
    assert used == {link for node in workflow["nodes"] for output in node["outputs"] for link in output["links"] or ()}
    assert used == {i["link"] for node in workflow["nodes"] for i in node["inputs"] if i["link"] is not None}


@each_workflow
def test_every_widget_has_its_value(path: Path, object_info: dict[str, Any]) -> None:
    for node in computing(load(path)):
        assert len(node.get("widgets_values") or []) == len(widget_names(object_info[node["type"]])), (node["id"], node["type"])


@each_workflow
def test_its_sockets_are_those_of_the_nodes(path: Path, object_info: dict[str, Any]) -> None:
    """A stale template shows a missing or a wrong socket; the server would not notice."""
    for node in computing(load(path)):
        info = object_info[node["type"]]
        known = {name: spec[0] for section in ("required", "optional") for name, spec in info["input"].get(section, {}).items()}
        for socket in node["inputs"]:
            assert known[socket["name"]] == socket["type"], (node["id"], socket)
        outputs = [output["type"] for output in node["outputs"]]
        assert outputs == info["output"][: len(outputs)], node["id"]  # core nodes gain outputs with time (PreviewImage did)


@each_workflow
def test_its_seeds_are_fixed(path: Path) -> None:
    seeded = [
        node
        for node in computing(load(path))
        if any(value in ("randomize", "increment", "decrement") for value in node.get("widgets_values") or ())
    ]
    assert seeded == []


@each_workflow
def test_it_converts_without_a_warning_and_a_linter_finds_nothing(
    path: Path, object_info: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    workflow = load(path)
    with caplog.at_level(logging.WARNING):
        prompt = workflow_files.convert(workflow, object_info)
    assert caplog.records == []
    assert set(prompt) == {str(node["id"]) for node in computing(workflow)}
    for entry in prompt.values():
        required = set(object_info[entry["class_type"]]["input"].get("required", ()))
        assert required <= set(entry["inputs"]), entry
    assert [finding.message for finding in lint_workflow(prompt, comfy_lint.schema.normalize(object_info))] == []


# ------------------------------------------------------------------------------------------ it runs


@each_workflow
@pytest.mark.server
def test_the_browser_is_offered_it(path: Path, server: HostServer) -> None:
    """The template browser lists it, and gets the workflow and its thumbnail where it looks for them."""
    offered = server.get("/workflow_templates")
    assert path.stem in next(names for folder, names in offered.items() if folder.endswith("fovea-attention"))
    address = f"/api/workflow_templates/fovea-attention/{path.stem}".replace(" ", "%20").replace(",", "%2C")
    assert server.request(f"{address}.json") == path.read_bytes()
    assert server.request(f"{address}.jpg") == path.with_suffix(".jpg").read_bytes()


@dataclass
class Run:
    """A finished run of a shipped workflow: the images of each node, and what the server logged meanwhile."""

    shown: dict[str, list[np.ndarray]]
    log: str

    @property
    def images(self) -> dict[str, np.ndarray]:
        """The last one of each node."""
        return {node: images[-1] for node, images in self.shown.items()}


@pytest.fixture(scope="module")
def run(server: HostServer, object_info: dict[str, Any]) -> Callable[[Path], Run]:
    """Runs a workflow on the real server, once however many tests ask."""

    @functools.cache
    def finished(path: Path) -> Run:
        before = len(server.log_text())
        result = server.run(workflow_files.convert(load(path), object_info))  # raises unless the server reports success
        images: dict[str, list[np.ndarray]] = {}
        for picture in result.images:
            with Image.open(io.BytesIO(server.fetch(picture))) as image:
                images.setdefault(picture.node, []).append(np.asarray(image.convert("RGB"), dtype=np.float32))
        return Run(images, server.log_text()[before:])

    return finished


@each_run
@pytest.mark.server
def test_it_runs_on_the_real_server(path: Path, run: Callable[[Path], Run], object_info: dict[str, Any]) -> None:
    images = run(path).images
    viewers = {str(node["id"]) for node in computing(load(path)) if object_info[node["type"]]["output_node"]}
    assert set(images) == viewers
    for node, pixels in images.items():
        assert min(pixels.shape[:2]) >= 64
        assert pixels.std() > 10, f"the image of node {node} is of one colour"


# ------------------------------------------------------------------------------------------ T-GATE


T_GATE = workflow_files.FOLDER / "T-GATE - same image, faster.json"


def test_the_t_gate_workflow_shows_the_nodes_defaults_and_keeps_the_image(object_info: dict[str, Any]) -> None:
    """When the defaults move, the template moves with them; full steps and all self-attention are what makes its title true."""
    node = next(node for node in load(T_GATE)["nodes"] if node["type"] == "TGateCache")
    inputs = object_info["TGateCache"]["input"]
    spec = {**inputs["required"], **inputs["optional"]}
    widgets = {name: options[0]["default"] for name, (kind, *options) in spec.items() if kind in WIDGET_TYPES}
    assert node["widgets_values"] == [*{**widgets, "sp_interval": 1, "refresh_every": 2}.values()]


def test_the_t_gate_workflow_compares_equal_runs() -> None:
    """Its two samplers differ in their model and in nothing else."""
    workflow = load(T_GATE)
    plain, faster = (node for node in workflow["nodes"] if node["type"] == "KSampler")
    assert plain["widgets_values"] == faster["widgets_values"]
    sources = {link[0]: tuple(link[1:3]) for link in workflow["links"]}
    differing = [
        one["name"]
        for one, other in zip(plain["inputs"], faster["inputs"], strict=True)
        if sources[one["link"]] != sources[other["link"]]
    ]
    assert differing == ["model"]


@pytest.mark.server
def test_the_t_gate_workflow_reuses_attention(run: Callable[[Path], Run]) -> None:
    finished = run(T_GATE)
    steps = next(node["widgets_values"][2] for node in load(T_GATE)["nodes"] if node["type"] == "KSampler")
    assert re.search(rf"T-GATE: cross-attention reused in [1-9]\d* of {steps} steps", finished.log)
    plain, faster = finished.images.values()
    difference = float(np.abs(plain - faster).mean())
    assert 0 < difference < 40, "another image, but of the same scene"


# ------------------------------------------------------------------------------------------ Attend-and-Excite


EXCITE = workflow_files.FOLDER / "Attend-and-Excite - every subject in the image.json"


def test_the_excite_workflow_shows_the_nodes_defaults(object_info: dict[str, Any]) -> None:
    """But for what its notes explain: the demo model wants a finer grid, a stronger nudge and its own cfg."""
    node = next(node for node in load(EXCITE)["nodes"] if node["type"] == "AttendExciteGuider")
    inputs = object_info["AttendExciteGuider"]["input"]
    specs = {**inputs["required"], **inputs["optional"]}
    defaults = {name: options[0]["default"] for name, (kind, *options) in specs.items() if kind in WIDGET_TYPES}
    differing = {name for (name, value), own in zip(defaults.items(), node["widgets_values"], strict=True) if own != value}
    assert differing <= {"cfg", "attention_grid", "layers"}


def test_the_excite_workflow_compares_equal_runs() -> None:
    """Its two samplers differ in their guider and in nothing else, and the guiders have the same prompts and cfg."""
    workflow = load(EXCITE)
    sources = {link[0]: tuple(link[1:3]) for link in workflow["links"]}

    def wires(kind: str) -> list[dict[str, Any]]:
        nodes = [node for node in workflow["nodes"] if node["type"] == kind]
        return [{i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None} for node in nodes]

    plain, guided = wires("SamplerCustomAdvanced")
    assert {name for name in plain if plain[name] != guided[name]} == {"guider"}
    ordinary, ours = wires("CFGGuider")[0], wires("AttendExciteGuider")[0]
    assert {name for name in ordinary if ordinary[name] != ours[name]} == {"model"}  # its maps are captured
    guiders = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in ("CFGGuider", "AttendExciteGuider")]
    assert len(set(guiders)) == 1, "the same cfg"


@pytest.mark.server
def test_the_excite_workflow_guides_half_of_the_steps(run: Callable[[Path], Run]) -> None:
    finished = run(EXCITE)
    steps = next(node["widgets_values"][1] for node in load(EXCITE)["nodes"] if node["type"] == "BasicScheduler")
    assert f"Attend-and-Excite: {round(0.5 * steps)} guided steps" in finished.log
    plain, guided = (finished.images[node] for node in ("22", "26"))
    assert np.abs(plain - guided).mean() > 1, "another image"


# ------------------------------------------------------------------------------------------ DiT


DIT = workflow_files.FOLDER / "DiT - class to image.json"
DIT_FASTER = workflow_files.FOLDER / "DiT - faster, and where it looks.json"


@pytest.mark.server
def test_the_dit_workflow_draws_what_its_classes_say(run: Callable[[Path], Run]) -> None:
    """The trained transformer, through the real server, judged by the detector: three of the four or better."""
    from scenes import detect, draw

    workflow = load(DIT)
    labels = next(node["widgets_values"][1] for node in workflow["nodes"] if node["type"] == "DiTClassLabel")
    classes = [draw.class_parts(int(label))[1:] for label in labels.split(",")]
    images = run(DIT).shown["16"]
    assert len(images) == len(classes)
    found = [detect.find(torch.from_numpy(picture / 255), *parts) for picture, parts in zip(images, classes, strict=True)]
    assert sum(finding.right for finding in found) >= 3


@pytest.mark.server
def test_the_other_dit_workflow_reuses_self_attention(run: Callable[[Path], Run]) -> None:
    finished = run(DIT_FASTER)
    assert re.search(r"T-GATE: .*negative prompt skipped in [1-9]\d*, self-attention reused in [1-9]", finished.log)
    assert 0 < np.abs(finished.images["19"] - finished.images["21"]).mean() < 40
