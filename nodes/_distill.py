"""Inputs of ``AttentionDistillSampler``, in the order in which saved workflows have their values."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.distill import Adain, Method
from ..attention.gradient import Memory
from ._schema import advanced


def run_inputs() -> list[io.Input]:
    """Return what SamplerCustomAdvanced has, the reference and its prompt."""
    return [
        io.Noise.Input("noise", tooltip="The initial noise (RandomNoise)."),
        io.Guider.Input("guider", tooltip="Model and prompts: CFGGuider, BasicGuider, Attend-and-Excite or any other guider."),
        io.Sampler.Input(
            "sampler",
            tooltip="The sampler that denoises the image; euler is as published. Not used by 'optimise'.",
        ),
        io.Sigmas.Input("sigmas", tooltip="The sigmas of the run, from a scheduler node. Published: 50 steps of ddim_uniform."),
        io.Latent.Input("latent_image", tooltip="The latent to start from; an empty latent for a new image. It sets the size."),
        io.Latent.Input(
            "reference",
            tooltip="The image whose style, texture or appearance to follow, from VAE Encode with the model's own VAE. "
            "Any size; a batch is several references. Not used with reference_image: then connect any latent.",
        ),
        io.Conditioning.Input(
            "null_prompt",
            tooltip='An empty prompt: CLIP Text Encode with "". It is the prompt for the reference.',
        ),
    ]


def settings_inputs() -> list[io.Input]:
    """Return how strongly, when and in which layers the reference is followed."""
    return [
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
            "the published number: 3 for SD1.5, 2 for SDXL and Flux, 1 for optimise. Quick: 1, with learning_rate 0.03.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Size of each optimisation step. Higher gives a stronger style and more grain. 0 is the published "
            "value: 0.015 for SD1.5 and SDXL, 0.01 for Flux, 0.05 for optimise. For textures use 0.05; quick: 0.03.",
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
                tooltip="Fraction of the steps after which the reference has no more effect. Lower is faster and smoother.",
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
    ]


def optional_inputs() -> list[io.Input]:
    """Return content, masks, windows, and further ways to give references."""
    return [
        io.Latent.Input(
            "content",
            optional=True,
            tooltip="An image whose content to keep, from VAE Encode, at the size of latent_image. optimise starts from it.",
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
            tooltip="Recommended: the reference as an image, with vae. The node encodes it itself, so that no latent of "
            "another VAE can be used, and takes it in place of reference. A batch is several references.",
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="For references that are images: the VAE of the guider's model, which encodes them.",
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
        *(
            io.MultiType.Input(
                f"reference_{number}",
                types=[io.Image, io.Latent],
                optional=True,
                tooltip="One more reference, of any size: an image (connect vae too) or a latent.",
            )
            for number in (2, 3, 4)
        ),
        advanced(
            io.Boolean.Input(
                "reference_per_image",
                default=False,
                optional=True,
                tooltip="Off: every image of a batch follows all references together. On: the first image follows the "
                "first reference, the second image the second, and so on; needs as many references as images.",
            )
        ),
    ]
