"""The shipped workflows for models that the tests do not have, run by ComfyUI's executor on tiny random ones of the family.

The images mean nothing there: what counts is that every node takes what it is given, and that each technique did its work.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from pathlib import Path
from typing import Any

import folder_paths
import graph_runs
import pytest
import tiny_loaders
from workflows.workflow_files import computing_nodes, load, other_models

from workflows import workflow_files

pytestmark = pytest.mark.server  # its list of nodes

SMALL = {"width": 128, "height": 128, "steps": 4, "length": 5, "max_refinements": 1, "iterations": 1}
CONTROLNET = "Attention Distillation with ControlNet - structure and style"
# The family, and what the log says of a run.
RUNS = {
    "T-GATE for SDXL - same image, faster": ("sdxl", "of 4 steps skipped, their predictions extrapolated"),
    "T-GATE for Flux - same image, faster": ("flux", "of 4 steps skipped, their predictions extrapolated"),
    "Attend-and-Excite for SDXL - every subject in the image": ("sdxl", "Attend-and-Excite: 2 guided steps"),
    "Attend-and-Excite for Flux - every subject in the image": ("flux", "Attend-and-Excite: 1 guided step"),
    "Attention maps for Wan - a word through a video": ("wan_t2v", "Attention maps: 2 layers in 4 of 4 steps"),
    CONTROLNET: ("scenes", "Attention Distillation"),
}


def test_every_workflow_runs_somewhere() -> None:
    assert {path.stem for path in workflow_files.shipped() if other_models(load(path))} == set(RUNS)


def node_class(kind: str, module: str) -> type:
    """A node of ComfyUI by its id; its modules list their nodes in two ways."""
    found = importlib.import_module(module)
    if kind in getattr(found, "NODE_CLASS_MAPPINGS", {}):
        return found.NODE_CLASS_MAPPINGS[kind]

    async def listed() -> list[Any]:
        return await (await found.comfy_entrypoint()).get_node_list()

    return next(node for node in asyncio.run(listed()) if node.GET_SCHEMA().node_id == kind)


@pytest.mark.newest
@pytest.mark.parametrize("name", RUNS)
def test_it_runs_on_a_tiny_model_of_the_family(
    name: str, object_info: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, said = RUNS[name]
    workflow = load(workflow_files.FOLDER / f"{name}.json")
    prompt = workflow_files.convert(workflow, object_info)
    for entry in prompt.values():
        entry["inputs"].update({key: value for key, value in SMALL.items() if key in entry["inputs"]})
    run = graph_runs.executor(monkeypatch)
    import nodes

    for node in computing_nodes(workflow):
        kind = node["type"]
        if kind not in nodes.NODE_CLASS_MAPPINGS:
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind, node_class(kind, object_info[kind]["python_module"]))
    loaders = {
        "CheckpointLoaderSimple": tiny_loaders.loader(family, 0, 1, 2),
        "UNETLoader": tiny_loaders.loader(family, 0),
        "CLIPLoader": tiny_loaders.loader(family, 1),
        "VAELoader": tiny_loaders.loader(family, 2),
        "ControlNetLoader": tiny_loaders.LoadControlNet,
    }
    for kind, each in loaders.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind, each)
    for place in ("output", "temp"):
        monkeypatch.setattr(folder_paths, f"{place}_directory", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="fovea"):
        run(prompt)  # raises what a node raises
    viewers = [node for node in computing_nodes(workflow) if object_info[node["type"]]["output_node"]]
    assert len(list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.webp"))) >= len(viewers)
    assert said in caplog.text
