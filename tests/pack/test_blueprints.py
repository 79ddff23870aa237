"""Every subgraph blueprint: whole, with the nodes' defaults, offered by ComfyUI, and it runs in a graph of its own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_cli.link_integrity import broken_link_findings
from host_server import HostServer
from PIL import Image
from widgets import widget_names

from workflows import workflow_files

BLUEPRINTS = workflow_files.blueprints()
OF_DEMO_MODEL = {"steps": 4, "width": 256, "height": 256, "attention_grid": 16}

each_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def test_there_are_blueprints() -> None:
    assert len(BLUEPRINTS) >= 4


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The node that stands for a blueprint, and what is in it."""
    blueprint = workflow_files.load(path)
    (root,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert root["type"] == inside["id"]
    return root, inside


def widgets(node: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name."""
    return dict(zip(widget_names(object_info[node["type"]]), node.get("widgets_values") or (), strict=True))


# ------------------------------------------------------------------------------------------ whole


@each_blueprint
def test_its_links_are_whole(path: Path) -> None:
    root, inside = parts(path)
    assert broken_link_findings(workflow_files.load(path)) == ([], [])
    nodes = {node["id"]: node for node in inside["nodes"]}
    for at, link in enumerate(inside["links"], 1):
        assert link["id"] == at
        source, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        given = inside["inputs"][link["origin_slot"]] if source is None else source["outputs"][link["origin_slot"]]
        taken = inside["outputs"][link["target_slot"]] if target is None else target["inputs"][link["target_slot"]]
        assert link["type"] == given["type"] == taken["type"]
        assert at in (given["linkIds"] if source is None else given["links"])
        assert taken["linkIds"] == [at] if target is None else taken["link"] == at
    for kind in ("inputs", "outputs"):
        assert [(slot["name"], slot["type"]) for slot in root[kind]] == [(slot["name"], slot["type"]) for slot in inside[kind]]
    assert all(slot["link"] is not None for node in inside["nodes"] for slot in node["inputs"])


@each_blueprint
def test_its_nodes_are_those_of_the_host(path: Path, object_info: dict[str, Any]) -> None:
    root, inside = parts(path)
    for node in inside["nodes"]:
        info = object_info[node["type"]]
        known = {name: spec[0] for section in ("required", "optional") for name, spec in info["input"].get(section, {}).items()}
        assert all(known[socket["name"]] == socket["type"] for socket in node["inputs"]), node["type"]
        assert [output["type"] for output in node["outputs"]] == info["output"][: len(node["outputs"])]
        assert len(widgets(node, object_info)) == len(node.get("widgets_values") or [])
    by_id = {str(node["id"]): node for node in inside["nodes"]}
    for node, widget in root["properties"]["proxyWidgets"]:
        assert widget in widgets(by_id[node], object_info), (by_id[node]["type"], widget)


@each_blueprint
def test_our_nodes_in_it_have_their_defaults(path: Path, object_info: dict[str, Any], node_classes: dict[str, type]) -> None:
    ours = [node for node in parts(path)[1]["nodes"] if node["type"] in node_classes]
    assert ours
    for node in ours:
        inputs = object_info[node["type"]]["input"]
        specs = {**inputs["required"], **inputs.get("optional", {})}
        for name, value in widgets(node, object_info).items():
            if name != "text":  # an example, to be written over
                assert specs[name][1]["default"] == value, (node["type"], name)


# ------------------------------------------------------------------------------------------ it runs


def in_a_graph(path: Path, object_info: dict[str, Any]) -> dict[str, Any]:
    """A workflow with the blueprint between a checkpoint, prompts and a size, and images of what comes out."""
    root, inside = parts(path)
    nodes, links = [root], []

    def add(kind: str, values: list[Any], **sources: tuple[int, int, str]) -> int:
        info = object_info[kind]
        node = {
            "id": 100 + len(nodes), "type": kind, "pos": [0, 0], "size": [300, 100], "flags": {}, "order": 0, "mode": 0,
            "properties": {}, "widgets_values": values, "inputs": [], "outputs": [],
        }  # fmt: skip
        nodes.append(node)
        node["outputs"] = [{"name": name, "type": name, "links": []} for name in info["output"]]
        for at, (name, (origin, slot, of_type)) in enumerate(sources.items()):
            node["inputs"].append({"name": name, "type": of_type, "link": None})
            connect(origin, slot, node["id"], at, of_type)
        return node["id"]

    def connect(origin: int, slot: int, target: int, at: int, of_type: str) -> None:
        links.append([len(links) + 1, origin, slot, target, at, of_type])
        by_id = {node["id"]: node for node in nodes}
        by_id[origin]["outputs"][slot]["links"].append(len(links))
        by_id[target]["inputs"][at]["link"] = len(links)

    loader = add("CheckpointLoaderSimple", ["fovea-scenes.safetensors"])
    makers = {
        "MODEL": lambda: (loader, 0),
        "CLIP": lambda: (loader, 1),
        "VAE": lambda: (loader, 2),
        "CONDITIONING": lambda: (add("CLIPTextEncode", [""], clip=(loader, 1, "CLIP")), 0),
        "LATENT": lambda: (add("EmptyLatentImage", [256, 256, 1]), 0),
        "IMAGE": lambda: (add("EmptyImage", [256, 256, 1, 0xE06030]), 0),
    }
    for at, socket in enumerate(list(root["inputs"])):
        connect(*makers[socket["type"]](), root["id"], at, socket["type"])
    for at, socket in enumerate(root["outputs"]):
        picture = (root["id"], at, socket["type"])
        if socket["type"] == "LATENT":
            picture = (add("VAEDecode", [], samples=picture, vae=(loader, 2, "VAE")), 0, "IMAGE")
        elif socket["type"] == "MASK":
            picture = (add("MaskToImage", [], mask=picture), 0, "IMAGE")
        if picture[2] == "IMAGE":
            add("PreviewImage", [], images=picture)
    for node in inside["nodes"]:
        values = widgets(node, object_info)
        values.update({name: value for name, value in OF_DEMO_MODEL.items() if name in values})
        values.update({"text": "a [red circle] and a [blue square]"} if "text" in values else {})
        node["widgets_values"] = [*values.values()]
    last = max(node["id"] for node in nodes)
    return {
        "id": inside["id"], "revision": 0, "last_node_id": last, "last_link_id": len(links), "nodes": nodes, "links": links,
        "groups": [], "definitions": {"subgraphs": [inside]}, "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


@each_blueprint
@pytest.mark.server
def test_the_host_offers_it(path: Path, server: HostServer) -> None:
    offered = {entry["name"]: (key, entry) for key, entry in server.get("/global_subgraphs").items()}
    key, entry = offered[path.stem]
    assert entry["info"]["node_pack"] == "custom_nodes.fovea-attention"
    assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == workflow_files.load(path)


@pytest.mark.newest
@each_blueprint
@pytest.mark.server
def test_it_runs_on_the_real_server(path: Path, server: HostServer, object_info: dict[str, Any]) -> None:
    workflow = in_a_graph(path, object_info)
    result = server.run(workflow_files.convert(workflow, object_info))
    wanted = [str(node["id"]) for node in workflow["nodes"] if node["type"] == "PreviewImage"]
    assert wanted and set(wanted) <= {picture.node for picture in result.pictures}
    for picture in result.pictures:
        with Image.open(io.BytesIO(server.fetch(picture))) as image:
            assert np.asarray(image.convert("RGB")).std() > 1, "an image of one colour"
