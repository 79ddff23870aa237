"""What the two nodes of Attend-and-Excite share: their inputs after the prompt, and the settings made of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.excite import ExciteSettings, Layout, Loss, LossSettings, PlaceSettings, parse_thresholds
from ..attention.gradient import Memory
from ._schema import advanced


def guidance_inputs() -> list[io.Input]:
    """Return the inputs from ``subjects`` to ``layers``, in the order of the nodes."""
    return [
        io.String.Input(
            "subjects",
            default="",
            tooltip="Words of the prompt that must appear in the image, separated by commas: cat, red frog. Empty: the "
            "words in square brackets in 'Prompt with Subjects'. Token positions such as 2, 5 work too.",
        ),
        io.Float.Input(
            "guide_until",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Fraction of the steps that are guided. The layout is decided early; higher values cost time and "
            "may harm detail. 0 leaves only the refinements at the thresholds.",
        ),
        io.Float.Input(
            "scale_factor",
            default=20.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            tooltip="Strength of each nudge. Raise it if a subject is still missing, lower it if the image breaks.",
        ),
        advanced(
            io.Float.Input(
                "scale_end",
                default=0.5,
                min=0.0,
                max=1.0,
                step=0.01,
                tooltip="How much of the strength is left at the last step: the square root of this number, so 0.5 leaves 71 %.",
            )
        ),
        advanced(
            io.String.Input(
                "thresholds",
                default="0:0.05, 0.2:0.5, 0.4:0.8",
                tooltip="Pairs of fraction:strength, separated by commas: at this fraction of the steps, the latent is "
                "nudged until every subject is this strong. Empty: never more than one nudge per step, which is faster.",
            )
        ),
        advanced(
            io.Int.Input(
                "max_refinements",
                default=20,
                min=0,
                max=1000,
                tooltip="Maximum number of nudges at one threshold. Lower is faster.",
            )
        ),
        advanced(
            io.Int.Input(
                "attention_grid",
                default=0,
                min=0,
                max=256,
                tooltip="Resolution at which attention is read: tokens along the longer side. 0: a quarter of the "
                "latent's longer side, as published (16 for SD1.5 at 512 px).",
            )
        ),
        advanced(
            io.Boolean.Input(
                "smoothing",
                default=True,
                tooltip="Smooth the attention maps, so that a subject is more than a single dot.",
            )
        ),
        advanced(
            io.Float.Input("sigma", default=0.5, min=0.01, max=10.0, step=0.01, tooltip="Width of the smoothing, in tokens.")
        ),
        advanced(
            io.Int.Input("kernel_size", default=3, min=1, max=31, step=2, tooltip="Size of the smoothing kernel; must be odd.")
        ),
        advanced(
            io.Combo.Input(
                "loss",
                options=[loss.value for loss in Loss],
                default=Loss.ATTEND_EXCITE.value,
                tooltip="attend-and-excite: strengthens the peak of the weakest subject. divide-and-bind: raises the "
                "contrast of its map; more subjects were missing with it in our tests.",
            )
        ),
        advanced(
            io.Float.Input(
                "overlap",
                default=0.0,
                min=0.0,
                max=100.0,
                step=0.05,
                tooltip="Also keeps subjects apart: weight of the penalty on overlapping maps. In our tests only layout 'own "
                "places' helped with that.",
            )
        ),
        advanced(
            io.Float.Input(
                "self_overlap",
                default=0.0,
                min=0.0,
                max=100.0,
                step=0.05,
                tooltip="Also keeps apart what the areas of the subjects attend to (self-attention). Takes extra time; "
                "more subjects were missing with it in our tests.",
            )
        ),
        advanced(
            io.Combo.Input(
                "memory",
                options=[memory.value for memory in Memory],
                default=Memory.AUTO.value,
                tooltip="fast keeps everything for the backward pass. low recomputes blocks, one image at a time: slower, "
                "with a fraction of the memory. auto decides by the free memory.",
            )
        ),
        io.Clip.Input(
            "clip", optional=True, tooltip="Only for prompts not encoded by Prompt with Subjects: the text encoder that was used."
        ),
        advanced(
            io.String.Input(
                "text",
                optional=True,
                multiline=True,
                default="",
                tooltip="Only for prompts not encoded by Prompt with Subjects: the positive prompt, exactly as it was encoded.",
            )
        ),
        advanced(
            io.String.Input(
                "layers",
                optional=True,
                default="",
                tooltip="Which cross-attention layers are read, for example: output, or output.3-5. Empty: all layers "
                "of the attention grid, as published.",
            )
        ),
        io.Combo.Input(
            "layout",
            options=[layout.value for layout in Layout],
            default=Layout.FREE.value,
            optional=True,
            tooltip="free: subjects appear wherever the model puts them. own places: each subject gets a part of the image for "
            "itself, the one where it is strongest at the start; more subjects appear and fewer merge, but the composition is "
            "more regular.",
        ),
        io.Mask.Input(
            "subject_masks",
            optional=True,
            tooltip="Where each subject should be: a batch of masks, one for each subject, in the order of the subjects. White "
            "is its place. Used instead of the layout.",
        ),
        advanced(
            io.Float.Input(
                "layout_strength",
                default=1.0,
                min=0.0,
                max=10.0,
                step=0.05,
                optional=True,
                tooltip="How firmly subjects are kept in their places, with layout 'own places' or with masks. 0 is off.",
            )
        ),
    ]


def excite_settings(
    guide_until: float,
    scale_factor: float,
    scale_end: float,
    thresholds: str,
    max_refinements: int,
    attention_grid: int,
    smoothing: bool,
    sigma: float,
    kernel_size: int,
    loss: str,
    overlap: float,
    self_overlap: float,
    memory: str,
    layers: str,
    layout: str,
    subject_masks: Any,
    layout_strength: float,
) -> ExciteSettings:
    """Return the settings of the inputs with these names.

    Raises:
        ValueError: one of them is out of range.
    """
    return ExciteSettings(
        guide_until=guide_until,
        scale_factor=scale_factor,
        scale_end=scale_end,
        thresholds=parse_thresholds(thresholds),
        max_refinements=max_refinements,
        attention_grid=attention_grid,
        losses=LossSettings(Loss(loss), smoothing, sigma, kernel_size, overlap, self_overlap),
        memory=Memory(memory),
        layers=layers,
        places=PlaceSettings(Layout(layout), subject_masks, layout_strength),
    )
