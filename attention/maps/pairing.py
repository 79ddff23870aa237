"""Which image of a batch, and which latent frame of a video, the maps of each image are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .attn_maps import AttnMaps
from .heats import Source
from .matching import entries_of, fits_shape, is_unlike


@dataclass(frozen=True)
class Paired:
    """Images with what was captured of them, and what the user should know of it."""

    images: Tensor
    sources: list[Source]
    notes: list[str]


def paired(maps: AttnMaps, images: Tensor, prompt: str, batch_index: int = -1, frame: int = -1) -> Paired:
    """Return what was captured of each image, of the images that are asked for.

    Image b belongs to entry b of the captured batch, unless the images are clearly those of other entries; the map of a single
    entry serves any number of images. Of a video, the first frame belongs to the first latent frame and each further latent
    frame to as many frames as the others.

    Args:
        batch_index: only this image of the captured batch, from 0; -1: all.
        frame: only this frame of the video, from 0; -1: all.

    Raises:
        ValueError: the images are not those of the run.
    """
    maps.of(prompt)  # says why, where there is nothing
    height, width = images.shape[1:3]
    if not fits_shape(maps.require(), images):
        rows, columns = maps.grid
        raise ValueError(
            f"images is {width} x {height}, but the sampled image has another shape (its maps are {columns} x {rows}). "
            "Connect the image as VAE Decode gives it, before cropping or outpainting."
        )
    if not -1 <= batch_index < maps.batch:
        raise ValueError(
            f"batch_index is {batch_index}, but {maps.batch} images were sampled: use 0 to {maps.batch - 1}, or -1 for all."
        )
    if frame >= 0 and maps.frames == 1:
        raise ValueError(f"frame is {frame}, but the sampled latent is an image, not a video: use -1.")
    found = _video(maps, images, prompt, batch_index, frame) if maps.frames > 1 else _batch(maps, images, prompt, batch_index)
    return replace(found, notes=[*found.notes, *_unlike(maps, found)])


def _batch(maps: AttnMaps, images: Tensor, prompt: str, batch_index: int) -> Paired:
    entries, notes = _entries(maps, images, batch_index)
    if batch_index >= 0:
        if batch_index not in entries or maps.batch < len(entries):
            raise ValueError(_wrong_number(len(images), maps.batch))
        at = entries.index(batch_index)
        images, entries = images[at : at + 1], [batch_index]
    return Paired(images, [Source(maps, prompt, entry) for entry in entries], notes)


def _entries(maps: AttnMaps, images: Tensor, batch_index: int) -> tuple[list[int], list[str]]:
    """Return which entry of the captured batch each image is, with notes."""
    count, own = len(images), list(range(maps.batch))
    if maps.batch == 1:
        return [0] * count, []
    if count == 1 and batch_index >= 0:
        return [batch_index], []
    found = entries_of(maps.runs[-1], images) if count <= maps.batch else None
    if found is not None and found != own:
        named = ", ".join(str(entry) for entry in found)
        which = "another order than the captured batch" if count == maps.batch else f"{count} of {maps.batch} sampled images"
        return found, [f"images has {which}: the maps shown are those of batch_index {named}, which it looks like"]
    if count != maps.batch:
        raise ValueError(_wrong_number(count, maps.batch))
    return own, []


def _unlike(maps: AttnMaps, found: Paired) -> list[str]:
    """Return a note where images do not look like what the run made; one frame of a video that does speaks for all."""
    run, count = maps.runs[-1], len(found.images)
    strange = (
        is_unlike(run, image, source.batch, source.frame or 0) for image, source in zip(found.images, found.sources, strict=True)
    )
    if maps.frames > 1:
        return [_unlike_note("the video looks" if count > 1 else "the image looks")] if all(strange) else []
    numbers = [str(at) for at, here in enumerate(strange, 1) if here]
    if not numbers:
        return []
    named = f"{'images' if len(numbers) > 1 else 'image'} {', '.join(numbers)} of {count}" if count > 1 else "the image"
    order = " (the images are shown in the order of the captured batch)" if maps.batch > 1 and count > 1 else ""
    return [_unlike_note(f"{named} {'look' if len(numbers) > 1 else 'looks'}", order)]


def _unlike_note(subject: str, order: str = "") -> str:
    return (
        f"{subject} different from what the captured run made, so the maps may not fit{order}. Connect the decoded image of the "
        "captured sampler, and mirror, rotate or crop the masks afterwards as you do the image; if another sampler made it, "
        "capture that one too. If only colours or details were changed, the maps still fit."
    )


def _wrong_number(count: int, batch: int) -> str:
    return (
        f"images has {count} images, but {batch} were sampled. Connect the whole batch as VAE Decode gives it, in the "
        "same order, or one image of it with its number in 'batch_index'."
    )


def _video(maps: AttnMaps, images: Tensor, prompt: str, batch_index: int, frame: int) -> Paired:
    count, videos = len(images), maps.batch
    size = maps.require().latent
    all_frames = (maps.frames - 1) * (4 if size is None else size.frames) + 1
    if count % videos and not (count == 1 or batch_index >= 0):
        raise ValueError(_wrong_number(count, videos))
    if count == 1:
        if frame >= all_frames:
            raise ValueError(f"frame is {frame}, but the sampled video has {all_frames} frames: use 0 to {all_frames - 1}.")
        at = latent_frame(max(frame, 0), all_frames, maps.frames)
        notes = (
            [] if frame >= 0 else [f"the image is taken for the first of {all_frames} frames; another one is named in 'frame'"]
        )
        return Paired(images, [Source(maps, prompt, max(batch_index, 0), at)], notes)
    if batch_index >= 0 and count % videos == 0 and videos > 1:
        count //= videos
        images = images[batch_index * count : (batch_index + 1) * count]
        videos = 1
    elif batch_index >= 0:
        videos = 1
    long = count // videos
    if frame >= long:
        raise ValueError(f"frame is {frame}, but images has {long} frames: use 0 to {long - 1}, or -1 for all.")
    wanted = range(long) if frame < 0 else [frame]
    chosen = [(video, at) for video in range(videos) for at in wanted]
    return Paired(
        images if frame < 0 else images[[video * long + at for video, at in chosen]],
        [Source(maps, prompt, max(batch_index, 0) + video, latent_frame(at, long, maps.frames)) for video, at in chosen],
        [],
    )


def pair(maps: AttnMaps, images: Tensor, prompt: str) -> list[Source]:
    """Return what was captured of each image; see ``paired``."""
    return paired(maps, images, prompt).sources


def latent_frame(frame: int, frames: int, latent_frames: int) -> int:
    """Return the latent frame that a frame of a video was decoded from.

    Video encoders of today are causal: the first frame alone, then equal groups of frames. Where the numbers do not allow
    that, frames are spread evenly.
    """
    if latent_frames < 2 or frames < 2:
        return 0
    each, rest = divmod(frames - 1, latent_frames - 1)
    if rest == 0:
        return (frame + each - 1) // each
    return round(frame * (latent_frames - 1) / (frames - 1))
