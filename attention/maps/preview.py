"""What the preview returns: the figures of a view, a mask for every image and word, and the numbers behind them.

``preview`` pairs images with what was captured of them, chooses the words and draws. It returns images of one size, one
mask for each image and word (image by image, in the order of the words), and a report of plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..host import Progress
from .attn_maps import AttnMaps
from .drawing.canvas import BACKGROUND, Figure
from .drawing.pixels import resize_heat
from .drawing.scales import Scale, scales
from .figures import flat_figures, has_gaps, heat_figures, or_zero, word_figures
from .heats import Source
from .matching import maps_of_images
from .pairing import paired
from .regions import largest_part
from .request import Request, View
from .views import DRAWERS, Shown, draw_query
from .words import Word, choose_words, read_prompt

_MOST_FIGURES = 64


@dataclass(frozen=True)
class Drawn:
    """A figure and the image of the batch that it shows."""

    figure: Figure
    image_index: int


@dataclass(frozen=True)
class Preview:
    """Attributes:
    images: (figures, height, width, 3).
    masks: (images * words, height, width of the images).
    drawn: the figures, each with its place in ``images``, for pointing at things.
    sources: what each image was paired with.
    maps: of the run that made the images.
    strengths, areas: of each mask: the share of all attention, the part of the image at or above the threshold.
    """

    images: torch.Tensor
    masks: torch.Tensor
    report: dict[str, Any]
    drawn: list[Drawn]
    sources: list[Source]
    maps: AttnMaps
    strengths: list[float]
    areas: list[float]


def preview(maps: AttnMaps, images: torch.Tensor, request: Request) -> Preview:
    """Draw one view of the maps for a batch of images (images, height, width, 3), with progress; it can be cancelled."""
    images = images[..., :3].float().cpu()
    maps = maps_of_images(maps, images, request.latent, request.origin)
    chosen = paired(maps, images, request.prompt, request.batch_index, request.frame)
    images, sources, notes = chosen.images, chosen.sources, [*maps.notes, *chosen.notes]
    if request.view is View.SELF_ATTENTION:
        drawn, masks, figures = _self_attention(sources, images, request)
    else:
        infos = read_prompt(maps, request.prompt, request.clip, request.text)
        words = choose_words(infos, request.words)
        notes += dict.fromkeys(info.note for info in infos if info.note)
        notes += [f"words: {word.missing} Its mask is empty." for word in words if word.missing]
        asked = bool(request.words.strip()) or any(info.subjects for info in infos)
        if not asked and len(words) * len(images) > _MOST_FIGURES:
            most = max(_MOST_FIGURES // len(images), 1)
            notes.append(f"the first {most} of {len(words)} words are shown; name others in 'words'")
            words = words[:most]
        drawn, masks, figures, left_out = _word_view(sources, images, words, request)
        if left_out:
            notes.append(f"the first {len(words) - left_out} of {len(words)} words are drawn; all have masks")
    entries = [entry for picture in figures for entry in picture.get("words", [picture])]
    strengths, areas = ([or_zero(entry.get(name)) for entry in entries] for name in ("strength", "area"))
    report = {
        "view": request.view.value,
        "prompt": request.prompt,
        "normalize": request.normalize.value,
        "threshold": request.style.threshold,
        "steps": maps.steps,
        "layers": maps.layers,
        "pictures": figures,
        "notes": notes,
        **flat_figures(figures),
    }
    if has_gaps(figures):
        notes.append("numbers that are not finite are null: the latent or the attention has NaN or infinite values")
    sheets = _stack([entry.figure for entry in drawn])
    return Preview(sheets, masks, report, drawn, sources, maps, strengths, areas)


def _stack(figures: Sequence[Figure]) -> torch.Tensor:
    """Return figures on sheets of one size, filled up at the right and below."""
    height = max(figure.image.shape[0] for figure in figures)
    width = max(figure.image.shape[1] for figure in figures)
    sheets = torch.tensor(BACKGROUND).div(255).expand(len(figures), height, width, 3).clone()
    for sheet, figure in zip(sheets, figures, strict=True):
        sheet[: figure.image.shape[0], : figure.image.shape[1]] = figure.image
    return sheets


def _word_view(
    sources: Sequence[Source], images: torch.Tensor, words: Sequence[Word], request: Request
) -> tuple[list[Drawn], torch.Tensor, list[dict[str, Any]], int]:
    """Return figures, masks, numbers, and how many of the words are not drawn."""
    draw = DRAWERS[request.view]
    most = max(_MOST_FIGURES // len(images), 1)
    drawn: list[Drawn] = []
    masks = torch.empty(len(images) * len(words), *images.shape[1:3])
    figures = []
    progress = Progress(len(images))
    for index, (source, image) in enumerate(zip(sources, images, strict=True)):
        heats = source.heats(words)
        entry = Shown(index, len(images), image, source, words, heats, scales(heats, request.normalize))
        for at, figure in enumerate(draw(entry.first(most), request), 1):
            drawn.append(Drawn(figure, index))
            progress.show(index + at / len(words) / 2)
        for at, (heat, scale) in enumerate(zip(heats, entry.scales, strict=True)):
            progress.show(index + 0.5 + at / len(words) / 2)
            masks[index * len(words) + at] = _mask(heat, scale, entry.size, request)
        figures.append({"picture": index + 1, "words": [_word_figures(entry, at, request) for at in range(len(words))]})
        progress.show(index + 1)
    return drawn, masks, figures, max(len(words) - most, 0)


def _word_figures(entry: Shown, at: int, request: Request) -> dict[str, Any]:
    return word_figures(entry.source, entry.words[at], entry.heats[at], entry.scales[at], request.style.threshold)


def _self_attention(
    sources: Sequence[Source], images: torch.Tensor, request: Request
) -> tuple[list[Drawn], torch.Tensor, list[dict[str, Any]]]:
    """Return figures, masks and numbers of where one place of each image looks."""
    x, y = request.query
    heats = [
        source.maps.self_attention(x, y, prompt=source.prompt, batch=source.batch, frame=source.frame or 0) for source in sources
    ]
    each = scales(heats, request.normalize)
    drawn, figures = [], []
    masks = torch.empty(images.shape[:3])
    progress = Progress(len(images))
    for index, (source, image, heat, scale) in enumerate(zip(sources, images, heats, each, strict=True)):
        entry = Shown(index, len(images), image, source, (), [heat], [scale])
        drawn.append(Drawn(draw_query(entry, request), index))
        masks[index] = _mask(heat, scale, entry.size, request)
        numbers = heat_figures(heat, scale, request.style.threshold)
        figures.append({"picture": index + 1, "query": {"x": x, "y": y}} | numbers | {"strength": numbers["mean"]})
        progress.show(index + 1)
    return drawn, masks, figures


def _mask(heat: torch.Tensor, scale: Scale, size: tuple[int, int], request: Request) -> torch.Tensor:
    """Return heat as a mask (height, width), 0..1, of its largest area above the threshold alone where that is asked for."""
    mask = scale.apply(resize_heat(heat, size))
    return mask * largest_part(scale.apply(heat), request.style.threshold, size) if request.largest_part else mask
