"""Take images of every node and template, drawn on the canvas and as page elements ("Nodes 2.0"), to look at.

    python dev look [--front-end VERSION] [--only nodes|templates] [--out FOLDER]

Nodes are all in one image, dark and light, with a line of a run on those that show one; templates have an image each, dark. Needs
Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import environment
from environment.front_ends import FRONT_END, front_end_folder
from host_server import HostServer

from browser.front_end import TO_LOOK_AT, FrontEnd, browser_page
from workflows import workflow_files

WIDTH, HEIGHT = 2600, 2000
# The pack's nodes in columns, each as high as ComfyUI makes a new node.
PLACE = """async () => {
  app.graph.clear();
  const ours = ({ nodeData }) => (nodeData?.python_module ?? "").endsWith("fovea-attention");
  const nodes = Object.values(LiteGraph.registered_node_types).filter(ours).map(({ type }) => LiteGraph.createNode(type));
  let [x, y, widest] = [0, 0, 0];
  for (const node of nodes.sort((a, b) => b.size[1] - a.size[1])) {
    app.graph.add(node);
    if (y && y + node.size[1] > 1650) [x, y, widest] = [x + widest + 50, 0, 0];
    node.pos = [x, y + 30];
    y += node.size[1] + 150;
    widest = Math.max(widest, node.size[0]);
  }
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [120, 110];
  app.canvas.setDirty(true, true);
  return nodes.map((node) => [node.type, ...[...node.size].map(Math.round)]);
}"""
LINES = {
    "TGateCache": "T-GATE: cross-attention reused in 15 of 25 steps, negative prompt skipped in 15, self-attention reused in 6; "
    "another node changes self-attention, so it is always computed",
    "AttnMapCapture": "Attention maps: 12 layers in 25 of 25 steps, positive and negative prompt",
    "AttendExciteGuider": 'Attend-and-Excite: 12 guided steps, 31 refinements, weakest subject "frog" 0.12 -> 0.81',
    "AttentionDistillSampler": "Attention Distillation: 25 of 25 steps with 3 optimisation steps each, 75 gradient passes: about "
    "4.3 times as long as without",
    "FoveaSaveAttnMaps": "output/attention/maps_00001_.attn.safetensors",
    "FoveaSeamless": "Seamless Tiling: the image may show a seam, because the model halves it 3 times and cannot halve width 520 "
    "(use 512 or 576). Sides that repeat must be multiples of 64 pixels.",
}
TELL = """(lines) => {
  for (const { id, type } of app.graph.nodes) {
    const detail = { node: String(id), kind: type, workflow: null, lines: [lines[type]] };
    if (lines[type]) app.api.dispatchCustomEvent("fovea.text", detail);
  }
}"""


def look_at_nodes(ui: FrontEnd, out: Path) -> None:
    """Take an image of all nodes for each theme and rendering, and print their sizes."""
    for theme in ("dark", "light"):
        ui.choose_theme(theme)
        for on_page in (False, True):
            ui.draw_nodes_on_page(on_page)
            ui.page.wait_for_timeout(1500)
            sizes = ui.page.evaluate(PLACE)
            ui.page.evaluate(TELL, LINES)
            ui.page.wait_for_timeout(2500)
            name = f"{ui.version}-{'page' if on_page else 'canvas'}-{theme}"
            ui.page.screenshot(path=out / f"{name}.png")
            print(name, *(f"{node} {width}x{height}" for node, width, height in sizes), sep="\n  ")


def look_at_templates(ui: FrontEnd, out: Path) -> None:
    """Take an image of each template for each rendering."""
    ui.choose_theme("dark")
    for on_page in (False, True):
        ui.draw_nodes_on_page(on_page)
        for path in workflow_files.shipped():
            ui.open(workflow_files.load(path))
            ui.fit()
            ui.page.wait_for_timeout(2000)
            target = out / f"{ui.version}-{'page' if on_page else 'canvas'}-{path.stem}.png"
            ui.page.screenshot(path=target)
            print(target)


LOOKS = {"nodes": look_at_nodes, "templates": look_at_templates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front-end", help="a version in the environment's front-ends folder; without it, the ComfyUI's own")
    parser.add_argument("--only", choices=list(LOOKS))
    parser.add_argument("--out", type=Path, default=environment.ROOT / ".fovea" / "looks")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    host = Path(os.environ["COMFYUI_PATH"])
    pages = environment.front_end_arguments(host)
    if given.front_end:
        pages = ("--front-end-root", str(front_end_folder(given.front_end) / FRONT_END.replace("-", "_") / "static"))
    with (
        tempfile.TemporaryDirectory() as base,
        HostServer(host, Path(base), arguments=pages) as server,
        browser_page() as page,
    ):
        server.request("/settings", TO_LOOK_AT)
        if page is None:
            sys.exit("There is no Chromium.")
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        ui = FrontEnd(page, server.url)
        for look in LOOKS if given.only is None else (given.only,):
            LOOKS[look](ui, given.out)


if __name__ == "__main__":
    main()
