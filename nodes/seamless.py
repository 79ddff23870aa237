"""Nodes for images that tile without a seam: sampling, decoding, encoding, and what goes around other nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention import seamless
from ._schema import node_schema

_WRAP = io.Custom("FOVEA_WRAP")


def _axis() -> io.Combo.Input:
    return io.Combo.Input(
        "axis",
        options=list(seamless.AXES),
        default=seamless.AXES[0],
        optional=True,
        tooltip="In which direction the image repeats: both; horizontal joins left and right (panoramas); vertical joins top and "
        "bottom. Use the same in all nodes.",
    )


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
            not_idempotent=True,  # its text is its own, from the cache too
            search_aliases=["seamless", "tileable", "tiling", "texture", "pattern", "circular padding", "wallpaper", "panorama"],
            inputs=[io.Model.Input("model", tooltip="The model to sample with: SD1.5, SD2 or SDXL."), _axis()],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, with opposite edges of the image joined. The input model is not changed.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, axis: str = seamless.AXES[0]) -> io.NodeOutput:
        return io.NodeOutput(seamless.seamless(model, axis))


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
                _axis(),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The image. Copies of it side by side show no seam.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, axis: str = seamless.AXES[0]) -> io.NodeOutput:
        return io.NodeOutput(seamless.decode_seamless(vae, samples["samples"], axis))


class FoveaSeamlessEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaSeamlessEncode",
            display_name="VAE Encode (Seamless)",
            description=(
                "Encodes an image that tiles without a seam, so that the latent tiles too: for a second pass, or as a reference."
            ),
            search_aliases=["seamless", "tileable", "vae encode", "circular vae", "texture", "pattern", "img2img"],
            inputs=[
                io.Image.Input("pixels", tooltip="An image that tiles: what leaves it on one side comes in on the other."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                _axis(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The latent, for a model that went through Seamless Tiling.")
            ],
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any, axis: str = seamless.AXES[0]) -> io.NodeOutput:
        return io.NodeOutput({"samples": seamless.encode_seamless(vae, pixels, axis)})


class FoveaTileWrap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaTileWrap",
            display_name="Wrap Tile",
            description=(
                "Surrounds a tile with its own repetitions, so that upscalers, filters and other nodes see how it goes on past "
                "its edges. Crop Tile takes them away again."
            ),
            search_aliases=["seamless", "tileable", "wrap", "pad", "upscale", "texture"],
            inputs=[
                io.Image.Input("images", tooltip="An image that tiles."),
                io.Int.Input(
                    "margin",
                    default=64,
                    min=1,
                    max=4096,
                    tooltip="How many pixels of its repetitions stand on each side. 64 is enough for most upscalers.",
                ),
                _axis(),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The tile with its repetitions around it."),
                _WRAP.Output(display_name="wrap", tooltip="How it was surrounded, for Crop Tile."),
            ],
        )

    @classmethod
    def execute(cls, images: Any, margin: int = 64, axis: str = seamless.AXES[0]) -> io.NodeOutput:
        return io.NodeOutput(*seamless.wrap(images, margin, axis))


class FoveaTileCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaTileCrop",
            display_name="Crop Tile",
            description="Takes away what Wrap Tile put around a tile, also after the image was upscaled.",
            search_aliases=["seamless", "tileable", "unwrap", "crop", "upscale", "texture"],
            inputs=[
                io.Image.Input("images", tooltip="The wrapped image, upscaled by a whole number or as large as before."),
                _WRAP.Input("wrap", tooltip="From Wrap Tile."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The tile alone, which repeats without a seam.")],
        )

    @classmethod
    def execute(cls, images: Any, wrap: Any) -> io.NodeOutput:
        return io.NodeOutput(seamless.crop(images, wrap))


class FoveaTileView(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaTileView",
            display_name="View Tile",
            description="Shows a tile so that seams are easy to see: four copies side by side, or with its edges in the middle.",
            search_aliases=["seamless", "tileable", "seam", "offset", "repeat", "preview", "2x2"],
            inputs=[
                io.Image.Input("images", tooltip="The decoded image of the tile."),
                io.Combo.Input(
                    "view",
                    options=list(seamless.VIEWS),
                    default=seamless.VIEWS[0],
                    tooltip="2 x 2: four copies. offset: moved by half of its width and height, so that its edges cross in the "
                    "middle.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The view of the tile, for Preview Image.")],
        )

    @classmethod
    def execute(cls, images: Any, view: str = seamless.VIEWS[0]) -> io.NodeOutput:
        return io.NodeOutput(seamless.look(images, view))
