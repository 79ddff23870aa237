"""Drive ComfyUI's real front end in a headless Chromium, the way a person works it.

What a person clicks or types is clicked or typed. Only what differs between front ends without mattering here (where a node
lies on the screen, when a page is ready) is asked of the page's own `app`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Locator, Page, Playwright, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

PATIENCE = 180_000  # ms; only ever waited for in full when something is broken
GLANCE = 6_000  # ms, for what can be tried again
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# For images that are looked at, not tested.
TO_LOOK_AT = {
    "Comfy.TutorialCompleted": True,  # else a first visit opens the template browser
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # titles and values at every zoom
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The front end has opened a first workflow of its own, the last thing it does.
READY = """() => !!(window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded
  && app.graph && window.LiteGraph?.registered_node_types.AttnMapPreview)"""
FOLLOW_RUNS = """() => {
  window.foveaRuns = [];
  window.foveaProgress = {};
  app.api.addEventListener("progress", ({ detail }) => { foveaProgress[detail.node] = detail.value / detail.max; });
  for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
    app.api.addEventListener(kind, ({ detail }) => foveaRuns.push({ kind, ...detail }));
}"""
CENTRE = """([id, scale]) => {
  app.canvas.ds.scale = scale;
  app.canvas.centerOnNode(app.graph.getNodeById(id));
  app.canvas.setDirty(true, true);
}"""
FIT = """() => {
  const nodes = app.graph.nodes, canvas = app.canvas;
  const ends = (at) => [Math.min(...nodes.map((n) => n.pos[at])), Math.max(...nodes.map((n) => n.pos[at] + n.size[at]))];
  const [[left, right], [top, bottom]] = [ends(0), ends(1)];
  canvas.ds.scale = Math.min(innerWidth / (right - left + 300), innerHeight / (bottom - top + 260));
  canvas.ds.offset = [(innerWidth / canvas.ds.scale - left - right) / 2, (innerHeight / canvas.ds.scale - top - bottom) / 2];
  canvas.setDirty(true, true);
}"""
SELECT_NEW = """(kind) => {
  app.graph.clear();
  const node = LiteGraph.createNode(kind);
  app.graph.add(node);
  app.canvas.ds.scale = 0.5;
  app.canvas.centerOnNode(node);
  app.canvas.selectNode(node);
}"""
# Left, top, width and height in the window of a node's image: of its page element, else as the canvas draws it.
IMAGE = """([id, index]) => {
  const fit = (image, left, top, width, height, most = Infinity) => {
    if (!image.naturalWidth) return null;
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight, most);
    const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
    return [left + (width - w) / 2, top + (height - h) / 2, w, h];
  };
  const element = document.querySelectorAll(`[data-node-id="${id}"] img`)[index];
  if (element) {
    const frame = element.getBoundingClientRect();
    return fit(element, frame.left, frame.top, frame.width, frame.height);
  }
  const node = app.graph.getNodeById(id), image = node.imgs?.[index];
  const widget = node.widgets.find(({ name }) => name === "$$canvas-image-preview"), line = 15;
  if (!image || !widget) return null;
  const alone = [0, widget.y, node.size[0], widget.computedHeight - line, 1];
  const frame = node.imageIndex === null ? node.imageRects?.[index] : alone;
  const inside = frame && fit(image, ...frame);
  if (!inside) return null;
  const { ds, canvas } = app.canvas, corner = canvas.getBoundingClientRect(), [left, top, width, height] = inside;
  return [corner.left + (node.pos[0] + left + ds.offset[0]) * ds.scale,
          corner.top + (node.pos[1] + top + ds.offset[1]) * ds.scale, width * ds.scale, height * ds.scale];
}"""
# The middle of a widget that is drawn on the canvas, in the window.
WIDGET = """([id, name]) => {
  const node = app.graph.getNodeById(id), widget = node.widgets.find((each) => each.name === name);
  const { ds, canvas } = app.canvas, corner = canvas.getBoundingClientRect();
  const height = widget.computedHeight ?? LiteGraph.NODE_WIDGET_HEIGHT;
  return [corner.left + (node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale,
          corner.top + (node.pos[1] + widget.y + height / 2 + ds.offset[1]) * ds.scale];
}"""
STILL_IMAGE = f"""async ([wanted, patience]) => {{
  const image = {IMAGE}, end = performance.now() + patience;
  while (performance.now() < end) {{
    const before = image(wanted);
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    if (before && JSON.stringify(before) === JSON.stringify(image(wanted))) return before;
  }}
}}"""


def find_chromium(playwright: Playwright) -> str | None:
    """Find the system's Chromium or Chrome, else the one Playwright has downloaded."""
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    own = playwright.chromium.executable_path
    return installed or (own if Path(own).is_file() else None)


@contextlib.contextmanager
def browser_page() -> Iterator[Page | None]:
    """Open an empty page in a headless browser; yields None where there is no browser."""
    with sync_playwright() as playwright:
        chromium = find_chromium(playwright)
        if chromium is None:
            yield None
            return
        with playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False, args=FLAGS) as browser:
            yield browser.new_page(viewport={"width": 1500, "height": 1000})


