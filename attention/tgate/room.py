"""How much memory a run's cache takes, known before anything is stored, and where it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import host
from ..networks.blocks import AttentionSite, Kind, attention_sites
from ..networks.grids import layer_grid
from ..networks.table import network_layout
from .plan import Action
from .run import MainCall, TGateRun
from .settings import CacheDevice, TGateSettings

_OF_SYSTEM_MEMORY = 0.5  # a cache takes no more of what is free

BytesByKind = Mapping[Kind, float]


def bytes_of_a_cond(base_model: Any, sites: Sequence[AttentionSite], latent: Sequence[int]) -> BytesByKind | None:
    """Return the bytes of all attention outputs for one cond, by kind of attention; None where the layers' sizes are not known.

    Args:
        latent: (images, channels, [frames,] height, width).
    """
    if len(latent) < 4:
        return None
    network = host.diffusion_model(base_model)
    layout = network_layout(network)
    size = torch.finfo(host.compute_dtype(base_model)).bits // 8
    found: dict[Kind, float] = {"self": 0.0, "cross": 0.0}
    for site in sites:
        grid = layer_grid(network, layout, _block_of(site), latent)
        channels = _channels(site.projection)
        if grid is None or channels is None:
            return None
        found[site.kind] += size * latent[0] * math.prod(grid) * channels
    return found


def _block_of(site: AttentionSite) -> str:
    """Return the name of a site's block as layers have it: "input.4", "middle"."""
    where, *rest = site.name.split(".")
    return f"{where.removesuffix('_blocks')}.{rest[0]}" if where in ("input_blocks", "output_blocks") else "middle"


def _channels(projection: torch.nn.Module) -> int | None:
    """Return the channels of what an attention module returns."""
    widths = (getattr(module, "out_features", None) for module in projection.modules())
    return next((width for width in widths if width is not None), None)


def most_bytes(settings: TGateSettings, of_a_cond: BytesByKind, conds: int, *, pair: bool, kept: int = 1) -> float:
    """Return the most bytes that a cache holds at once: in the intervals before the gate, or from the gate on.

    Args:
        conds: that are evaluated before the gate; ``kept``: that are from the gate on, where no mean of a ``pair`` is stored.
    """
    entries = 1 if pair else kept
    behind = of_a_cond["cross"] * entries + (of_a_cond["self"] * entries if settings.fi_interval > 1 else 0)
    before = of_a_cond["self"] * (1 if pair and settings.averages_self_attention else conds) if settings.sp_interval > 1 else 0
    return max(behind, before)


def find_room(run: TGateRun, call: MainCall, base_model: Any, x: torch.Tensor, latent: Sequence[int], conds: int) -> None:
    """Choose where a run's cache is kept, before the first output is stored: on the device, in system memory, or less of it.

    Args:
        x: of the model call, whose batch has an equal part for each of its ``conds``; latent: its shape, of a video with sound
            the video's.
    """
    actions = {call.attention.self_attention, call.attention.cross_attention}
    with run.cache.lock:  # several GPUs may come here at once
        if not run.cache.placed and actions != {Action.COMPUTE}:
            run.cache.placed = True
            _place(run, call, base_model, x, latent, conds)


def _place(run: TGateRun, call: MainCall, base_model: Any, x: torch.Tensor, latent: Sequence[int], conds: int) -> None:
    sites = run.sites(base_model)
    of_a_cond = bytes_of_a_cond(base_model, sites, (x.shape[0] // conds, *latent[1:]))
    if of_a_cond is None:
        of_a_cond = {"self": 1.0, "cross": 1.0}

    def needed(of_a_cond: BytesByKind) -> float:
        both = len(call.active)
        return most_bytes(run.settings, of_a_cond, both, pair=call.pair is not None, kept=max(len(call.plan.stores), 1))

    memory = host.free_system_memory() * _OF_SYSTEM_MEMORY
    on_device = memory if x.device.type == "cpu" else host.spare_memory(x.device)
    if run.settings.cache_device is CacheDevice.GPU or run.cache.device is None and needed(of_a_cond) < on_device:
        return
    if run.cache.device is None and x.device.type != "cpu":
        run.cache.device = run.change.device = torch.device("cpu")
        run.note(f"its cache needs {_in_words(needed(of_a_cond))} and the GPU has no room for it, so it is in system memory")
    if needed(of_a_cond) < memory:
        return
    wanted, less = needed(of_a_cond), {**of_a_cond, "self": 0.0}
    free = f"of {_in_words(2 * memory)} free system memory"
    if 0 < needed(less) < memory:
        run.cache.keeps_self = False
        run.note(f"self-attention is always computed: with it the cache needs {_in_words(wanted)} {free}")
    else:
        run.stop(f"the cache needs {_in_words(needed(less) or wanted)} {free}")


def announced_bytes(settings: TGateSettings, base_model: Any, shape: Sequence[int]) -> float:
    """Return the bytes for which ComfyUI should make room before a run.

    None where the cache is large: weights would leave the device for it, and system memory serves as well.
    """
    if settings.cache_device is CacheDevice.CPU or settings.gate_at >= 1 or host.is_compiled(base_model):
        return 0.0
    of_a_cond = bytes_of_a_cond(base_model, attention_sites(host.diffusion_model(base_model)), shape)
    if of_a_cond is None:
        return 0.0
    conds = 1 if settings.drops_cfg else 2
    needed = most_bytes(settings, of_a_cond, 2, pair=settings.drops_cfg, kept=conds)
    return needed if needed <= host.forward_memory(base_model, shape) else 0.0


def _in_words(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
