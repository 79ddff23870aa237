// What a node did in a run, as the console says it, is shown on the node: reused steps, refinements, why something was skipped.
//
// The server (attention/host/node_text.py) sends `fovea.text` with the lines of one node. ComfyUI's own text below a node is
// not enough: newer front ends take it away when the run ends, and it is lost for nodes in a subgraph that is not open.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "fovea.text";
const WIDGET = "fovea_text";
const MARGIN = 6;
const LOOK = {
  boxSizing: "border-box", padding: "4px 6px", font: "11px/1.4 sans-serif", color: "var(--input-text, #ddd)", opacity: "0.85",
  whiteSpace: "pre-line", overflowWrap: "anywhere",
};

// The messages of each workflow, for its nodes are made anew when its tab is opened again, and on undo.
const known = new Map(); // id of a workflow -> { tab, messages: id of a node in a prompt -> message }

/** The same function, with its errors caught and logged. */
function harmless(callback) {
  return (...args) => {
    try {
      return callback(...args);
    } catch (error) {
      console.debug("Fovea: what a node did cannot be shown on it here.", error);
      return undefined;
    }
  };
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** The node of an id such as "5", or "12:5" for node 5 in the subgraph of node 12. */
function nodeOf(id) {
  let graph = rootGraph();
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

// --- on the node ---------------------------------------------------------------------------------------------------

let ruler = null;

/** Height of a text in a node of this width. */
function heightOf(text, width) {
  if (!ruler) {
    ruler = document.createElement("div");
    Object.assign(ruler.style, LOOK, { position: "absolute", visibility: "hidden", left: "-9999px", top: "0" });
    app.canvas.canvas.parentElement.append(ruler);
  }
  ruler.style.width = `${Math.max(width - 2 * MARGIN, 60)}px`;
  if (ruler.textContent !== text) ruler.textContent = text;
  return ruler.offsetHeight;
}

function addText(node) {
  const element = document.createElement("div");
  element.className = "fovea-text";
  Object.assign(element.style, LOOK);
  const height = () => heightOf(element.textContent, node.size[0]) + 2 * MARGIN;
  const options = {
    serialize: false, hideOnZoom: false, margin: MARGIN, getValue: () => element.textContent, getMinHeight: height, getMaxHeight: height,
  };
  const widget = node.addDOMWidget(WIDGET, "fovea_text", element, options);
  widget.serialize = false;
  return widget;
}

function show({ node: id, kind, lines }) {
  const node = nodeOf(id);
  if (!node || (node.comfyClass ?? node.type) !== kind) return;
  let widget = node.widgets?.find((each) => each.name === WIDGET);
  if (!lines.length) {
    if (widget) node.removeWidget(widget);
  } else {
    widget ??= addText(node);
    widget.element.textContent = lines.join("\n");
    // Nodes that are page elements grow by themselves.
    if (!globalThis.LiteGraph?.vueNodesMode) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  }
  app.graph?.setDirtyCanvas?.(true, true);
}

// --- messages ------------------------------------------------------------------------------------------------------

/** What tells two tabs of one workflow apart. */
function openTab() {
  return app.extensionManager?.workflow?.activeWorkflow?.path;
}

function receive({ detail }) {
  const here = rootGraph()?.id;
  const workflow = detail.workflow ?? here;
  if (!known.has(workflow)) known.set(workflow, { messages: new Map() });
  const kept = known.get(workflow);
  kept.tab = workflow === here ? openTab() : undefined;
  kept.messages.set(detail.node, detail);
  if (workflow === here) show(detail);
}

/** Show what is known of the open workflow, and nothing in another tab of it. */
function showAgain() {
  const kept = known.get(rootGraph()?.id);
  if (!kept) return;
  const elsewhere = kept.tab !== undefined && kept.tab !== openTab();
  for (const message of kept.messages.values()) show(elsewhere ? { ...message, lines: [] } : message);
}

app.registerExtension({
  name: "fovea.nodeText",
  setup: harmless(() => api.addEventListener(EVENT, harmless(receive))),
  // Which tab is open is known a little later, and later still where nodes are page elements.
  afterConfigureGraph: () => [200, 1500].forEach((wait) => setTimeout(harmless(showAgain), wait)),
});
