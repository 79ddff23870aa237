"""The ``AttnMapPreview`` node."""

from __future__ import annotations

import json
import uuid
from enum import Enum
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..attention.host import NodeText, log
from ..attention.maps import AttnMaps
from ..attention.maps.drawing.colormaps import Colormap
from ..attention.maps.drawing.overlay import Style
from ..attention.maps.drawing.scales import Normalize
from ..attention.maps.hover import pointing_data
from ..attention.maps.preview import preview
from ..attention.maps.request import Request, View
from ..attention.tgate import TGateSettings
from ._schema import advanced, node_schema
from ._types import AttnMapsSocket
from ._workflow import origin_of, samples_of


def _values(options: type[Enum]) -> list[str]:
    return [option.value for option in options]


class AttnMapPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttnMapPreview",
            display_name="Attention Map Preview",
            description=(
                "Shows where in the image the model attends to each word of the prompt, over the steps and in each layer, and "
                "turns words into masks. Hover over the image in the node to see which words get the most attention there."
            ),
            search_aliases=["attention map", "heat map", "daam", "word mask", "prompt mask", "token", "saliency", "segmentation"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                AttnMapsSocket.Input(
                    "attn_maps",
                    tooltip="From Capture Attention Maps, whose model sampled the image, or from Load Attention Maps.",
                ),
                io.Image.Input(
                    "images", tooltip="The decoded image of the same run. It also makes this node wait for the sampler."
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="What to show: words or phrases of the prompt, separated by commas, such as cat, red frog. cat#2 is "
                    "the second cat, cat + dog both, cat - eyes the cat without its eyes. Empty: the subjects in square "
                    "brackets, or every word.",
                ),
                io.Combo.Input(
                    "view",
                    options=_values(View),
                    default=View.OVERLAY.value,
                    tooltip="overlay: a heat map for each word. steps, layers: one for each of them. self-attention: what "
                    "belongs to one point. convergence: when each word settles. segments: the strongest word of each place.",
                ),
                advanced(
                    io.Combo.Input(
                        "prompt",
                        options=["positive", "negative"],
                        default="positive",
                        tooltip="The prompt whose words are shown. The negative prompt is only computed when cfg is not 1.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "normalize",
                        options=_values(Normalize),
                        default=Normalize.EACH.value,
                        tooltip="What the strongest colour, and white in a mask, stands for. each word: its own maximum. all "
                        "words: the maximum of all, so that they can be compared. none: an attention of 1; usually dark.",
                    )
                ),
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Level of the white contour line, minimum for an area to join a segment, and level from which area "
                    "is counted in the statistics. Masks stay soft.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Opacity of the heat map. 0 shows only the image, 1 only the heat map.",
                ),
                advanced(
                    io.Combo.Input(
                        "colormap",
                        options=_values(Colormap),
                        default=Colormap.TURBO.value,
                        tooltip="Colours of the heat map. viridis and gray are also easy to read with colour blindness.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "query_x",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="self-attention view only: the point to query, from left (0) to right (1).",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "query_y",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="self-attention view only: the point to query, from top (0) to bottom (1).",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for prompts not encoded by Prompt with Subjects: the text encoder that was used.",
                ),
                advanced(
                    io.String.Input(
                        "text",
                        default="",
                        multiline=True,
                        optional=True,
                        tooltip="Only with clip: the prompt, exactly as it was encoded.",
                    )
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent from the sampler of this image. Only needed where several samplers use the captured "
                    "model and the right one is not found.",
                ),
                advanced(
                    io.Int.Input(
                        "batch_index",
                        default=-1,
                        min=-1,
                        max=4095,
                        optional=True,
                        tooltip="Show only this image of the batch; the first is 0. -1: all.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "frame",
                        default=-1,
                        min=-1,
                        max=65535,
                        optional=True,
                        tooltip="Video only: show this frame; the first is 0. -1: all, or the first one for a single image.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "largest_part",
                        default=False,
                        optional=True,
                        tooltip="Keep only the largest connected area of each mask, measured at threshold.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="view", tooltip="The images shown in the node."),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="One soft mask for each word, in the order of the words, at the size of the image.",
                ),
                io.String.Output(
                    display_name="figures",
                    tooltip="Statistics of each word as JSON: peak, area, share of attention and change over the steps.",
                ),
                io.Float.Output(
                    display_name="strengths",
                    is_output_list=True,
                    tooltip="The share of all attention that each word gets, in the order of the masks.",
                ),
                io.Float.Output(
                    display_name="areas",
                    is_output_list=True,
                    tooltip="The part of the image at or above threshold, for each word, in the order of the masks.",
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
        latent: dict[str, Any] | None = None,
        batch_index: int = -1,
        frame: int = -1,
        largest_part: bool = False,
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
            latent=samples_of(latent),
            origin=origin_of(cls.hidden),
            batch_index=batch_index,
            frame=frame,
            largest_part=largest_part,
        )
        shown = preview(attn_maps, images, request)
        pointing = pointing_data(shown.maps, prompt, clip, text, shown.drawn, shown.sources)
        told = NodeText()
        told.nothing()
        for note in shown.report["notes"]:
            log.info("Attention Map Preview: %s", note)
            told.show(note)
        return io.NodeOutput(
            shown.images,
            shown.masks,
            json.dumps(shown.report, ensure_ascii=False, indent=2, allow_nan=False),
            shown.strengths,
            shown.areas,
            ui={**ui.PreviewImage(shown.images, cls=cls).as_dict(), **_pointing_ui(pointing)},
        )


def _pointing_ui(pointing: str | None) -> dict[str, list[dict[str, str]]]:
    """Leave the maps that ``web/attention_hover.js`` reads in ComfyUI's temp folder."""
    if pointing is None:
        return {}
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"fovea_words_{uuid.uuid4().hex}.json"
    (folder / name).write_text(pointing, encoding="utf-8")
    return {"fovea_words": [{"filename": name, "subfolder": "", "type": "temp"}]}
