"""What is connected to the node, brought to the form that a run needs, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import host


def fitting(latent: Tensor, name: str, model: Any) -> Tensor:
    """Return clean latents (n, channels, ..., height, width) with the dimensions of the model's own.

    Args:
        name: of the input they come from.

    Raises:
        ValueError: latents of another VAE, without pixels, or with values that are no numbers.
    """
    channels, dimensions = host.latent_channels(model)
    if host.packs_latents(model):
        raise ValueError(
            f"{type(model.model).__name__} packs its latents in another form than its VAE, so {name} cannot be compared with "
            "what it samples. Attention Distillation does not work with this model."
        )
    latent = with_dimensions(latent, dimensions)
    if latent.ndim != dimensions + 2 or latent.shape[1] != channels:
        raise ValueError(
            f"{name} is a latent of shape {tuple(latent.shape)}, but this model's latents have {channels} channels and "
            f"{dimensions} dimensions. Encode the image with the VAE that belongs to the model."
        )
    if not latent.numel():
        raise ValueError(f"{name} is a latent of shape {tuple(latent.shape)}, which holds nothing. Connect an encoded image.")
    if not bool(latent.isfinite().all()):
        raise ValueError(
            f"{name} holds values that are no numbers (NaN). Encode the image again, with the VAE in fp32 (--fp32-vae)."
        )
    return latent


def with_dimensions(latent: Tensor, dimensions: int) -> Tensor:
    """Return an image's latent with a dimension of frames where the model has one, and without it where not."""
    if dimensions == 3 and latent.ndim == 4:
        return latent.unsqueeze(2)
    if dimensions == 2 and latent.ndim == 5 and latent.shape[2] == 1:
        return latent[:, :, 0]
    return latent


