"""The ``AttentionDistillSampler`` node."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..attention.distill import (
    Adain,
    DistillSettings,
    Method,
    encoded_reference,
    prepare,
    sample_distilled,
    target_latent,
)
from ..attention.gradient import Memory
from ._schema import advanced, node_schema


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
            inputs=[
                io.Noise.Input("noise", tooltip="The initial noise (RandomNoise)."),
                io.Guider.Input(
                    "guider", tooltip="Model and prompts: CFGGuider, BasicGuider, Attend-and-Excite or any other guider."
                ),
                io.Sampler.Input(
                    "sampler",
                    tooltip="The sampler that denoises the image; euler is as published. Not used by 'optimise'.",
                ),
                io.Sigmas.Input(
                    "sigmas", tooltip="The sigmas of the run, from a scheduler node. Published: 50 steps of ddim_uniform."
                ),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to start from; an empty latent for a new image. It sets the size."
                ),
                io.Latent.Input(
                    "reference",
                    tooltip="The image whose style, texture or appearance to follow, from VAE Encode. A batch is several "
                    "references together. Any size.",
                ),
                io.Conditioning.Input(
                    "null_prompt",
                    tooltip='An empty prompt: CLIP Text Encode with "". It is the prompt for the reference.',
                ),
                io.Combo.Input(
                    "method",
                    options=[method.value for method in Method],
                    default=Method.GUIDED.value,
                    tooltip="guided sampling: denoises with your prompt and pulls the image towards the reference after every "
                    "step. optimise: no prompt and no denoising; gives content (or noise) the look of the reference.",
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Optimisation steps after each sampling step. More gives a stronger style and takes longer. 0 is "
                    "the published number: 3 for SD1.5, 2 for SDXL and Flux, 1 for optimise.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Size of each optimisation step. Higher gives a stronger style and more grain. 0 is the published "
                    "value: 0.015 for SD1.5 and SDXL, 0.01 for Flux, 0.05 for optimise. For textures use 0.05.",
                ),
                io.Float.Input(
                    "content_weight",
                    default=0.25,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="With content connected: how much of it is kept. Lower takes more from the reference.",
                ),
                io.Combo.Input(
                    "adain",
                    options=[adain.value for adain in Adain],
                    default=Adain.AUTO.value,
                    tooltip="First matches the mean colours and contrast of the image to the reference. auto: on for guided "
                    "sampling, off for optimise. Turn it off for textures.",
                ),
                advanced(
                    io.Float.Input(
                        "start_at",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Fraction of the steps before the reference takes effect. Higher keeps more of the composition.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "end_at",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Fraction of the steps after which the reference has no more effect. Lower is faster and "
                        "smoother.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "every_n_steps",
                        default=1,
                        min=1,
                        max=100,
                        tooltip="Optimise only after every Nth step. 2 halves the extra work and gives a weaker style.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "attn_scale",
                        default=1.0,
                        min=0.01,
                        max=10.0,
                        step=0.05,
                        tooltip="Above 1, each part of the image follows fewer, better matching parts of the reference, which "
                        "is sharper. 1 is as published.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "layers",
                        default="",
                        tooltip="Which self-attention layers are compared, for example: output.6-11. Empty is the published "
                        "choice. A wrong name gives an error that lists the valid ones.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "memory",
                        options=[memory.value for memory in Memory],
                        default=Memory.AUTO.value,
                        tooltip="fast keeps everything for the gradient. low needs much less memory and more time, for the "
                        "same image. auto decides by the free memory.",
                    )
                ),
                io.Latent.Input(
                    "content",
                    optional=True,
                    tooltip="An image whose content to keep, from VAE Encode, at the size of latent_image. optimise starts "
                    "from it.",
                ),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip="Regions of the reference, each in one flat grey. Regions of the same grey in target_mask follow "
                    "them. Alone: only what is white in it is followed.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Regions of the new image, in the greys of reference_mask. Other greys are unconstrained.",
                ),
                advanced(
                    io.Int.Input(
                        "window",
                        default=0,
                        min=0,
                        max=8192,
                        step=64,
                        optional=True,
                        tooltip="For textures larger than the model was trained for: side of the square windows it processes, "
                        "in pixels (512 for SD1.5, 1024 for SDXL). 0 processes the whole image at once.",
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
                        tooltip="Distance from one window to the next, in pixels. Lower blends better and takes longer; 64 is "
                        "as published.",
                    )
                ),
                io.Image.Input(
                    "reference_image",
                    optional=True,
                    tooltip="The reference as an image, with vae: the node encodes it itself and uses it in place of reference. "
                    "A batch is several references together.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="With reference_image: the VAE of the guider's model, which encodes it."
                ),
                advanced(
                    io.String.Input(
                        "reference_weights",
                        default="",
                        optional=True,
                        tooltip="How much each of several references counts, for example: 1, 0.5. Only their ratio matters; 0 "
                        "leaves one out. Empty is all alike.",
                    )
                ),
            ],
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
        latent = target_latent(guider.model_patcher, latent_image)
        style = encoded_reference(reference_image, vae, guider.model_patcher)
        job = prepare(
            settings,
            guider,
            sampler,
            latent["samples"],
            reference["samples"] if style is None else style,
            null_prompt,
            None if content is None else content["samples"],
            reference_mask,
            target_mask,
            reference_weights,
        )
        output, denoised, report = sample_distilled(job, noise, guider, sampler, sigmas, latent)
        return io.NodeOutput(output, denoised, json.dumps(report, indent=1))
