"""The ``AttnMapCapture`` node."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention import host
from ..attention.maps import AttnMaps, Capture, chosen_layers
from ..attention.maps.capture import CaptureSettings
from ._schema import advanced, node_schema
from ._types import AttnMapsSocket


class AttnMapCapture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttnMapCapture",
            display_name="Capture Attention Maps",
            description=(
                "Records where in the image the model attends to each word of the prompt, while any sampler runs. The image "
                "does not change. Place it between the model and the sampler, and connect attn_maps to Attention Map Preview."
            ),
            not_idempotent=True,  # its text is its own, from the cache too
            search_aliases=["attention", "attention map", "heat map", "heatmap", "daam", "cross attention", "where words look"],
            inputs=[
                io.Model.Input("model", tooltip="The model to record."),
                advanced(
                    io.String.Input(
                        "layers",
                        default="",
                        tooltip="Which layers to record, such as input.4, output.3-5 or double.0-7. Empty: the usual ones. A "
                        "wrong name gives an error that lists the valid ones.",
                    )
                ),
                io.Boolean.Input(
                    "per_step",
                    default=True,
                    tooltip="Keep a map for every step, for the steps view. Off saves memory.",
                ),
                advanced(
                    io.Boolean.Input(
                        "per_head",
                        default=False,
                        tooltip="Keep a separate map for each attention head. Needs several times the memory.",
                    )
                ),
                io.Boolean.Input(
                    "self_attention",
                    default=False,
                    tooltip="Also record self-attention, which shows which parts of the image belong together, for the "
                    "self-attention view. Takes extra time.",
                ),
                advanced(
                    io.Int.Input(
                        "max_memory_mb",
                        default=512,
                        min=1,
                        max=65536,
                        tooltip="Memory limit for the maps of all runs, in MB. When they would need more, their resolution is "
                        "lowered first, then separate heads and steps are dropped; the console reports it.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with recording switched on. Connect it to the sampler. The input model is not changed.",
                ),
                AttnMapsSocket.Output(
                    display_name="attn_maps",
                    tooltip="The attention maps of the runs with this model. Empty until the sampler has run.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        layers: str = "",
        per_step: bool = True,
        per_head: bool = False,
        self_attention: bool = False,
        max_memory_mb: int = 512,
    ) -> io.NodeOutput:
        settings = CaptureSettings(layers, per_step, per_head, self_attention, max_memory_mb)
        # A wrong name, or nothing to record, is reported before sampling, not after it.
        chosen = chosen_layers(host.diffusion_model(model.model), layers)
        if chosen and not self_attention and all(layer.kind == "self" for layer in chosen):
            raise ValueError(
                f"self_attention is off, but {type(model.model).__name__} has no text prompt, so there are no words to record. "
                "Turn self_attention on."
            )
        capture = Capture(settings, AttnMaps(), host.NodeText())
        return io.NodeOutput(host.attach(model, capture.key, capture), capture.maps)
