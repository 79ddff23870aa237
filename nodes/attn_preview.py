"""The ``AttnMapPreview`` node."""

from __future__ import annotations

import json
import uuid
from enum import Enum
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..attention.colormaps import Colormap
from ..attention.host import log
from ..attention.maps import AttnMaps
from ..attention.pointing import pointing_data
from ..attention.render import Normalize, Style
from ..attention.tgate import TGateSettings
from ..attention.views import Request, View, preview
from ._schema import advanced, node_schema
from ._types import AttnMapsSocket


def _values(options: type[Enum]) -> list[str]:
    return [option.value for option in options]


class AttnMapPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttnMapPreview",
            display_name="Attention Map Preview",
            description=(
                "Shows where each word of the prompt looks in the picture, how that settles over the steps and which layer sees "
                "what, and turns words into masks. Point at the picture in the node to see which words look there."
            ),
            search_aliases=["attention map", "heat map", "daam", "word mask", "prompt mask", "token", "saliency", "segmentation"],
            is_output_node=True,
            inputs=[
                AttnMapsSocket.Input(
                    "attn_maps", tooltip="From Capture Attention Maps, whose model made the picture, or from Load Attention Maps."
                ),
                io.Image.Input(
                    "images", tooltip="The decoded picture of the same run. It also makes this node wait for the sampler."
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words or phrases of the prompt, separated by commas: cat, red frog. cat#2 is the second cat. Empty: "
                    "the subjects marked in Prompt with Subjects, else every word.",
                ),
                io.Combo.Input(
                    "view",
                    options=_values(View),
                    default=View.OVERLAY.value,
                    tooltip="overlay: heat over the picture, word by word. steps: a film strip of the run. layers: which layer "
                    "looks where. self-attention: what belongs to one place. convergence: when words settle. segments: every "
                    "place in the colour of its word.",
                ),
                io.Combo.Input(
                    "prompt",
                    options=["positive", "negative"],
                    default="positive",
                    tooltip="The prompt whose words are shown. The negative one is only computed with a cfg other than 1.",
                ),
                io.Combo.Input(
                    "normalize",
                    options=_values(Normalize),
                    default=Normalize.EACH.value,
                    tooltip="What full colour and white in a mask mean. each word: the highest value of the word. all words: the "
                    "highest of all, so that words can be compared. none: all attention of a place (1); usually dark.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where the white line runs, how much heat a place needs to belong to a segment, and what counts as "
                    "area in the figures. Masks stay soft.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How strongly the heat covers the picture. 0 shows the picture, 1 the heat alone.",
                ),
                io.Combo.Input(
                    "colormap",
                    options=_values(Colormap),
                    default=Colormap.TURBO.value,
                    tooltip="Colours of the heat. viridis and gray are also easy to read with colour blindness.",
                ),
                advanced(
                    io.Float.Input(
                        "query_x",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="self-attention only: the place that looks, from left (0) to right (1).",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "query_y",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="self-attention only: the place that looks, from top (0) to bottom (1).",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for prompts that Prompt with Subjects did not encode: the text encoder that did.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Only with clip: the prompt, exactly as it was encoded.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="view", tooltip="The pictures shown in the node."),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="One soft mask for each word, in the order of the words, of the size of the picture.",
                ),
                io.String.Output(
                    display_name="figures", tooltip="JSON: for each word its peak, area, share of attention and how it settled."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        attn_maps: AttnMaps,
        images: io.Image.Type,
        words: str = "",
        view: str = View.OVERLAY.value,
        prompt: str = "positive",
        normalize: str = Normalize.EACH.value,
        threshold: float = 0.4,
        opacity: float = 0.6,
        colormap: str = Colormap.TURBO.value,
        query_x: float = 0.5,
        query_y: float = 0.5,
        clip: Any = None,
        text: str = "",
    ) -> io.NodeOutput:
        request = Request(
            view=View(view),
            prompt=prompt,
            words=words,
            normalize=Normalize(normalize),
            style=Style(Colormap(colormap), opacity, threshold),
            query=(query_x, query_y),
            clip=clip,
            text=text,
            default_gate=TGateSettings().gate_step,
        )
        shown = preview(attn_maps, images, request)
        pointing = pointing_data(attn_maps, prompt, clip, text, shown.drawn, shown.sources)
        for note in attn_maps.notes:
            log.info("Attention Map Preview: %s", note)
        return io.NodeOutput(
            shown.images,
            shown.masks,
            json.dumps(shown.report, ensure_ascii=False, indent=2),
            ui={**ui.PreviewImage(shown.images, cls=cls).as_dict(), **_pointing_ui(pointing)},
        )


def _pointing_ui(pointing: str | None) -> dict[str, list[dict[str, str]]]:
    """Leave the maps that ``web/attention_hover.js`` reads in the host's temp folder."""
    if pointing is None:
        return {}
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"fovea_words_{uuid.uuid4().hex}.json"
    (folder / name).write_text(pointing, encoding="utf-8")
    return {"fovea_words": [{"filename": name, "subfolder": "", "type": "temp"}]}
