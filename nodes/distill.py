"""The ``AttentionDistillSampler`` node."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..attention import distill, host
from ..attention.distill_job import Adain, DistillSettings, Method, prepare
from ..attention.gradient import Memory
from ._schema import advanced, node_schema


class AttentionDistillSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AttentionDistillSampler",
            display_name="Attention Distillation Sampler",
            description=(
                "Samples a picture in the style, texture or appearance of a reference picture, with any checkpoint and without "
                "training. Use it in place of SamplerCustomAdvanced."
            ),
            search_aliases=["attention distillation", "style transfer", "style reference", "texture synthesis", "appearance"],
            inputs=[
                io.Noise.Input("noise", tooltip="The starting noise (RandomNoise)."),
                io.Guider.Input(
                    "guider", tooltip="Model and prompts: CFGGuider, BasicGuider, Attend-and-Excite or any other guider."
                ),
                io.Sampler.Input(
                    "sampler",
                    tooltip="How the picture is denoised; euler is as published. Not used by 'optimise'.",
                ),
                io.Sigmas.Input(
                    "sigmas", tooltip="The steps of the run, from a scheduler node. Published: 50 steps, ddim_uniform."
                ),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to start from; an empty one for a new picture. Sets the size."
                ),
                io.Latent.Input(
                    "reference",
                    tooltip="The picture whose style, texture or appearance is wanted, from VAE Encode. A batch is several "
                    "references together. Any size.",
                ),
                io.Conditioning.Input(
                    "null_prompt",
                    tooltip='The encoding of an empty prompt: CLIP Text Encode with "". The reference is looked at with it.',
                ),
                io.Combo.Input(
                    "method",
                    options=[method.value for method in Method],
                    default=Method.GUIDED.value,
                    tooltip="guided sampling: denoise with your prompt, and pull the picture towards the reference after every "
                    "step. optimise: no prompt and no denoising; turns content (or noise) into the reference's look.",
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Optimisation steps after each step of the run. More is a stronger style and more time. 0 is the "
                    "published number: 3 for SD1.5, 2 for SDXL and Flux, 1 for optimise.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="How far each optimisation step goes. Higher is a stronger style and more grain. 0 is the published "
                    "value: 0.015 for SD1.5 and SDXL, 0.01 for Flux, 0.05 for optimise. Textures: 0.05.",
                ),
                io.Float.Input(
                    "content_weight",
                    default=0.25,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="With content connected: how much of it is kept. Lower takes more of the reference.",
                ),
                io.Combo.Input(
                    "adain",
                    options=[adain.value for adain in Adain],
                    default=Adain.AUTO.value,
                    tooltip="First give the picture the reference's mean colours and contrast. auto: on for guided sampling, "
                    "off for optimise. Off for textures.",
                ),
                advanced(
                    io.Float.Input(
                        "start_at",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Share of the steps before the reference begins to act. Later keeps more of the composition.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "end_at",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Share of the steps after which the reference no longer acts. Earlier is faster and smoother.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "every_n_steps",
                        default=1,
                        min=1,
                        max=100,
                        tooltip="Optimise only after every so many steps. 2 halves that work, with a weaker style.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "attn_scale",
                        default=1.0,
                        min=0.01,
                        max=10.0,
                        step=0.05,
                        tooltip="Above 1 each place follows fewer, better fitting places of the reference. 1 as published.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "layers",
                        default="",
                        tooltip="Which self-attention layers are compared, for example: output.6-11. Empty is the published "
                        "choice. A wrong name lists the right ones.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "memory",
                        options=[memory.value for memory in Memory],
                        default=Memory.AUTO.value,
                        tooltip="fast keeps everything for the gradient. low needs much less memory and more time, for the "
                        "same picture. auto goes by the free memory.",
                    )
                ),
                io.Latent.Input(
                    "content",
                    optional=True,
                    tooltip="A picture whose content is kept, from VAE Encode, of latent_image's size. optimise starts from it.",
                ),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip="Regions of the reference, each in a flat grey. Equal greys in target_mask follow that region.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Regions of the new picture, in the greys of reference_mask. Other greys are left free.",
                ),
                advanced(
                    io.Int.Input(
                        "window",
                        default=0,
                        min=0,
                        max=8192,
                        step=64,
                        optional=True,
                        tooltip="Side of what the model looks at together, in pixels, for textures larger than it was trained "
                        "for: 512 for SD1.5, 1024 for SDXL. 0 is the whole picture at once.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "window_stride",
                        default=64,
                        min=8,
                        max=8192,
                        step=8,
                        optional=True,
                        tooltip="From one window to the next, in pixels. Less blends better and takes more time; 64 as "
                        "published.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="output", tooltip="The finished latent."),
                io.Latent.Output(
                    display_name="denoised_output",
                    tooltip="The finished picture as it is expected after the last step; differs where the run stops early.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The loss of every optimisation step, and what was used, as JSON."
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
        )
        latent = host.fitting_latent(guider.model_patcher, latent_image)
        pictures = reference["samples"], null_prompt, None if content is None else content["samples"]
        job = prepare(settings, guider, sampler, latent["samples"], *pictures, reference_mask, target_mask)
        output, denoised, report = distill.sample_distilled(job, noise, guider, sampler, sigmas, latent)
        return io.NodeOutput(output, denoised, json.dumps(report, indent=1))
