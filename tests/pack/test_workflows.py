"""Every shipped workflow: complete, readable and valid on this ComfyUI. That they run: test_workflow_runs.py."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import comfy_lint.schema
import numpy as np
import pytest
from comfy_cli.layout_quality import score_workflow
from comfy_cli.link_integrity import broken_link_findings
from comfy_lint.linter import lint_workflow
from host_server import HostServer
from PIL import Image
from widgets import widget_names
from workflows.workflow_files import computing_nodes, graphs, load, other_models

from workflows import thumbnails, workflow_files

WORKFLOWS = workflow_files.shipped()
MOST_NODES = 12  # that a person sees at once, with the note
TITLE_BAR = 30

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def test_there_are_workflows() -> None:
    assert "T-GATE - same image, faster" in {path.stem for path in WORKFLOWS}


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
    types = {node["type"] for node in computing_nodes(load(path))}
    assert types & set(node_classes), "a workflow of this pack uses the pack"
    for kind in types - set(node_classes):
        assert object_info[kind]["python_module"].startswith(("nodes", "comfy_extras")), kind


@each_workflow
def test_it_is_seen_at_a_glance(path: Path, node_classes: dict[str, type]) -> None:
    """One note, few nodes, and those that the workflow is about among them or in a sub-graph that says so in its title."""
    workflow = load(path)
    assert len(workflow["nodes"]) <= MOST_NODES
    assert sum(node["type"] in workflow_files.NOTES for node in workflow["nodes"]) == 1
    assert {node["type"] for node in workflow["nodes"]} & set(node_classes)
    assert all(graph["name"].strip() and graph["nodes"] for graph in graphs(workflow)[1:])


@each_workflow
def test_its_steps_are_explained_in_a_note(path: Path) -> None:
    """Numbered from 1, and the first says which models to choose: any checkpoint, or the files and their folders."""
    workflow = load(path)
    (text,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in workflow_files.NOTES)
    steps = re.findall(r"^\*\*(\d)\. ", text, re.MULTILINE)
    assert steps == [str(number) for number in range(1, len(steps) + 1)] and len(steps) >= 2, "1, 2, 3 from the top"
    others = other_models(workflow)
    if "fovea-scenes" in text or not others:
        assert "1.5" in text and ("checkpoint" in text or "DiT" in text), "which checkpoint to choose"
    for file in others:
        assert f"`{file}`" in text, file
    assert others == set() or "`models/" in text, "where the files go"


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
    for graph in graphs(workflow):
        left = {node["id"]: node["pos"][0] for node in graph["nodes"]}
        ends = [ends_of(link) for link in graph["links"]]
        assert [end for end in ends if set(end) <= set(left) and left[end[1]] < left[end[0]]] == [], "links that run to the left"
        for (one, a), (other, b) in itertools.combinations([(node["id"], box(node)) for node in graph["nodes"]], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one, other)
    for one, other in itertools.combinations([group["bounding"] for group in workflow["groups"]], 2):
        assert (
            one[0] + one[2] <= other[0]
            or other[0] + other[2] <= one[0]
            or one[1] + one[3] <= other[1]
            or other[1] + other[3] <= one[1]
        )


def ends_of(link: Any) -> tuple[int, int]:
    """The nodes that a link joins; those of a sub-graph are saved in another form."""
    return (link["origin_id"], link["target_id"]) if isinstance(link, dict) else (link[1], link[3])


# ------------------------------------------------------------------------------------------ valid


@each_workflow
def test_its_links_are_whole(path: Path) -> None:
    workflow = load(path)
    assert broken_link_findings(workflow) == ([], [])
    ids = [
        node["id"] for graph in graphs(workflow) for node in graph["nodes"]
    ]  # the front end numbers those anew that it finds twice
    assert len(ids) == len(set(ids)) and max(ids) == workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) == workflow["last_link_id"]
    used = {link[0] for link in workflow["links"]}
    assert used == {link for node in workflow["nodes"] for output in node["outputs"] for link in output["links"] or ()}
    assert used == {i["link"] for node in workflow["nodes"] for i in node["inputs"] if i["link"] is not None}


@each_workflow
def test_its_sub_graphs_are_whole(path: Path, object_info: dict[str, Any]) -> None:
    """Each stands on the canvas once or more, with its own sockets, and shows widgets that are in it."""
    workflow = load(path)
    for inside in graphs(workflow)[1:]:
        roots = [node for node in workflow["nodes"] if node["type"] == inside["id"]]
        assert roots
        nodes = {node["id"]: node for node in inside["nodes"]}
        for at, link in enumerate(inside["links"], 1):
            assert link["id"] == at
            source, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
            given = inside["inputs"][link["origin_slot"]] if source is None else source["outputs"][link["origin_slot"]]
            taken = inside["outputs"][link["target_slot"]] if target is None else target["inputs"][link["target_slot"]]
            assert link["type"] == given["type"] == taken["type"]
            assert at in (given["linkIds"] if source is None else given["links"])
            assert taken["linkIds"] == [at] if target is None else taken["link"] == at
        for root in roots:
            for kind in ("inputs", "outputs"):
                own = [(slot["name"], slot["type"]) for slot in inside[kind]]
                assert [(slot["name"], slot["type"]) for slot in root[kind]] == own
            for node, widget in root["properties"]["proxyWidgets"]:
                assert widget in widget_names(object_info[nodes[int(node)]["type"]]), (root["title"], widget)


@each_workflow
def test_every_widget_has_its_value(path: Path, object_info: dict[str, Any]) -> None:
    for node in computing_nodes(load(path)):
        assert len(node.get("widgets_values") or []) == len(widget_names(object_info[node["type"]])), (node["id"], node["type"])


@each_workflow
def test_its_sockets_are_those_of_the_nodes(path: Path, object_info: dict[str, Any]) -> None:
    """A stale template shows a missing or a wrong socket; the server would not notice."""
    for node in computing_nodes(load(path)):
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
        for node in computing_nodes(load(path))
        if any(value in ("randomize", "increment", "decrement") for value in node.get("widgets_values") or ())
    ]
    assert seeded == []


@each_workflow
def test_it_converts_without_a_warning_and_a_linter_finds_nothing(
    path: Path, object_info: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """But for model files that are not here, in workflows for models that the tests do not have."""
    workflow = load(path)
    with caplog.at_level(logging.WARNING):
        prompt = workflow_files.convert(workflow, object_info)
    assert caplog.records == []
    assert sorted(entry["class_type"] for entry in prompt.values()) == sorted(n["type"] for n in computing_nodes(workflow))
    for entry in prompt.values():
        required = set(object_info[entry["class_type"]]["input"].get("required", ()))
        assert required <= set(entry["inputs"]), entry
    absent = other_models(workflow)
    findings = [finding.message for finding in lint_workflow(prompt, comfy_lint.schema.normalize(object_info))]
    assert [message for message in findings if not any(file in message for file in absent)] == []


@each_workflow
@pytest.mark.server
def test_the_browser_is_offered_it(path: Path, server: HostServer) -> None:
    """The template browser lists it, and gets the workflow and its thumbnail where it looks for them."""
    offered = server.get("/workflow_templates")
    assert path.stem in next(names for folder, names in offered.items() if folder.endswith("fovea-attention"))
    address = f"/api/workflow_templates/fovea-attention/{path.stem}".replace(" ", "%20").replace(",", "%2C")
    assert server.request(f"{address}.json") == path.read_bytes()
    assert server.request(f"{address}.jpg") == path.with_suffix(".jpg").read_bytes()
