"""The ``AttentionDistillSampler`` node."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..attention.distill import (
    Adain,
    DistillSettings,
    Method,
    prepare,
    sample_distilled,
    target_latent,
)
from ..attention.gradient import Memory
from ._distill import optional_inputs, run_inputs, settings_inputs
from ._schema import node_schema


class AttentionDistillSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttentionDistillSampler",
            display_name="Attention Distillation Sampler",
            description=(
                "Samples an image in the style, texture or appearance of a reference image, with any checkpoint and without "
                "training. Use it in place of SamplerCustomAdvanced."
            ),
            search_aliases=["attention distillation", "style transfer", "style reference", "texture synthesis", "appearance"],
            inputs=[*run_inputs(), *settings_inputs(), *optional_inputs()],
            outputs=[
                io.Latent.Output(display_name="output", tooltip="The finished latent."),
                io.Latent.Output(
                    display_name="denoised_output",
                    tooltip="The model's prediction of the finished latent at the last step; differs from output if the run "
                    "stops early.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The loss of every optimisation step and the settings that were used, as JSON."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        noise: Any,
        guider: Any,
        sampler: Any,
        sigmas: Any,
        latent_image: dict[str, Any],
        reference: dict[str, Any],
        null_prompt: Any,
        method: str = Method.GUIDED.value,
        iterations: int = 0,
        learning_rate: float = 0.0,
        content_weight: float = 0.25,
        adain: str = Adain.AUTO.value,
        start_at: float = 0.0,
        end_at: float = 1.0,
        every_n_steps: int = 1,
        attn_scale: float = 1.0,
        layers: str = "",
        memory: str = Memory.AUTO.value,
        content: dict[str, Any] | None = None,
        reference_mask: Any = None,
        target_mask: Any = None,
        window: int = 0,
        window_stride: int = 64,
        reference_image: Any = None,
        vae: Any = None,
        reference_weights: str = "",
        reference_2: Any = None,
        reference_3: Any = None,
        reference_4: Any = None,
        reference_per_image: bool = False,
    ) -> io.NodeOutput:
        settings = DistillSettings(
            Method(method),
            iterations,
            learning_rate,
            content_weight,
            Adain(adain),
            start_at,
            end_at,
            every_n_steps,
            attn_scale,
            layers,
            Memory(memory),
            window,
            window_stride,
            reference_per_image,
        )
        latent = target_latent(guider.model_patcher, latent_image)
        references = {
            "reference": reference,
            "reference_image": reference_image,
            "reference_2": reference_2,
            "reference_3": reference_3,
            "reference_4": reference_4,
        }
        job = prepare(
            settings,
            guider,
            sampler,
            latent["samples"],
            references,
            null_prompt,
            None if content is None else content["samples"],
            reference_mask,
            target_mask,
            vae,
            reference_weights,
        )
        output, denoised, report = sample_distilled(job, noise, guider, sampler, sigmas, latent)
        return io.NodeOutput(output, denoised, json.dumps(report, indent=1))
