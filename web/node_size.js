// New nodes are wide enough for their names and values, and in "Nodes 2.0" only as tall as what they show: the front end gives
// a node the height of its advanced settings too, which are hidden there, and so leaves half of it empty.

import { app } from "../../scripts/app.js";

const WIDTHS = { TGateCache: 330, AttentionDistillSampler: 340, DiTSampler: 260, FoveaTileCrop: 200 };
const LEAST = 300; // with settings
const SHOWS_ALL = "Comfy.Node.AlwaysShowAdvancedWidgets"; // only front ends that hide advanced settings have it

/** Height of a node without its advanced settings. */
function heightWithout(advanced, node) {
  for (const each of advanced) each.hidden = true;
  try {
    return node.computeSize()[1];
  } finally {
    for (const each of advanced) each.hidden = false;
  }
}

function fit(node) {
  const width = Math.max(node.size[0], WIDTHS[node.comfyClass] ?? (node.widgets?.length ? LEAST : 0));
  const advanced = (node.widgets ?? []).filter((each) => (each.options?.advanced ?? each.advanced) && !each.hidden);
  const hides = globalThis.LiteGraph?.vueNodesMode && app.extensionManager?.setting?.get?.(SHOWS_ALL) === false;
  node.setSize([width, hides && advanced.length ? heightWithout(advanced, node) : node.size[1]]);
}

app.registerExtension({
  name: "fovea.nodeSize",
  nodeCreated(node) {
    try {
      const kind = node.constructor.nodeData;
      if (kind?.category === "Fovea") fit(node);
    } catch (error) {
      console.debug("Fovea: new nodes keep the front end's size.", error);
    }
  },
});
