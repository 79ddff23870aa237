"""What nodes show and do in ComfyUI's real front end: what they did in a run, files that are saved and uploaded."""

from __future__ import annotations

import itertools
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from browser.front_end import FrontEnd
from host_server import HostServer
from playwright.sync_api import expect

from workflows import workflow_files

pytestmark = pytest.mark.server

BOTH = pytest.mark.parametrize(
    "on_page", [pytest.param(False, marks=pytest.mark.newest), True], ids=["nodes on the canvas", "nodes on the page"]
)
SEEDS = itertools.count(1000)  # ComfyUI would take a run that it has made before from its cache, and nothing would be done
SHORTEN = """([steps, seed]) => {
  const values = { steps, seed, noise_seed: seed, max_refinements: 1 };
  const change = (node) => {
    for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
    node.subgraph?.nodes.forEach(change);
  };
  app.graph.nodes.forEach(change);
}"""
# What the server says of nodes, in its order.
LISTEN = """() => {
  if (window.foveaTexts) return foveaTexts.splice(0);
  window.foveaTexts = [];
  app.api.addEventListener("fovea.text", ({ detail }) => foveaTexts.push(detail));
  app.api.addEventListener("progress", ({ detail }) => foveaTexts.push({ node: detail.node, progress: detail.value }));
}"""
BOUNDS = """(id) => {
  const node = app.graph.getNodeById(id), text = node.widgets.find(({ name }) => name === "fovea_text");
  const inside = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
  const own = text.element.getBoundingClientRect();
  const { ds, canvas } = app.canvas, corner = canvas.getBoundingClientRect();
  const bottom = inside?.bottom ?? corner.top + (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale;
  return { below: own.bottom - bottom, cut: text.element.scrollHeight - text.element.clientHeight };
}"""


def open_and_listen(ui: FrontEnd, workflow: dict[str, Any], steps: int = 4) -> None:
    ui.open(workflow)
    ui.page.evaluate(SHORTEN, [steps, next(SEEDS)])
    ui.page.evaluate(LISTEN)


def run(ui: FrontEnd) -> dict[str, Any]:
    ended = ui.run()
    assert ended["kind"] == "execution_success", ended
    return ended


def template(name: str) -> dict[str, Any]:
    return workflow_files.load(workflow_files.FOLDER / f"{name}.json")


@BOTH
def test_what_a_node_did_is_shown_on_it(on_page: bool, ui: FrontEnd) -> None:
    """After the run, when the front end has taken its own texts away; whole and inside the node, and in no other tab."""
    ui.draw_nodes_on_page(on_page)
    try:
        open_and_listen(ui, template("T-GATE - same image, faster"))
        run(ui)
        gate = ui.node("TGateCache")
        ui.centre(gate)
        expect(ui.node_texts).to_have_count(1)
        expect(ui.node_texts).to_contain_text(re.compile(r"T-GATE: \d+ of \d+ steps skipped"))
        bounds = ui.page.evaluate(BOUNDS, gate)
        assert bounds["below"] <= 1 and bounds["cut"] <= 1, bounds
        saved = ui.page.evaluate("() => JSON.stringify(app.graph.serialize())")
        assert "steps skipped" not in saved and "fovea_text" not in json.dumps(ui.prompt())
        ui.open(json.loads(saved))  # in a tab of its own, in which nothing has run
        ui.page.wait_for_timeout(500)
        expect(ui.node_texts).to_have_count(0)
    finally:
        ui.draw_nodes_on_page(False)


@pytest.mark.newest
def test_cost_is_told_before_the_first_step(ui: FrontEnd) -> None:
    open_and_listen(ui, template("Attend-and-Excite - every subject in the image"))
    run(ui)
    guider, told = ui.node("AttendExciteGuider"), ui.page.evaluate("foveaTexts")
    lines = {at: each["lines"] for at, each in enumerate(told) if each["node"] == guider}
    (cost, before), (done, after) = list(lines.items())[-2:]
    assert len(before) == len(after) == 1
    assert re.search(r"gradient passes.*: about [\d.]+( to [\d.]+)? times as long as without$", before[0])
    assert after[0].startswith("Attend-and-Excite: ") and "refinements" in after[0]
    assert any("progress" in each for each in told[cost:done])


