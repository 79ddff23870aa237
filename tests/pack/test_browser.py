"""The pack in ComfyUI's real front end: a headless Chromium opens, runs, points, searches and reads help like a person."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import environment
import numpy as np
import pytest
from browser.front_end import FrontEnd
from environment.front_ends import front_end_version
from host_server import HostServer, SavedImage
from PIL import Image
from playwright.sync_api import Route, expect

from workflows import workflow_files

pytestmark = pytest.mark.server

MAPS = workflow_files.FOLDER / "Attention maps - where each word looks.json"
HELP = environment.ROOT / "web" / "docs"
HTML = "<img src=x onerror=window.__pwned=1>"

# What people type, and the node they are after. A host without `search_aliases` only looks at names.
SEARCHES = {
    "speed": "T-GATE Cache",
    "missing subject": "Attend-and-Excite Guider",
    "faster": "T-GATE Cache",
    "style transfer": "Attention Distillation Sampler",
    "cache": "T-GATE Cache",
    "neglect": "Attend-and-Excite Guider",
    "t-gate": "T-GATE Cache",
    "attention map": "Attention Map Preview",
    "heat map": "Capture Attention Maps",
    "daam": "Attention Map Preview",
}
IN_NAMES = {"cache", "t-gate", "attention map"}


@pytest.fixture(scope="module")
def our_nodes(object_info: dict[str, Any]) -> list[str]:
    return [kind for kind, info in object_info.items() if info["python_module"].endswith("fovea-attention")]


def test_it_is_the_front_end_of_this_host(ui: FrontEnd, host_path: Path) -> None:
    """Unless there is only the one that is installed: a host whose front end was not fetched is tested with that."""
    if environment.front_end_arguments(host_path):
        assert ui.version == front_end_version(host_path)


# Together they have every node that a template has; on the oldest front end the others would only take their time.
WITH_EVERY_NODE = ("All together", "DiT - class", "Masks", "Attention Distillation - seamless")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem.startswith(WITH_EVERY_NODE) else pytest.mark.newest)
        for path in workflow_files.shipped()
    ],
    ids=lambda path: path.stem,
)
def test_templates_open(path: Path, ui: FrontEnd, object_info: dict[str, Any]) -> None:
    """From the template browser, whole, and as what comfy-cli takes them for in all other tests."""
    ui.open_template(path.stem)
    workflow = workflow_files.load(path)
    assert sorted(node["type"] for node in ui.nodes()) == sorted(node["type"] for node in workflow["nodes"])
    assert [node for node in ui.nodes() if not node["known"]] == []
    queued, converted = ui.prompt(), workflow_files.convert(workflow, object_info)
    assert {node: entry["inputs"] for node, entry in queued.items()} == {
        node: entry["inputs"] for node, entry in converted.items()
    }


def test_widgets_survive_saving_and_loading(ui: FrontEnd, our_nodes: list[str]) -> None:
    """Every widget of every node of ours gets a value that is not its default."""
    changed = ui.page.evaluate(CHANGE_EVERY_WIDGET, our_nodes)
    assert set(changed) == set(our_nodes)
    saved = ui.page.evaluate("() => JSON.stringify(app.graph.serialize())")
    ui.page.evaluate("() => app.graph.clear()")
    ui.open(json.loads(saved))
    assert ui.page.evaluate(WIDGETS_BY_NODE) == changed


CHANGE_EVERY_WIDGET = """(kinds) => {
  app.graph.clear();
  const other = ({ type, value, options }) => {
    if (typeof value === "boolean") return !value;
    if (typeof value === "number") return value < options.max ? value + (options.step2 ?? 1) : options.min;
    return options.values ? options.values.at(-1) : "0.5:0.25, [a] \\\\[b\\\\]\\n<c>";
  };
  const changed = {};
  for (const kind of kinds) {
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    for (const widget of node.widgets ?? []) if (widget.type !== "button") widget.value = other(widget);
    changed[kind] = (node.widgets ?? []).map(({ name, value }) => [name, value]);
  }
  return changed;
}"""
WIDGETS_BY_NODE = """() => Object.fromEntries(
  app.graph.nodes.map(({ type, widgets }) => [type, (widgets ?? []).map(({ name, value }) => [name, value])]))"""


# ------------------------------------------------------------------------------------------ attention maps


def places(server: HostServer, run: dict[str, Any], node: str) -> dict[str, tuple[float, float]]:
    """Where the red and the blue thing are in the image that a node showed, as fractions of its sides."""
    image = server.outputs(run["prompt_id"])[node]["images"][0]
    data = server.fetch(SavedImage(node, image["filename"], image["subfolder"], image["type"]))
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened.convert("RGB"), dtype=np.float32)
    found = {}
    for name, channel in (("red", 0), ("blue", 2)):
        rows, columns = np.nonzero(pixels[..., channel] > 100 + np.delete(pixels, channel, axis=2).max(axis=2))
        found[name] = (columns.mean() / pixels.shape[1], rows.mean() / pixels.shape[0])
    return found


@pytest.mark.parametrize(
    "on_page", [pytest.param(False, marks=pytest.mark.newest), True], ids=["nodes on the canvas", "nodes on the page"]
)
def test_pointing_at_a_preview_ranks_the_words(on_page: bool, ui: FrontEnd, server: HostServer) -> None:
    """The shipped workflow, run by its button: the words of what is under the pointer come first, on every image."""
    ui.draw_nodes_on_page(on_page)
    try:
        ui.open(workflow_files.load(MAPS))
        run = ui.run()
        assert run["kind"] == "execution_success"
        for kind in ("KSampler", "AttnMapPreview"):
            assert ui.progress_of(ui.node(kind)) == 1
        where = places(server, run, ui.node("PreviewImage"))
        overlay, segments = [node["id"] for node in ui.nodes() if node["type"] == "AttnMapPreview"][:2]
        second = [] if on_page else [(overlay, 1)]  # some front ends show one image at a time there
        for node, index in ((overlay, 0), *second, (segments, 0)):
            ui.centre(node)
            left, top, width, _ = ui.image(node, index)
            for name, others in (("red", ("blue", "square")), ("blue", ("red", "circle"))):
                x, y = where[name]
                ranked = ui.words_at(left + x * width, top + y * width)  # square panels, with a legend below
                words, shares = zip(*ranked, strict=True)
                assert set(words) == {"a", "red", "circle", "and", "blue", "square"}
                assert list(shares) == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
                assert words.index(name) < min(map(words.index, others)), (node, index, ranked)
                expect(ui.read_out).to_contain_text(f"attention at {x:.2f}, {y:.2f}")
            ui.page.mouse.move(left - 12, top - 12)
            expect(ui.read_out).to_be_hidden()
        x, y = left + x * width, top + y * width
        ui.page.mouse.click(x, y)
        expect(ui.read_out).to_be_visible()
    finally:
        ui.draw_nodes_on_page(False)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_read_out_can_be_read_in_every_theme(theme: str, ui: FrontEnd) -> None:
    """Its text against what lies behind it: the contrast that WCAG asks for."""
    ui.choose_theme(theme)
    try:
        ui.open(workflow_files.load(MAPS))
        assert ui.run()["kind"] == "execution_success"
        node = ui.node("AttnMapPreview")
        ui.centre(node)
        left, top, width, height = ui.image(node)
        assert ui.words_at(left + width / 2, top + height / 2)
        looks = "(box) => [box, ...box.querySelectorAll('*')].map((part) => getComputedStyle(part).color)"
        behind = luminance(ui.read_out.evaluate("(box) => getComputedStyle(box).backgroundColor"))
        for colour in set(ui.read_out.evaluate(looks)):
            bright, dark = sorted((luminance(colour), behind), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, colour
    finally:
        ui.choose_theme("dark")


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of a computed colour, such as `rgb(22, 23, 27)`."""
    channels = [float(value) / 255 for value in re.findall(r"[0-9.]+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_html_in_a_prompt_is_text(ui: FrontEnd) -> None:
    """Punctuation ends a word today, so the file of words is also changed on its way to hold the whole tag."""

    def hostile(route: Route) -> None:
        answer = route.fetch()
        content = answer.json()
        assert "onerror" in content["words"]
        route.fulfill(response=answer, json={**content, "words": [HTML] * len(content["words"])})

    ui.open(workflow_files.load(MAPS))
    ui.set_widget(ui.node("FoveaPrompt"), "text", f"a red circle and {HTML}")
    ui.set_widget(ui.node("KSampler"), "steps", 2)
    ui.page.route("**/view?*fovea_words*", hostile)
    try:
        assert ui.run()["kind"] == "execution_success"
        node = ui.node("AttnMapPreview")
        ui.centre(node)
        left, top, width, height = ui.image(node)
        assert {word for word, _ in ui.words_at(left + width / 2, top + height / 2)} == {HTML}
        assert ui.read_out.locator("*:not(div)").count() == 0
        assert ui.page.evaluate("window.__pwned") is None
    finally:
        ui.page.unroute("**/view?*fovea_words*", hostile)


# ------------------------------------------------------------------------------------------ errors, search, help


# The names of the frames that are drawn around a node now.
FRAMES = """(id) => {
  const node = app.graph.getNodeById(id);
  return Object.keys(node.strokeStyles).filter((name) => node.strokeStyles[name].call(node));
}"""


def test_a_wrong_word_is_said_on_its_node(ui: FrontEnd) -> None:
    ui.open(workflow_files.load(MAPS))
    node = ui.node("AttnMapPreview")
    ui.set_widget(node, "words", "dog")
    run = ui.run()
    assert (run["kind"], run["node_id"]) == ("execution_error", node)
    assert "executionError" in ui.page.evaluate(FRAMES, node)
    details = ui.page.get_by_role("button", name="View details")  # newer front ends show the message on demand
    message = ui.page.get_by_text("words: 'dog' is not in the prompt. Words in the prompt: a, red, circle")
    expect(details.or_(message).first).to_be_visible()
    if details.count():
        details.first.click()
    expect(message.first).to_be_visible()


def test_nodes_are_found_by_what_people_type(ui: FrontEnd, object_info: dict[str, Any]) -> None:
    aliases = "search_aliases" in object_info["TGateCache"]
    for term in SEARCHES if aliases else sorted(IN_NAMES):
        expect(ui.search(term).filter(has_text=SEARCHES[term]).first).to_be_visible()


@pytest.mark.parametrize("path", workflow_files.blueprints(), ids=lambda path: path.stem)
def test_blueprints_are_found_and_come_whole(path: Path, ui: FrontEnd) -> None:
    """Found by its name like a node, put on the canvas with all that is in it."""
    ui.page.evaluate("() => app.graph.clear()")
    ui.search(path.stem.partition(" (")[0]).filter(has_text=path.stem).first.click()
    ui.page.wait_for_function("() => app.graph.nodes.length > 0")
    ui.put_down(700, 500)
    (root,) = ui.page.evaluate("() => app.graph.nodes.map((node) => node.serialize())")
    inside = ui.page.evaluate("() => app.graph.nodes[0].subgraph.nodes.map(({ type }) => type)")
    blueprint = workflow_files.load(path)
    (wanted,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert sorted(inside) == sorted(node["type"] for node in subgraph["nodes"])
    for kind in ("inputs", "outputs"):
        found = [slot["name"] for slot in root[kind] if not slot.get("widget")]
        assert found == [slot["name"] for slot in wanted[kind]]
    shown = ui.page.evaluate("() => app.graph.nodes[0].widgets.map(({ name }) => name.split(': ').at(-1))")
    seed = {"control_after_generate"}  # which newer front ends show as a part of the seed
    assert [name for name in shown if name not in seed] == [
        name for _, name in wanted["properties"]["proxyWidgets"] if name not in seed
    ]


def test_help_pages_open(ui: FrontEnd, our_nodes: list[str]) -> None:
    """The button that appears above a selected node."""
    for kind in our_nodes:
        title = (HELP / f"{kind}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        ui.open_help(kind)
        expect(ui.page.get_by_role("heading", name=title, exact=True, level=1)).to_be_visible()
        shown = ui.page.locator("img[src*='/docs/images/']").element_handle()
        ui.page.wait_for_function("(image) => image.naturalWidth > 0", arg=shown)