def target_latent(model: Any, latent: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``latent_image`` as it is sampled.

    Raises:
        ValueError: several latents in one.
    """
    if getattr(latent["samples"], "is_nested", False):
        raise ValueError(
            "latent_image holds several latents at once (video with sound), which cannot be distilled. Use an image."
        )
    return host.fitting_latent(model, {**latent, "samples": with_dimensions(latent["samples"], host.latent_channels(model)[1])})


def check_reference(reference: Tensor, name: str, ratio: int) -> None:
    """Raise a ValueError where a reference is one latent pixel, which has neither texture nor contrast."""
    if reference[0, 0].numel() == 1:
        raise ValueError(
            f"{name} is a single latent pixel ({ratio} x {ratio} pixels of an image), which has no style to follow. Use a "
            "larger image: 256 pixels or more, best about the size of latent_image."
        )


References = Mapping[str, "Mapping[str, Any] | Tensor | None"]


def reference_latents(model: Any, references: References, vae: Any) -> list[tuple[str, Tensor]]:
    """Return every reference's clean latent (1, channels, ...), in the order of the inputs, with the name of its input.

    Args:
        references: of each input a LATENT, or images (n, height, width, channels), 0 to 1, each of which may hold several
            references; "reference_image" takes the place of "reference".
        vae: the model's; needed for images.

    Raises:
        ValueError: an image without a VAE or the other way round, a VAE that is not the model's, or a latent that does not fit.
    """
    given = {name: value for name, value in references.items() if value is not None}
    if "reference_image" in given:
        given.pop("reference", None)
    images = [name for name, value in given.items() if isinstance(value, Tensor)]
    if images and vae is None:
        raise ValueError(
            f"{images[0]} is connected, but vae is not. Connect the VAE of the model, and the node encodes the image itself; or "
            "encode it with VAE Encode."
        )
    if vae is not None and not images:
        raise ValueError(
            "vae is connected, but reference_image is not. Connect both, and the node encodes the reference itself in place of "
            "the latent at reference; or neither."
        )
    found = []
    for name, value in given.items():
        latent = fitting(_encoded(value, vae, name, model) if isinstance(value, Tensor) else value["samples"], name, model)
        check_reference(latent, name, host.pixels_per_latent(model))
        found += [(name, one) for one in latent.split(1)]
    return found


def _encoded(image: Tensor, vae: Any, name: str, model: Any) -> Tensor:
    """Return the latents of images, in the dimensions of the model's own."""
    channels, dimensions = host.latent_channels(model)
    colours = host.colour_images(image, name, host.pixels_per_latent(model))
    encoded: Tensor = with_dimensions(vae.encode(colours), dimensions)
    if encoded.ndim != dimensions + 2 or encoded.shape[1] != channels:
        raise ValueError(
            f"vae gives latents of shape {tuple(encoded.shape)}, but this model's latents have {channels} channels and "
            f"{dimensions} dimensions. Connect the VAE that belongs to the model."
        )
    return encoded


def check_content(content: Tensor, latent: Tensor) -> None:
    """Raise a ValueError where content has another size or another number of images than the latent."""
    if content.shape[2:] != latent.shape[2:]:
        raise ValueError(
            f"content is {_size(content)} but latent_image is {_size(latent)} (in latent pixels). The content loss compares them "
            "place by place: scale the content image to the size of the latent, or connect content to latent_image as well."
        )
    if len(content) not in (1, len(latent)):
        raise ValueError(f"content holds {len(content)} images and latent_image {len(latent)}: use one, or as many.")


def _size(latent: Tensor) -> str:
    return f"{latent.shape[-1]} x {latent.shape[-2]}"


def check_null_prompt(null_prompt: Sequence[Any] | None, guider: Any) -> None:
    """Raise a ValueError where there is no null prompt, or it is none of the model's: of another text encoder, or no class."""
    if not null_prompt:
        raise ValueError('null_prompt is empty. Connect the encoding of an empty prompt (CLIP Text Encode with "").')
    context, options = null_prompt[0][0], null_prompt[0][1]
    options = options if isinstance(options, Mapping) else {}
    _check_null_class(options.get(host.CLASS_LABELS), guider.model_patcher.model)
    pooled = options.get("pooled_output")
    wanted = host.text_widths(guider)
    for value, name in ((context, "context"), (pooled, "pooled")):
        width = wanted.get(name)
        if width is not None and isinstance(value, Tensor) and value.shape[-1] != width:
            what = "values for each token" if name == "context" else "values for the whole prompt"
            raise ValueError(
                f"null_prompt has {value.shape[-1]} {what}, but {type(guider.model_patcher.model).__name__} needs {width}: it "
                'was encoded with the CLIP of another model. Encode "" with the CLIP of the same checkpoint as the prompt.'
            )


def _check_null_class(classes: Tensor | None, base_model: Any) -> None:
    """Raise a ValueError where a DiT, which takes classes, is given a text, or no class and was trained without that."""
    has_null = getattr(host.diffusion_model(base_model), "null_class", None)
    if has_null is None or (classes is not None and (has_null or not bool((classes < 0).any()))):
        return
    if has_null:
        raise ValueError(
            "null_prompt is a text, but this model takes classes. Connect DiT Class Label's second output, null class, to "
            "null_prompt."
        )
    raise ValueError(
        f"null_prompt is {'a text' if classes is None else 'no class'}, but this model takes classes and was trained without a "
        "null class. Connect DiT Class Label's first output to null_prompt, with the class of the reference or of the prompt."
    )


def weights_of(text: str, count: int) -> list[float]:
    """Return how much each reference counts, 1 for each where ``text`` is empty.

    Args:
        text: numbers with commas between them, one for each reference.

    Raises:
        ValueError: something that is no weight, or not as many as there are references.
    """
    if not text.strip():
        return [1.0] * count
    parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = [float("nan")]
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ValueError(
            f"reference_weights is '{text}': write a number of 0 or more for each reference, with commas, as in 1, 0.5."
        )
    if len(weights) != count:
        raise ValueError(
            f"reference_weights has {len(weights)} numbers and there are {count} references: write as many, or nothing."
        )
    return weights