@pytest.mark.newest
def test_a_node_in_a_subgraph_has_its_text_when_it_is_opened(ui: FrontEnd) -> None:
    """Of a run while it was closed, in which the front end's own text is lost."""
    open_and_listen(ui, template("T-GATE - same image, faster"))
    outer = ui.page.evaluate(INTO_SUBGRAPH, ui.node("TGateCache"))
    run(ui)
    assert ui.node_texts.count() == 0
    ui.page.evaluate("(id) => app.canvas.setGraph(app.graph.getNodeById(id).subgraph)", outer)
    try:
        expect(ui.node_texts).to_contain_text("steps skipped")
    finally:
        ui.page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")


INTO_SUBGRAPH = """(id) => {
  const { node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]));
  return String(node.id);
}"""


# ------------------------------------------------------------------------------------------ files


SAVE_AND_LOAD = """() => {
  const preview = app.graph.nodes.find(({ type }) => type === "AttnMapPreview");
  const [maps, images] = ["attn_maps", "images"].map((name) => preview.inputs.find((input) => input.name === name));
  const from = ({ link }) => {
    const { origin_id, origin_slot } = app.graph.links.get?.(link) ?? app.graph.links[link];
    return [app.graph.getNodeById(origin_id), origin_slot];
  };
  const save = LiteGraph.createNode("FoveaSaveAttnMaps"), load = LiteGraph.createNode("FoveaLoadAttnMaps");
  for (const node of [save, load]) app.graph.add(node);
  const [[capture, at], [decode, out]] = [from(maps), from(images)];
  capture.connect(at, save, 0);
  decode.connect(out, save, 1);
  save.pos = [0, -400];
  load.pos = [500, -400];
  return [String(save.id), String(load.id)];
}"""


@BOTH
def test_maps_are_saved_under_a_name_with_marks_and_uploaded(
    on_page: bool, ui: FrontEnd, server: HostServer, tmp_path: Path
) -> None:
    ui.draw_nodes_on_page(on_page)
    try:
        open_and_listen(ui, template("Attention maps - where each word looks"))
        save, load = ui.page.evaluate(SAVE_AND_LOAD)
        ui.set_widget(save, "filename_prefix", "attention/%date:yyyy-MM-dd%-%width%x%height%-%KSampler.seed%-%nothing%")
        seed = ui.page.evaluate(
            "(id) => app.graph.getNodeById(id).widgets.find(({ name }) => name === 'seed').value", ui.node("KSampler")
        )
        ui.page.evaluate("(id) => { app.graph.getNodeById(id).mode = 2; }", load)  # it has no file yet
        day = datetime.now().strftime("%Y-%m-%d")
        ended = run(ui)
        (name,) = server.outputs(ended["prompt_id"])[save]["text"]
        assert re.fullmatch(rf"attention/{day}-(\d+)x\1-{seed}-%nothing%_\d{{5}}_\.attn\.safetensors", name), name
        ui.centre(save)
        expect(ui.node_texts.filter(has_text=f"output/{name}")).to_be_visible()

        file = tmp_path / f"from a friend {on_page}.attn.safetensors"
        file.write_bytes((server.base / "output" / name).read_bytes())
        with ui.page.expect_file_chooser() as choosing:
            ui.press(load, "choose file to upload")
        choosing.value.set_files(file)
        chosen = "(id) => app.graph.getNodeById(id).widgets.find(({ name }) => name === 'file').value"
        ui.page.wait_for_function(f"([id, name]) => ({chosen})(id) === name", arg=[load, file.name])
        assert (server.base / "input" / file.name).read_bytes() == file.read_bytes()

        ui.page.evaluate(LOADED_INTO_PREVIEW, load)
        run(ui)
        assert ui.prompt()[load]["inputs"]["file"] == file.name
    finally:
        ui.draw_nodes_on_page(False)


LOADED_INTO_PREVIEW = """(id) => {
  const load = app.graph.getNodeById(id);
  load.mode = 0;
  load.connect(0, app.graph.nodes.find(({ type }) => type === "AttnMapPreview"), 0);
}"""
