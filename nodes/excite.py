"""The ``AttendExciteGuider`` node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention import host
from ..attention.excite import (
    ExciteGuider,
    ExciteSettings,
    Loss,
    LossSettings,
    check_network,
    guided_names,
    guided_prompts,
    parse_thresholds,
)
from ..attention.gradient import Memory
from ..attention.maps import AttnMaps, Capture
from ..attention.maps.capture import CaptureSettings
from ._schema import advanced, node_schema
from ._types import AttnMapsSocket


class AttendExciteGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttendExciteGuider",
            display_name="Attend-and-Excite Guider",
            description=(
                "Gets every subject of the prompt into the image: in the early steps, which decide the layout, the latent is "
                "nudged until each subject gets attention somewhere. Connect it to the guider input of SamplerCustomAdvanced."
            ),
            hidden=[io.Hidden.unique_id],
            search_aliases=["attend and excite", "missing subject", "neglect", "catastrophic neglect", "two objects", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It needs a text prompt (SD1.5, SDXL, SD3, Flux, ...)."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The positive prompt, from 'Prompt with Subjects' (or from any other encoder, with "
                    "clip and text set below).",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Float.Input(
                    "cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Strength of the prompt, as in KSampler."
                ),
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
                        tooltip="Fraction of scale_factor that is left at the last step (under a square root).",
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
                    io.Float.Input(
                        "sigma", default=0.5, min=0.01, max=10.0, step=0.01, tooltip="Width of the smoothing, in tokens."
                    )
                ),
                advanced(
                    io.Int.Input(
                        "kernel_size", default=3, min=1, max=31, step=2, tooltip="Size of the smoothing kernel; must be odd."
                    )
                ),
                io.Combo.Input(
                    "loss",
                    options=[loss.value for loss in Loss],
                    default=Loss.ATTEND_EXCITE.value,
                    tooltip="attend-and-excite: strengthens the peak of the weakest subject. divide-and-bind: raises the "
                    "contrast of its map, which helps with several subjects of one kind.",
                ),
                io.Float.Input(
                    "overlap",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Also keeps subjects apart: weight of the penalty on overlapping maps. Try 1 if two subjects merge "
                    "into one.",
                ),
                advanced(
                    io.Float.Input(
                        "self_overlap",
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.05,
                        tooltip="Also keeps apart what the areas of the subjects attend to (self-attention). Helps with "
                        "similar subjects and takes extra time.",
                    )
                ),
                io.Combo.Input(
                    "memory",
                    options=[memory.value for memory in Memory],
                    default=Memory.AUTO.value,
                    tooltip="fast keeps everything for the backward pass. low recomputes blocks, one image at a time: slower, "
                    "with a fraction of the memory. auto decides by the free memory.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Only for prompts from other encoders: the text encoder that was used."
                ),
                io.String.Input(
                    "text",
                    optional=True,
                    multiline=True,
                    default="",
                    tooltip="Only for prompts from other encoders: the positive prompt, exactly as it was encoded.",
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
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced or Attention Distillation Sampler."),
                AttnMapsSocket.Output(
                    display_name="attn_maps",
                    tooltip="The attention maps of the guided run, for Attention Map Preview. Empty until the sampler has run.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        cfg: float = 7.5,
        subjects: str = "",
        guide_until: float = 0.5,
        scale_factor: float = 20.0,
        scale_end: float = 0.5,
        thresholds: str = "0:0.05, 0.2:0.5, 0.4:0.8",
        max_refinements: int = 20,
        attention_grid: int = 0,
        smoothing: bool = True,
        sigma: float = 0.5,
        kernel_size: int = 3,
        loss: str = Loss.ATTEND_EXCITE.value,
        overlap: float = 0.0,
        self_overlap: float = 0.0,
        memory: str = Memory.AUTO.value,
        clip: Any = None,
        text: str = "",
        layers: str = "",
    ) -> io.NodeOutput:
        settings = ExciteSettings(
            guide_until=guide_until,
            scale_factor=scale_factor,
            scale_end=scale_end,
            thresholds=parse_thresholds(thresholds),
            max_refinements=max_refinements,
            attention_grid=attention_grid,
            losses=LossSettings(Loss(loss), smoothing, sigma, kernel_size, overlap, self_overlap),
            memory=Memory(memory),
            layers=layers,
        )
        network = host.diffusion_model(model.model)
        check_network(network)
        prompts = guided_prompts(positive, subjects, clip, text)
        capture = Capture(CaptureSettings(layers=guided_names(network, settings)), AttnMaps())
        guider = ExciteGuider(host.attach(model, capture.key, capture), settings, prompts)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider, capture.maps)
