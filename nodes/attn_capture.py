"""The ``AttnMapCapture`` node."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention import host
from ..attention.capture import Capture, CaptureSettings, chosen_layers
from ..attention.maps import AttnMaps
from ._schema import advanced, node_schema
from ._types import AttnMapsSocket


class AttnMapCapture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttnMapCapture",
            display_name="Capture Attention Maps",
            description=(
                "Records which words the model looks at in every part of the picture, while any sampler runs. The picture does "
                "not change. Put it between the model and the sampler, and connect attn_maps to Attention Map Preview."
            ),
            search_aliases=["attention", "attention map", "heat map", "heatmap", "daam", "cross attention", "where words look"],
            inputs=[
                io.Model.Input("model", tooltip="The model to watch."),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Which layers to record, for example: input.4, middle, output.3-5 (U-Net) or double.0-7, single.3 "
                    "(Flux) or block.5. Empty records the usual ones: all, but not a U-Net's middle. A wrong name lists the "
                    "right ones.",
                ),
                io.Boolean.Input(
                    "per_step",
                    default=True,
                    tooltip="Keep a map of every step, for the steps view. Off saves memory.",
                ),
                advanced(
                    io.Boolean.Input(
                        "per_head",
                        default=False,
                        tooltip="Keep the attention heads of each layer apart. Needs several times the memory.",
                    )
                ),
                io.Boolean.Input(
                    "self_attention",
                    default=False,
                    tooltip="Also record how parts of the picture look at each other, for the self-attention view. Takes extra "
                    "time.",
                ),
                advanced(
                    io.Int.Input(
                        "max_memory_mb",
                        default=512,
                        min=1,
                        max=65536,
                        tooltip="Memory the maps may take. When they would need more, first their resolution is lowered, then "
                        "heads and single steps are given up; the console says so.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The same model, watched. Connect it to the sampler. The incoming model is not changed.",
                ),
                AttnMapsSocket.Output(
                    display_name="attn_maps",
                    tooltip="The maps of the last run with this model. Empty until the sampler has run.",
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
        # A wrong name, or nothing to be seen, is better said now than after sampling.
        chosen = chosen_layers(host.diffusion_model(model.model), layers)
        if chosen and not self_attention and all(layer.kind == "self" for layer in chosen):
            raise ValueError(
                f"self_attention is off, but {type(model.model).__name__} has no text whose words could be seen. "
                "Switch self_attention on."
            )
        capture = Capture(settings, AttnMaps())
        return io.NodeOutput(host.attach(model, capture.key, capture), capture.maps)
