// Hovering over an image of "Attention Map Preview" shows the words with the most attention there, and their share of it.
//
// The node writes a small file of word maps to ComfyUI's temp folder (its format: attention/maps/hover.py) and names it in
// its output as `fovea_words`. This file only listens and shows a box of its own. It changes nothing in the front end, and
// shows nothing in a front end that lacks what it needs.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "AttnMapPreview";
const SHOWN_WORDS = 8;
const FORMAT = 1;

const outputs = new WeakMap(); // node -> its last output
const files = new Map(); // file name -> its content; null while it loads and where it cannot be read
let box = null;
let pointer = null; // the last event, for maps that load after it: a resting pointer or a tap sends no second one

/** The same function, with its errors caught and logged. */
function harmless(callback) {
  return (...args) => {
    try {
      return callback(...args);
    } catch (error) {
      console.debug("Fovea: hovering over attention maps does not work here.", error);
      return undefined;
    }
  };
}

// --- the node's output ---------------------------------------------------------------------------------------------

function outputOf(node) {
  const inSubgraph = node.graph && node.graph !== (app.rootGraph ?? app.graph);
  return outputs.get(node) ?? app.nodeOutputs?.[inSubgraph ? `${node.graph.id}:${node.id}` : node.id];
}

/** The word maps that belong to what the node shows, once they are loaded. */
function wordMapsOf(node) {
  const file = outputOf(node)?.fovea_words?.[0];
  if (!file) return null;
  if (!files.has(file.filename)) {
    if (files.size > 16) files.clear(); // those of earlier runs
    files.set(file.filename, null);
    load(file);
  }
  return files.get(file.filename);
}

async function load(file) {
  try {
    const answer = await api.fetchApi(`/view?${new URLSearchParams(file)}`);
    const content = answer.ok ? await answer.json() : null;
    if (content?.version !== FORMAT) return;
    for (const map of content.maps) map.levels = Uint8Array.from(atob(map.levels), (char) => char.charCodeAt(0));
    files.set(file.filename, content);
    if (pointer) harmless(point)(pointer);
  } catch (error) {
    console.debug("Fovea: the word maps could not be read.", error);
  }
}

/** Index of the node's image that an address belongs to; -1 for none. */
function imageIndexOf(node, address) {
  const name = new URL(address, location.href).searchParams.get("filename");
  return (outputOf(node)?.images ?? []).findIndex((image) => image.filename === name);
}

// --- what is under the pointer -------------------------------------------------------------------------------------

/** Where in an image a point of a frame lies, with the image whole and centred in it: fractions of its sides, or null. */
function pointInside(point, frame, image, most = Infinity) {
  const [left, top, width, height] = frame;
  const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight, most);
  const x = 0.5 + (point[0] - left - width / 2) / (image.naturalWidth * scale);
  const y = 0.5 + (point[1] - top - height / 2) / (image.naturalHeight * scale);
  return x >= 0 && x < 1 && y >= 0 && y < 1 ? { x, y } : null;
}

/** The hit of a node that is drawn on the canvas. */
function hitOnCanvas(event) {
  const canvas = app.canvas;
  if (event.target !== canvas?.canvas) return null;
  const [x, y] = canvas.convertEventToCanvasOffset(event);
  const node = canvas.graph?.getNodeOnPos?.(x, y);
  if (node?.comfyClass !== NODE || node.flags?.collapsed || !node.imgs?.length) return null;
  const point = [x - node.pos[0], y - node.pos[1]];
  if (node.imageIndex == null) {
    for (const [index, frame] of (node.imageRects ?? []).entries()) {
      const place = node.imgs[index] && pointInside(point, frame, node.imgs[index]);
      if (place) return { node, image: node.imgs[index], place };
    }
    return null;
  }
  const image = node.imgs[node.imageIndex];
  const widget = node.widgets?.find((each) => each.name === "$$canvas-image-preview");
  if (!image || !widget?.computedHeight) return null;
  const note = app.extensionManager?.setting?.get?.("Comfy.Node.AllowImageSizeDraw") === false ? 0 : 15;
  const place = pointInside(point, [0, widget.y, node.size[0], widget.computedHeight - note], image, 1);
  return place && { node, image, place };
}

/** The hit of a node that is made of page elements. */
function hitOnPage(event) {
  const element = event.target?.closest?.("[data-node-id]");
  const outer = element && app.canvas?.graph?.getNodeById?.(element.dataset.nodeId);
  const previews = outer ? [...previewsIn(outer)] : [];
  for (const image of previews.length ? element.querySelectorAll("img") : []) {
    const frame = image.getBoundingClientRect();
    const place = pointInside([event.clientX, event.clientY], [frame.left, frame.top, frame.width, frame.height], image);
    const node = place && previews.find((each) => imageIndexOf(each, image.src) >= 0);
    if (node) return { node, image, place };
  }
  return null;
}

