"""The nodes of Attend-and-Excite: ``AttendExciteGuider`` and ``FoveaAttendExcite``."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention import host
from ..attention.excite import (
    ExciteGuider,
    ExciteTechnique,
    Layout,
    Loss,
    check_network,
    check_places,
    check_subjects,
    guided_names,
    guided_prompts,
)
from ..attention.gradient import Memory
from ..attention.maps import AttnMaps, Capture
from ..attention.maps.capture import CaptureSettings
from ._excite import excite_settings, guidance_inputs
from ._schema import node_schema
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
            not_idempotent=True,  # its text is its own, from the cache too
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
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Strength of the prompt, as in KSampler. Use 1 with models whose guidance is built in (Flux dev, "
                    "distilled models).",
                ),
                *guidance_inputs(),
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
        layout: str = Layout.FREE.value,
        subject_masks: Any = None,
        layout_strength: float = 1.0,
    ) -> io.NodeOutput:
        settings = excite_settings(
            guide_until, scale_factor, scale_end, thresholds, max_refinements, attention_grid, smoothing, sigma, kernel_size,
            loss, overlap, self_overlap, memory, layers, layout, subject_masks, layout_strength,
        )  # fmt: skip
        network = host.diffusion_model(model.model)
        check_network(network)
        prompts = guided_prompts(positive, subjects, clip, text)
        check_places(settings.places, prompts)
        capture = Capture(CaptureSettings(layers=guided_names(network, settings)), AttnMaps())
        guider = ExciteGuider(host.attach(model, capture.key, capture), settings, prompts)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider, capture.maps)


class FoveaAttendExcite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaAttendExcite",
            display_name="Attend-and-Excite (Model)",
            description=(
                "Gets every subject of the prompt into the image, with KSampler and all other sampler nodes: in the early steps, "
                "the latent is nudged until each subject gets attention somewhere. Connect it between model and sampler."
            ),
            not_idempotent=True,  # its text is its own, from the cache too
            search_aliases=["attend and excite", "missing subject", "neglect", "catastrophic neglect", "two objects", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It needs a text prompt (SD1.5, SDXL, SD3, Flux, ...)."),
                *guidance_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model for KSampler or any other sampler node. Each run with it is guided by the subjects of "
                    "its own positive prompt.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
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
        layout: str = Layout.FREE.value,
        subject_masks: Any = None,
        layout_strength: float = 1.0,
    ) -> io.NodeOutput:
        settings = excite_settings(
            guide_until, scale_factor, scale_end, thresholds, max_refinements, attention_grid, smoothing, sigma, kernel_size,
            loss, overlap, self_overlap, memory, layers, layout, subject_masks, layout_strength,
        )  # fmt: skip
        network = host.diffusion_model(model.model)
        check_network(network)
        check_subjects(subjects)
        guided_names(network, settings)
        return io.NodeOutput(host.attach(model, ExciteTechnique.key, ExciteTechnique(settings, subjects, clip, text)))
