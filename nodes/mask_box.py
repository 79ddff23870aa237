"""The ``FoveaMaskBox`` node."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.host import NodeText
from ..attention.maps.boxes import BoxSettings, box_around
from ._schema import advanced, node_schema


class FoveaMaskBox(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = BoxSettings()
        return node_schema(
            "FoveaMaskBox",
            display_name="Box around a Mask",
            description=(
                "Measures the box around what a mask marks, so that a crop follows an object or a word wherever it is: for "
                "ImageCrop, CropMask, ImageCompositeMasked, and other nodes with x, y, width and height."
            ),
            not_idempotent=True,  # its text is its own, from the cache too
            search_aliases=["bounding box", "bbox", "mask to box", "crop region", "inpaint crop", "detailer", "face detail"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip="The mask, as large as the image. Of several masks (a batch, several words) one box holds everything "
                    "that they mark.",
                ),
                io.Float.Input(
                    "margin",
                    default=default.margin,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="What the crop shows around the object, on each side, as a share of the object's longer side. It "
                    "stops at the edge of the image. 0: no margin.",
                ),
                advanced(
                    io.Float.Input(
                        "threshold",
                        default=default.threshold,
                        min=0.01,
                        max=1.0,
                        step=0.01,
                        tooltip="From which value of the mask a pixel belongs to the object.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "multiple_of",
                        default=default.multiple_of,
                        min=1,
                        max=1024,
                        tooltip="Width and height are multiples of this number, so that the crop fits a latent: 8 for most "
                        "models, 16 for Flux and others. 1: any size.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "square",
                        default=default.square,
                        tooltip="Make width and height the same, where the image has room for it.",
                    )
                ),
            ],
            outputs=[
                io.Int.Output(display_name="x", tooltip="Pixels from the left edge of the image to the box."),
                io.Int.Output(display_name="y", tooltip="Pixels from the upper edge of the image to the box."),
                io.Int.Output(display_name="width", tooltip="Width of the box in pixels of the image."),
                io.Int.Output(display_name="height", tooltip="Height of the box in pixels of the image."),
            ],
        )

    @classmethod
    def execute(
        cls, mask: io.Mask.Type, margin: float = 0.25, threshold: float = 0.5, multiple_of: int = 8, square: bool = False
    ) -> io.NodeOutput:
        box = box_around(mask, BoxSettings(margin, threshold, multiple_of, square))
        size = f"{box.width} x {box.height} pixels at x {box.x}, y {box.y}"
        NodeText().tell("; ".join((f"Box around a Mask: {size}", *box.notes)))
        return io.NodeOutput(box.x, box.y, box.width, box.height)
