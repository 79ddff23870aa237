"""The ``FoveaSeamless`` and ``FoveaSeamlessDecode`` nodes: images that tile without a seam."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention import seamless
from ._schema import node_schema


class FoveaSeamless(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaSeamless",
            display_name="Seamless Tiling",
            description=(
                "Makes the model sample images that tile without a seam: textures, patterns, wallpapers. For SD1.5, SD2 and "
                "SDXL, with any sampler. Decode the latent with VAE Decode (Seamless)."
            ),
            search_aliases=["seamless", "tileable", "tiling", "texture", "pattern", "circular padding", "wallpaper"],
            inputs=[io.Model.Input("model", tooltip="The model to sample with: SD1.5, SD2 or SDXL.")],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, with opposite edges of the image joined. The input model is not changed.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(seamless.seamless(model))


class FoveaSeamlessDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaSeamlessDecode",
            display_name="VAE Decode (Seamless)",
            description="Decodes a latent that tiles without a seam, so that the image tiles too.",
            search_aliases=["seamless", "tileable", "vae decode", "circular vae", "texture", "pattern"],
            inputs=[
                io.Latent.Input("samples", tooltip="From a sampler whose model went through Seamless Tiling."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The image. Copies of it side by side show no seam.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        return io.NodeOutput(seamless.decode_seamless(vae, samples["samples"]))
