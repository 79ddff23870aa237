"""Which of the kept runs made an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..networks.grids import resize_maps
from .attn_maps import AttnMaps
from .origin import Origin, leads_from
from .recording import Recording
from .runs import Run
from .stages import joined, stages_of

# A latent is the result of a run if it differs from it by no more than half precision and a last denoising step do.
_SAME_LATENT = 0.02
# Of an image's variance, what its own latent explains linearly is 0.5 and more, that of another image with another seed less.
_OWN, _CLEARLY_MORE = 0.3, 0.1
# Images of a batch are put in another order only where it is beyond doubt.
_FAR_MORE = 0.3
# An image whose colours vary less than this, of 0..1, is too plain to tell.
_PLAIN = 0.04
_CELLS = 64


def maps_of_images(maps: AttnMaps, images: Tensor, latent: Tensor | None = None, origin: Origin | None = None) -> AttnMaps:
    """Return the maps of the run that made the images; runs that continue one another are one.

    Args:
        images: (images, height, width, 3 or more).
        latent: what the sampler returned, (batch, channels, [frames,] height, width); it names the run for certain.
        origin: where the images come from in the workflow.

    Raises:
        ValueError: there are no maps, or those of these images are not kept.
    """
    maps.require()
    run, notes = _chosen(maps, images, latent, origin)
    stages = stages_of(run, maps.runs)
    if origin is not None:
        maps.kept.note_shown(origin.node_id, stages, origin.sharing())
    whole = joined(stages)
    if whole.sigmas and whole.sigmas[-1] > 0:
        notes.append(f"this run ended at sigma {whole.sigmas[-1]:.3g}: steps after it were sampled elsewhere, or not at all")
    found = AttnMaps()
    found.fill(replace(run, recording=replace(whole, notes=[*whole.notes, *notes])))
    return found


def _chosen(maps: AttnMaps, images: Tensor, latent: Tensor | None, origin: Origin | None) -> tuple[Run, list[str]]:
    if latent is not None:
        return _of_latent(maps, latent), []
    fitting = [run for run in maps.runs if fits(run.recording, images)]
    if not fitting:
        if len(maps.runs) == 1:
            return maps.runs[0], []  # its pairing says what does not fit
        raise ValueError(
            f"images is {len(images)} of {images.shape[2]} x {images.shape[1]}, but the captured model sampled "
            f"{' and '.join(dict.fromkeys(_described(run.recording) for run in maps.runs))}. Connect the image as VAE Decode "
            "gives it, before cropping or outpainting, or the sampler's latent to 'latent'."
        )
    if origin is not None:
        led = _led_to(maps, fitting, images, origin)
        if led is not None:
            return led
    return _likest(fitting, images), []


def fits(recording: Recording, images: Tensor) -> bool:
    """Return whether a run can have made the images: shape, and their number."""
    if not fits_shape(recording, images):
        return False
    count, batch = len(images), recording.batch
    return count <= batch or (count % batch == 0 and (batch == 1 or recording.grid[0] > 1)) if batch else True


def fits_shape(recording: Recording, images: Tensor) -> bool:
    """Return whether the images have the shape of the maps, as far as rounding to cells lets it be told."""
    height, width = images.shape[1:3]
    rows, columns = recording.grid[1:]
    across, down = abs(columns - rows * width / height), abs(rows - columns * height / width)
    return across <= 1 + 0.04 * columns or down <= 1 + 0.04 * rows


def _described(recording: Recording) -> str:
    size = recording.latent
    shape = f"{size.decoded[1]} x {size.decoded[0]}" if size else f"maps of {recording.grid[2]} x {recording.grid[1]}"
    return f"{recording.batch} of {shape}"


def _of_latent(maps: AttnMaps, latent: Tensor) -> Run:
    for run in reversed(maps.runs):
        if run.result is not None and _distance(run.result, latent) <= _SAME_LATENT:
            return run
    kept = ", ".join(_described(run.recording) for run in maps.runs)
    raise ValueError(
        f"latent: none of the {len(maps.runs)} kept runs ended with this latent (kept: {kept}). Connect the latent that comes "
        "out of the sampler with the captured model; if ComfyUI has it from an earlier run, change the seed to sample again."
    )


def _distance(result: Tensor, latent: Tensor) -> float:
    """Return the relative distance of two latents, infinity where their shapes differ."""
    if result.shape != latent.shape:
        return float("inf")
    ours, theirs = result.float().nan_to_num(), latent.detach().float().cpu().nan_to_num()
    return float((ours - theirs).norm() / ours.norm().clamp(min=1e-12))


# The workflow


def _led_to(maps: AttnMaps, fitting: Sequence[Run], images: Tensor, origin: Origin) -> tuple[Run, list[str]] | None:
    """Return the run that the workflow leads from to the images; None where it leads from none that was captured.

    Of several on the way the nearest, unless the image is clearly that of an earlier one (a node that sampled a part of it).
    """
    candidates: list[Run] = []
    notes: list[str] = []
    for node in origin.ancestors:
        own = [run for run in maps.runs if _made_by(run, node, origin)]
        if not own and any(leads_from(released, node) for released in maps.kept.released):
            if not candidates:
                _refuse_cached(node)
            continue
        kept = [run for run in own if not _is_stale(run, node, images, origin)]
        if own and not kept and not candidates:
            _refuse_cached(node)
        candidates += [run for run in reversed(kept) if run in fitting and run not in candidates]
    if not candidates:
        return None
    exact = [run for run in candidates if _is_exact(run, images)] or candidates
    alike = [likeness_of(run, images) for run in exact]
    best = max(alike)
    return next(run for run, like in zip(exact, alike, strict=True) if like >= best - _CLEARLY_MORE), notes


def _made_by(run: Run, node: str, origin: Origin) -> bool:
    if run.node is not None and leads_from(run.node.node, node):
        return True
    return bool(run.signature) and run.signature == origin.signature(node)  # ComfyUI runs equal nodes once


def _is_stale(run: Run, node: str, images: Tensor, origin: Origin) -> bool:
    """Return whether the node has other inputs now, so that the run is that of another image; tell the run what it has."""
    signature = origin.signature(node)
    if run.signature:
        return run.signature != signature
    if run.node is not None and run.node.prompt != origin.prompt:
        seeds = origin.seeds(node)
        if seeds and run.seed is not None and run.seed not in seeds:
            return True
        if not seeds and likeness_of(run, images) < _OWN:
            return True
    run.signature = signature
    return False


def _refuse_cached(node: str) -> None:
    raise ValueError(
        f"The maps of this image are not kept: ComfyUI took it from its cache (node {node} did not sample again), and the maps "
        "are those of another run. Change the seed of that sampler to sample again, or give each sampler a Capture Attention "
        "Maps of its own."
    )


# The image


def _likest(runs: Sequence[Run], images: Tensor) -> Run:
    """Return the run whose result looks most like the images; the latest among equals."""
    exact = [run for run in runs if _is_exact(run, images)] or list(runs)
    if len(exact) == 1:
        return exact[0]
    alike = [likeness_of(run, images) for run in exact]
    return exact[max(range(len(exact)), key=lambda at: (round(alike[at], 3), at))]


def _is_exact(run: Run, images: Tensor) -> bool:
    """Return whether the images have just the size that the run's latent is decoded to."""
    size = run.recording.latent
    return size is not None and size.decoded == tuple(images.shape[1:3])


