"""Prompts cut to a window of the image: where they act, what they carry for every pixel, and the image of their ControlNet."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import comfy.utils
import torch
from comfy.conds import CONDNoiseShape
from torch import Tensor

Area = tuple[int, int, int, int]  # height, width, top, left in latent pixels
_FEATHER = 8  # over so many latent pixels ComfyUI lets a prompt for an area begin


def part(x: Tensor, area: Area) -> Tensor:
    """Return an area of (..., height, width): a view, or a copy where the area goes over an edge."""
    height, width, top, left = area
    if top + height > x.shape[-2] or left + width > x.shape[-1]:
        x, top, left = x.roll((-top, -left), (-2, -1)), 0, 0
    return x[..., top : top + height, left : left + width]


class PromptsInWindows:
    """The prompts of a run in each of its windows.

    To whatever keeps something of a prompt, those of each window are prompts of their own.
    """

    def __init__(self, windows: Sequence[Area]) -> None:
        self.windows = windows
        self._names: dict[tuple[Any, int], UUID] = {}
        self._acts: dict[tuple[Any, int], bool] = {}
        self._where: dict[Any, Tensor] = {}
        self._encoded: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def at(self, place: int, conds: Sequence[Any], x: Tensor) -> Iterator[list[Any]]:
        """Give the processed prompts of every kind for one window of the latents ``x``, while the block lasts."""
        window = self.windows[place]
        controls: dict[Any, Any] = {}
        made: list[tuple[int, Any]] = []

        def own(cond: Mapping[str, Any]) -> dict[str, Any]:
            moved = {
                name: value._copy_with(part(value.cond, window)) if isinstance(value, CONDNoiseShape) else value
                for name, value in cond["model_conds"].items()
            }
            found = {**cond, "model_conds": moved, "uuid": self._names.setdefault((cond.get("uuid"), place), uuid4())}
            area = found.pop("area", None)
            where = self._weights(cond, x)
            if where is not None:
                found["mask"] = part(where, window)
            if cond.get("control") is not None:
                control = cond["control"]
                key = id(control), None if area is None else tuple(area)
                if key not in controls:
                    controls[key] = self._control(control, place, area, x, made)
                found["control"] = controls[key]
            return found

        yield [None if kind is None else [own(cond) for cond in self._acting(kind, place, x)] for kind in conds]
        for original, control in made:
            if control.vae is not None and control.cond_hint is not None:
                self._encoded[original, place] = control.cond_hint  # a VAE has made it; scaled images are not worth keeping

    def _acting(self, kind: Sequence[Mapping[str, Any]], place: int, x: Tensor) -> list[Mapping[str, Any]]:
        """Return the prompts that act in a window; all of them where none does, so that a model call has one."""

        def acts(cond: Mapping[str, Any]) -> bool:
            where = self._weights(cond, x)
            return where is None or bool(part(where, self.windows[place]).any())

        if len(kind) < 2:
            return list(kind)
        found = []
        for cond in kind:
            key = cond.get("uuid"), place
            if key not in self._acts:
                self._acts[key] = acts(cond)
            if self._acts[key]:
                found.append(cond)
        return found or list(kind)

    def _weights(self, cond: Mapping[str, Any], x: Tensor) -> Tensor | None:
        """Return how much a prompt counts at each place, (n, ..., height, width); None: everywhere alike."""
        area, mask = cond.get("area"), cond.get("mask")
        if area is None:
            return mask if isinstance(mask, Tensor) else None
        key = cond.get("uuid")
        if key not in self._where:
            weights = area_weights(area, tuple(x.shape[2:]), feathered=mask is None).to(x.device)
            self._where[key] = weights if mask is None else weights * mask
        return self._where[key]

    # ControlNet

    def _control(self, control: Any, place: int, area: Sequence[int] | None, x: Tensor, made: list[tuple[int, Any]]) -> Any:
        """Return a ControlNet, and those before it, for one window: their images are the window's part.

        Args:
            area: what of the latent the image is for, where the prompt has an area.
            made: takes the identity of every ControlNet and its copy.
        """
        found = copy.copy(control)
        made.append((id(control), found))
        found.cond_hint = self._encoded.get((id(control), place))
        if hasattr(found, "control_input"):
            found.control_input = None  # of a T2I-Adapter
        window, size = self.windows[place], (x.shape[-2], x.shape[-1])
        ratio = int(control.compression_ratio) * (1 if control.vae is None else int(control.vae.spacial_compression_encode()))
        way = control.upscale_algorithm
        found.cond_hint_original = _part_of_image(control.cond_hint_original, window, area, size, ratio, way)
        found.extra_concat_orig = [_part_of_image(one, window, area, size, ratio, way) for one in control.extra_concat_orig]
        if control.previous_controlnet is not None:
            found.previous_controlnet = self._control(control.previous_controlnet, place, area, x, made)
        clones = getattr(control, "multigpu_clones", None)
        if clones:
            found.multigpu_clones = {device: self._control(clone, place, area, x, made) for device, clone in clones.items()}
        return found


def area_weights(area: Sequence[int], sizes: Sequence[int], *, feathered: bool) -> Tensor:
    """Return how much a prompt for an area counts at each place of a latent, (1, *sizes), as ComfyUI has it.

    Args:
        area: sizes, then starts, of the last dimensions; feathered: whether it begins softly, as without a mask.
    """
    half = len(area) // 2
    lengths, starts = [*sizes, *area[:half]][-len(sizes) :], [*[0] * len(sizes), *area[half:]][-len(sizes) :]
    weights = torch.ones(1, *sizes)
    for dimension, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        length = min(lengths[dimension], size - start)
        ramp = torch.ones(length)
        rise = min(_FEATHER, length // 4) if feathered else 0
        steps = (torch.arange(rise) + 1) / max(rise, 1)
        if start:
            ramp[:rise] *= steps
        if start + length < size:
            ramp[length - rise :] *= steps.flip(0)
        line = torch.zeros(size)
        line[start : start + length] = ramp
        weights = weights * line.view(-1, *[1] * (len(sizes) - 1 - dimension))
    return weights


def uncut_control(conds: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of a prompt's ControlNet that has no image which could be cut into windows; None: all have."""
    for cond in conds:
        control = cond.get("control")
        while control is not None:
            if not isinstance(getattr(control, "cond_hint_original", None), Tensor):
                return type(control).__name__
            control = getattr(control, "previous_controlnet", None)
    return None


def _part_of_image(
    image: Tensor, window: Area, area: Sequence[int] | None, size: tuple[int, int], ratio: int, way: str
) -> Tensor:
    """Return what a window shows of an image (n, channels, height, width) that ComfyUI would scale to the whole latent.

    Args:
        area: what of the latent, of ``size``, the image is for; there is nothing around it.
    """
    height, width, top, left = *size, 0, 0
    if area is not None:
        half = len(area) // 2
        top, left = area[-2:]
        height, width = min(area[half - 2], height - top), min(area[half - 1], width - left)
    whole = comfy.utils.common_upscale(image, width * ratio, height * ratio, way, "center")
    if area is not None:
        canvas = whole.new_zeros(*whole.shape[:-2], size[0] * ratio, size[1] * ratio)
        canvas[..., top * ratio : (top + height) * ratio, left * ratio : (left + width) * ratio] = whole
        whole = canvas
    height, width, top, left = window
    return part(whole, (height * ratio, width * ratio, top * ratio, left * ratio))