/** The previews whose images a node may show: itself, or those in its subgraph, which it shows where they are promoted. */
function* previewsIn(node) {
  if (node.comfyClass === NODE) yield node;
  for (const inner of node.subgraph?.nodes ?? []) yield* previewsIn(inner);
}

/** The words at a hit, most attention first, and the position in the sampled image. */
function ranking({ node, image, place }) {
  const content = wordMapsOf(node);
  const shown = content?.pictures[imageIndexOf(node, image.src)];
  if (!shown) return null;
  const [x, y] = [place.x * shown.size[0], place.y * shown.size[1]];
  const panel = shown.panels.find(([left, top, width, height]) => x >= left && x < left + width && y >= top && y < top + height);
  if (!panel) return null;
  const [u, v] = [(x - panel[0]) / panel[2], (y - panel[1]) / panel[3]];
  const [columns, rows] = content.grid;
  const cell = Math.min(Math.floor(v * rows), rows - 1) * columns + Math.min(Math.floor(u * columns), columns - 1);
  const map = content.maps[shown.map];
  const share = (index) => (map.levels[index * columns * rows + cell] / 255) * map.highest[index];
  const words = content.words.map((word, index) => ({ word, share: share(index) })).sort((a, b) => b.share - a.share);
  return { u, v, words };
}

// --- the box -------------------------------------------------------------------------------------------------------

function element(parent, style, text = "") {
  const made = document.createElement("div");
  Object.assign(made.style, style);
  made.textContent = text;
  parent.append(made);
  return made;
}

function show(event, { u, v, words }) {
  box ??= element(document.body, {
    position: "fixed", zIndex: "10000", pointerEvents: "none", minWidth: "190px", padding: "8px 10px", borderRadius: "8px",
    background: "rgba(22, 23, 27, 0.94)", border: "1px solid #40434c", color: "#ecedf0", font: "12px/1.5 sans-serif",
  });
  box.replaceChildren();
  box.className = "fovea-words";
  element(box, { color: "#9ea2ac", marginBottom: "4px" }, `attention at ${u.toFixed(2)}, ${v.toFixed(2)}`);
  const most = words[0]?.share || 1;
  for (const { word, share } of words.slice(0, SHOWN_WORDS)) {
    const row = element(box, { display: "grid", gridTemplateColumns: "84px 1fr 46px", gap: "6px", alignItems: "center" });
    element(row, { overflow: "hidden", textOverflow: "ellipsis", whiteSpace: "nowrap" }, word);
    element(row, { height: "7px", borderRadius: "3px", background: "#4cc2ff", width: `${(100 * share) / most}%` });
    element(row, { textAlign: "right", color: "#9ea2ac" }, `${(100 * share).toFixed(1)} %`);
  }
  if (words.length > SHOWN_WORDS) element(box, { color: "#9ea2ac" }, `and ${words.length - SHOWN_WORDS} more words`);
  box.style.display = "block";
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${event.clientX + 18 + width > innerWidth ? event.clientX - 18 - width : event.clientX + 18}px`;
  box.style.top = `${Math.max(Math.min(event.clientY + 18, innerHeight - height - 6), 6)}px`;
}

function point(event) {
  pointer = event;
  const hit = hitOnCanvas(event) ?? hitOnPage(event);
  const found = hit && ranking(hit);
  if (found) show(event, found);
  else if (box) box.style.display = "none";
}

/** Hides the box when the mouse leaves the canvas, as no further event would. (A lifted finger leaves too, and is ignored.) */
function leave(event) {
  if (event.pointerType === "touch") return;
  pointer = null;
  if (box) box.style.display = "none";
}

let listening = false;

/** Listens on the element that holds the canvas and the nodes made of page elements. */
function listen() {
  const stage = app.canvas?.canvas?.parentElement;
  if (listening || !stage) return;
  listening = true;
  for (const kind of ["pointermove", "pointerdown"]) {
    stage.addEventListener(kind, harmless(point), { capture: true, passive: true });
  }
  stage.addEventListener("pointerleave", harmless(leave));
}

app.registerExtension({
  name: "fovea.attentionHover",
  nodeCreated: harmless((node) => {
    if (node.comfyClass !== NODE) return;
    listen();
    const before = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      outputs.set(this, output);
      return before?.call(this, output, ...rest);
    };
  }),
});