def likeness_of(run: Run, images: Tensor) -> float:
    """Return how much of the images the run's result explains, 0 to 1; -1 where nothing is known.

    Of each video the first frame counts.
    """
    if run.result is None:
        return -1.0
    each = max(len(images) // len(run.result), 1)
    return float(likenesses(images[::each], run.result).amax(1).mean())


def is_unlike(run: Run, image: Tensor, entry: int, frame: int = 0) -> bool:
    """Return whether an image does not look like what the run made of an entry of the batch; False where nothing is known."""
    if run.result is None or len(run.result) != run.recording.batch:
        return False
    colours = image[..., :3].float()
    if float((colours - colours.mean((0, 1))).square().mean()) < _PLAIN**2:
        return False
    latent = run.result[entry]
    if latent.ndim == 4:
        latent = latent[:, min(frame, latent.shape[1] - 1)]
    return 0 <= likeness(image, latent) < _OWN


def entries_of(run: Run, images: Tensor) -> list[int] | None:
    """Return which entry of the batch each image is; None where that is not clear from what they look like."""
    if run.result is None or len(run.result) != run.recording.batch or len(run.result) < 2:
        return None
    best, entries = likenesses(images, run.result).topk(2, 1)
    found: list[int] = entries[:, 0].tolist()
    clear = (best[:, 0] >= _OWN) & (best[:, 0] - best[:, 1] >= _FAR_MORE)
    return found if bool(clear.all()) and len(set(found)) == len(found) else None


def likeness(image: Tensor, latent: Tensor) -> float:
    """Return the likeness of one image and one latent; see ``likenesses``."""
    return float(likenesses(image[None], latent[None]))


def likenesses(images: Tensor, latents: Tensor) -> Tensor:
    """Return the share of each image's variance that a linear map of each latent's channels explains: (images, latents).

    It is 0 to 1, and -1 where a latent is plain or too small to tell. What decoders make of a latent is roughly linear in it:
    ComfyUI's live previews live on that.

    Args:
        images: (images, height, width, channels).
        latents: (latents, channels, height, width), or (latents, channels, frames, height, width), whose first frame counts.
    """
    latents = latents[:, :, 0] if latents.ndim == 5 else latents
    if latents.ndim != 4:
        return torch.full((len(images), len(latents)), -1.0)
    size = tuple(min(side, _CELLS) for side in latents.shape[-2:])
    small = torch.stack([resize_maps(image[..., :3].detach().float().cpu().movedim(-1, 0), size, "area") for image in images])
    pixels = small.flatten(2).mT
    pixels = pixels - pixels.mean(1, keepdim=True)
    seen = resize_maps(latents.detach().float().cpu().nan_to_num(), size, "area").flatten(2).mT
    return torch.stack([_explained(pixels, each - each.mean(0)) for each in seen], 1)


def _explained(pixels: Tensor, seen: Tensor) -> Tensor:
    """Return the share of the variance of each image (images, cells, colours) that a latent (cells, channels) explains."""
    cells, channels = seen.shape
    free = cells - channels - 1
    if free <= 0 or float(seen.square().mean()) <= 1e-9:
        return torch.full((len(pixels),), -1.0)
    total = pixels.square().sum((1, 2))
    ridge = torch.eye(channels) * (1e-6 * float(seen.square().mean()) * cells + 1e-12)
    rest = (pixels - seen @ torch.linalg.solve(seen.T @ seen + ridge, seen.T @ pixels)).square().sum((1, 2))
    share = (1 - rest / total.clamp(min=1e-30) * (cells - 1) / free).clamp(min=0)
    return torch.where(total <= 1e-9 * pixels[0].numel(), torch.zeros(()), share)
