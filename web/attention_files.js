// "Save Attention Maps": marks in its file name such as %date:yyyy-MM-dd% and %KSampler.seed% are replaced when a workflow is
// queued, as the front end does for its own save nodes only.
//
// "Load Attention Maps": a button that uploads a file to ComfyUI's input folder.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const SAVE = "FoveaSaveAttnMaps";
const LOAD = "FoveaLoadAttnMaps";
const SUFFIX = ".attn.safetensors";

// --- marks in file names -------------------------------------------------------------------------------------------

/** A date in a form such as yyyy-MM-dd hh:mm:ss. */
function dated(form, date) {
  const parts = { d: date.getDate(), M: date.getMonth() + 1, h: date.getHours(), m: date.getMinutes(), s: date.getSeconds() };
  return form.replace(/dd?|MM?|hh?|mm?|ss?|yyy?y?/g, (part) => {
    if (part === "yy") return String(date.getFullYear()).slice(2);
    return part[0] === "y" ? String(date.getFullYear()) : String(parts[part[0]]).padStart(part.length, "0");
  });
}

/** All nodes of a graph and of its subgraphs. */
function* allNodes(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

/** The text with its marks replaced; %width% and others that the server knows stay. */
function replaced(text) {
  return text.replace(/%([^%]+)%/g, (mark, inside) => {
    const clean = (value) => String(value ?? "").replace(/[/?<>\\:*|"\x00-\x1F\x7F]/g, "_");
    if (inside.startsWith("date:")) return clean(dated(inside.slice(5), new Date()));
    const [name, widget, ...rest] = inside.split(".");
    if (!widget || rest.length) return mark;
    const nodes = [...allNodes(app.rootGraph ?? app.graph)];
    const named = nodes.find((node) => node.properties?.["Node name for S&R"] === name) ?? nodes.find((node) => node.title === name);
    const found = named?.widgets?.find((each) => each.name === widget);
    return found ? clean(found.value) : mark;
  });
}

function replaceMarks(node) {
  const widget = node.widgets?.find((each) => each.name === "filename_prefix");
  if (widget) widget.serializeValue = () => replaced(String(widget.value ?? ""));
}

// --- upload --------------------------------------------------------------------------------------------------------

async function upload(file, widget) {
  const body = new FormData();
  body.append("image", file); // the server's name for any file
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const { name, subfolder } = await answer.json();
  const path = subfolder ? `${subfolder}/${name}` : name;
  const values = widget.options?.values;
  if (Array.isArray(values) && !values.includes(path)) values.push(path);
  widget.value = path;
  widget.callback?.(path);
  app.graph?.setDirtyCanvas?.(true, true);
}

function addUpload(node) {
  const widget = node.widgets?.find((each) => each.name === "file");
  if (!widget || typeof node.addWidget !== "function") return;
  const button = node.addWidget("button", "choose file to upload", null, () => {
    const input = document.createElement("input");
    input.type = "file";
    input.accept = SUFFIX.slice(SUFFIX.lastIndexOf("."));
    input.onchange = () => {
      const file = input.files?.[0];
      if (!file) return;
      if (!file.name.endsWith(SUFFIX)) alert(`Attention maps are files ending in ${SUFFIX}.`);
      else upload(file, widget).catch((error) => alert(`The file could not be uploaded: ${error.message}`));
    };
    input.click();
  }, { serialize: false });
  if (button) button.serialize = false;
}

app.registerExtension({
  name: "fovea.attentionFiles",
  nodeCreated(node) {
    try {
      if (node.comfyClass === SAVE) replaceMarks(node);
      if (node.comfyClass === LOAD) addUpload(node);
    } catch (error) {
      console.debug("Fovea: file names of attention maps stay as they are here.", error);
    }
  },
});