class FrontEnd:
    """One page with ComfyUI in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []  # what went wrong in our own script
        page.set_default_timeout(PATIENCE)
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self._complain(f"{error}\n{error.stack or ''}"))
        page.route(
            re.compile(r"/templates/index[^/]*\.json"), lambda route: route.fulfill(json=[])
        )  # hundreds, none of them ours
        page.goto(url)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(READY)
        self.page.evaluate(FOLLOW_RUNS)

    def clear(self) -> None:
        """Start again where something covers the canvas: each kind of box closes in another way in every front end."""
        if self.page.locator("[role=dialog], .p-dialog-mask").count():
            self.page.reload()
            self._wait_until_ready()

    def _listen(self, message: ConsoleMessage) -> None:
        self._complain(f"{message.text} ({message.location.get('url', '')})")

    def _complain(self, text: str) -> None:
        """Keep what is ours: the front end itself logs much, such as every help page that is not there in the user's language."""
        if "Fovea:" in text or re.search(r"/extensions/fovea[^ ]*\.js", text):
            self.complaints.append(text)

    @property
    def version(self) -> str:
        return self.page.evaluate("__COMFYUI_FRONTEND_VERSION__")

    # -- workflows

    def open(self, workflow: dict[str, Any]) -> None:
        """Load a workflow as if its file had been dropped on the canvas."""
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow); }", workflow)

    def open_template(self, name: str) -> None:
        """Choose a template in the template browser, once its thumbnail is there."""
        dialog = self.page.get_by_role("dialog")
        card = dialog.get_by_test_id(f"template-workflow-{name}")
        self._wait_for_thumbnail(name, dialog.get_by_placeholder("Search"), card)
        card.click()
        dialog.wait_for(state="detached")

    def _wait_for_thumbnail(self, name: str, search: Locator, card: Locator) -> None:
        """Search until the card shows its image, in a browser that is opened where there is none (or none any more).

        On a busy machine some front ends believe that a card which came into view has left it: they read the first of
        the observer's entries where the last one counts. When the card has gone and comes back, it looks again.
        """
        for _ in range(PATIENCE // GLANCE):
            with contextlib.suppress(PlaywrightTimeout):
                if not search.count():
                    self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
                search.fill("qqxxzz", timeout=GLANCE)
                card.wait_for(state="detached", timeout=GLANCE)
                search.fill(name, timeout=GLANCE)
                shown = card.locator("img:not([src*=default-template])").first.element_handle(timeout=GLANCE)
                self.page.wait_for_function("(picture) => picture.naturalWidth > 0", arg=shown, timeout=GLANCE)
                return
        raise AssertionError(f"the template browser shows no thumbnail for {name!r}")

    def nodes(self) -> list[dict[str, Any]]:
        """List type, id, and whether the front end knows the type, of every node in the open workflow."""
        known = "known: type in LiteGraph.registered_node_types"
        return self.page.evaluate(f"() => app.graph.nodes.map(({{ id, type }}) => ({{ id: String(id), type, {known} }}))")

    def prompt(self) -> dict[str, Any]:
        """Return the open workflow in the form in which the front end would queue it."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def set_widget(self, node: str, name: str, value: Any) -> None:
        self.page.evaluate(
            "([id, name, value]) => { app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value = value; }",
            [node, name, value],
        )

    def run(self) -> dict[str, Any]:
        """Press Run and wait for the end; returns the server's last message about it."""
        before = self.page.evaluate("foveaRuns.length")
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function("(before) => foveaRuns.length > before", arg=before)
        return self.page.evaluate("foveaRuns.at(-1)")

    def progress_of(self, node: str) -> float | None:
        """Return a node's last reported progress, from 0 to 1; None where it reported nothing."""
        return self.page.evaluate("(node) => foveaProgress[node]", node)

    def node(self, kind: str) -> str:
        """Find the id of the first node of a kind."""
        return next(node["id"] for node in self.nodes() if node["type"] == kind)

    # -- looking and pointing

    def choose_theme(self, name: str) -> None:
        """Choose ``dark`` or ``light``, the front end's own themes."""
        self.page.evaluate("async (name) => { await app.extensionManager.setting.set('Comfy.ColorPalette', name); }", name)

    def draw_nodes_on_page(self, wanted: bool) -> None:
        """Draw nodes as page elements ("Nodes 2.0"), or on the canvas."""
        self.page.evaluate("async (on) => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on); }", wanted)

    def centre(self, node: str, scale: float = 1.0) -> None:
        self.page.evaluate(CENTRE, [node, scale])

    def fit(self) -> None:
        """Show the whole graph."""
        self.page.evaluate(FIT)

    def image(self, node: str, index: int = 0) -> tuple[float, float, float, float]:
        """Return left, top, width and height of a node's image in the window, once it has settled there."""
        frame = self.page.evaluate(STILL_IMAGE, [[node, index], PATIENCE])
        assert frame, f"node {node} shows no image {index}"
        return tuple(frame)

    @property
    def read_out(self) -> Locator:
        """The box that our script shows."""
        return self.page.locator(".fovea-words")

    def words_at(self, x: float, y: float) -> list[tuple[str, float]]:
        """Point at a place in the window; returns the words in the read-out and their shares in percent, in its order."""
        self.page.mouse.move(x, y)
        self.read_out.wait_for(state="visible")
        cells = "(box) => [...box.children].map((row) => [...row.children].map((cell) => cell.textContent))"
        return [(row[0], float(row[2].removesuffix(" %"))) for row in self.read_out.evaluate(cells) if row]

    def press(self, node: str, widget: str) -> None:
        """Press a button of a node, in the middle of where the front end draws it."""
        self.centre(node)
        self.page.wait_for_timeout(200)
        shown = self.page.locator(f'[data-node-id="{node}"]').get_by_role("button", name=widget)
        if shown.count():
            shown.first.click()
        else:
            self.page.mouse.click(*self.page.evaluate(WIDGET, [node, widget]))

    @property
    def node_texts(self) -> Locator:
        """The lines of a run that our script shows on nodes."""
        return self.page.locator(".fovea-text").filter(visible=True)

    # -- finding

    def search(self, term: str) -> Locator:
        """Type into the node search; returns the results."""
        box = self.page.get_by_placeholder(re.compile("Add a node|Search Nodes"))
        if not box.count():
            self.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        results = self.page.get_by_role("option")
        box.fill("qqxxzz")  # the results of an earlier search go away
        expect(results.filter(has_text="Fovea")).to_have_count(0)
        box.fill(term)
        return results

    def put_down(self, x: float, y: float) -> None:
        """Put down a node found by search: some front ends carry it with the pointer; a first click only closes the search."""
        for _ in range(PATIENCE // GLANCE):
            self.page.mouse.click(x, y)
            with contextlib.suppress(PlaywrightTimeout):
                self.page.wait_for_function("() => app.canvas.state?.ghostNodeId == null", timeout=GLANCE // 6)
                return
        raise AssertionError("the node is still carried by the pointer")

    def open_help(self, kind: str) -> None:
        """Select a new node, and press the button above it that opens its help."""
        self.page.evaluate(SELECT_NEW, kind)
        self.page.get_by_test_id("info-button").first.click()
