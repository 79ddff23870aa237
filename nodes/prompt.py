"""The ``FoveaPrompt`` node."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..attention import prompts as tokens
from ..attention.host import NodeText
from ._schema import node_schema


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
            raise ValueError(
                "The input 'clip' is empty: this checkpoint has no text encoder. Load one with a CLIP loader and connect it here."
            )
        plain, subjects = tokens.parse_subjects(text)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(plain))
        known = tokens.metadata(clip, plain, subjects, conditioning[0][0].shape[1], conditioning[0][0])
        text_on_node = NodeText()
        if "error" in known:
            text_on_node.tell(f"Prompt with Subjects: {known['error']}", logging.WARNING)
        else:
            text_on_node.nothing()
        return io.NodeOutput([[encoded, {**options, tokens.METADATA: known}] for encoded, options in conditioning])
