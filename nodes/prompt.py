"""The nodes that encode prompts with subjects: ``FoveaPrompt``, and ``FoveaPromptSDXL`` for two texts."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..attention import prompts as tokens
from ..attention.host import NodeText
from ._schema import advanced, node_schema

_NO_CLIP = "The input 'clip' is empty: this checkpoint has no text encoder. Load one with a CLIP loader and connect it here."
_MAX_SIZE = 16384  # pixels, as in ComfyUI's own nodes


class FoveaPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaPrompt",
            display_name="Prompt with Subjects",
            description=(
                "Encodes a prompt like CLIP Text Encode and keeps the token positions of its words, so that other Fovea nodes "
                "can show or guide single words. Put the subjects that matter in square brackets: a [cat] and a [red frog]."
            ),
            search_aliases=["prompt", "clip text encode", "subjects", "tokens", "words", "attend and excite", "attention maps"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, from the checkpoint or CLIP loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. Mark subjects with square brackets: a [cat] and a [red frog]. The brackets do not "
                    r"change the image. Write \[ and \] for brackets that belong to the prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The encoded prompt with the token positions of its words, for any sampler or conditioning node.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, text: str) -> io.NodeOutput:
        if clip is None:
            raise ValueError(_NO_CLIP)
        plain, subjects = tokens.parse_subjects(text)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(plain))
        known = tokens.metadata(clip, plain, subjects, conditioning[0][0].shape[1], conditioning[0][0])
        _tell("Prompt with Subjects", known)
        return io.NodeOutput([[encoded, {**options, tokens.METADATA: known}] for encoded, options in conditioning])


def _pixels(name: str, default: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=0, max=_MAX_SIZE, tooltip=tooltip)


class FoveaPromptSDXL(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaPromptSDXL",
            display_name="Prompt with Subjects (SDXL)",
            description=(
                "Encodes SDXL's two texts and sizes like CLIP Text Encode (SDXL) and keeps the token positions of their words "
                "for other Fovea nodes. Put the subjects that matter in square brackets: a [cat] and a [red frog]."
            ),
            search_aliases=["prompt", "clip text encode sdxl", "subjects", "tokens", "words", "text_g", "text_l"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders of an SDXL checkpoint."),
                _pixels("width", 1024, "Original width given to SDXL, in pixels. Low values look like a small image, scaled up."),
                _pixels(
                    "height", 1024, "Original height given to SDXL, in pixels. Low values look like a small image, scaled up."
                ),
                advanced(_pixels("crop_w", 0, "Crop on the left given to SDXL, in pixels. 0 keeps the subject whole.")),
                advanced(_pixels("crop_h", 0, "Crop at the top given to SDXL, in pixels. 0 keeps the subject whole.")),
                _pixels("target_width", 1024, "Width of the image to generate, in pixels."),
                _pixels("target_height", 1024, "Height of the image to generate, in pixels."),
                io.String.Input(
                    "text_g",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt for the large encoder (OpenCLIP-G). Mark subjects with square brackets: a [cat] and a "
                    r"[red frog]. Write \[ and \] for brackets that belong to the prompt.",
                ),
                io.String.Input(
                    "text_l",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt for the small encoder (CLIP-L), usually the same text. Its brackets count only where "
                    "text_g has none.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The encoded prompt with the token positions of its words, for any sampler or conditioning node.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        width: int,
        height: int,
        crop_w: int,
        crop_h: int,
        target_width: int,
        target_height: int,
        text_g: str,
        text_l: str,
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError(_NO_CLIP)
        conditioning = tokens.encode_two_texts(
            clip, text_g, text_l, width=width, height=height, crop_w=crop_w, crop_h=crop_h,
            target_width=target_width, target_height=target_height,
        )  # fmt: skip
        _tell("Prompt with Subjects (SDXL)", conditioning[0][1][tokens.METADATA])
        return io.NodeOutput(conditioning)


def _tell(name: str, known: dict[str, Any]) -> None:
    """Show on the node why the words cannot be found; nothing where they are."""
    text_on_node = NodeText()
    if "error" in known:
        text_on_node.tell(f"{name}: {known['error']}", logging.WARNING)
    else:
        text_on_node.nothing()
