"""What happens at attention modules while one model call lasts: reuse, store, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import UUID

import torch

from .. import host
from ..host import TransformerOptions
from ..networks.blocks import AttentionSite, Kind
from .evaluation import NEGATIVE, POSITIVE
from .plan import Action
from .run import MainCall, TGateRun
from .settings import CfgAfterGate, TGateSettings


@contextmanager
def attention_as(
    actions: dict[Kind, Action],
    sites: list[AttentionSite],
    run: TGateRun,
    call: MainCall,
    uuids: list[UUID],
    options: TransformerOptions,
    batch: int,
    tokens: int | None = None,
) -> Iterator[None]:
    """Let each attention module do what ``actions`` says while the block lasts.

    Args:
        uuids: the conds of the model call, whose ``batch`` has an equal chunk for each.
        tokens: of the image, where modules are also called for those of a guide.
    """
    with ExitStack() as stack:
        reusing = [site for site in sites if actions[site.kind] is Action.REUSE]
        forwards = [(site.module, _reuse(site, run, call, uuids, options, tokens)) for site in reusing]
        stack.enter_context(host.swapped_forward(forwards))
        for site in sites:
            hook: Callable[..., None] | None = None
            if actions[site.kind] is Action.STORE:
                hook = _store(site, run, call, uuids, options, batch)
            elif site.kind == "cross" and actions[site.kind] is Action.REUSE:
                hook = _bypassed(call)
            elif site.kind == "cross" and run.measures:
                hook = _measure(site, run, uuids)
            if hook is not None:
                hook = _of_the_image(hook, tokens) if site.guided else hook
                stack.callback(site.projection.register_forward_hook(hook).remove)
        yield


def _of_the_image(hook: Callable[..., None], tokens: int | None) -> Callable[..., None]:
    """Return a hook that leaves out calls for the tokens of a guide."""

    def chosen(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.shape[1] == tokens:
            hook(module, inputs, output)

    return chosen


def _reuse(
    site: AttentionSite, run: TGateRun, call: MainCall, uuids: list[UUID], options: TransformerOptions, tokens: int | None
) -> Callable[..., Any]:
    """Return a forward that returns the stored output instead of calling the attention module."""
    compute = site.module.forward
    mean = call.pair is not None and (site.kind == "cross" or site.name in run.cache.means)
    writable = host.has_output_patches(options)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if site.guided and x.shape[1] != tokens:
            return compute(x, *args, **kwargs)
        stored = run.cache.load(site.name, uuids, x, mean)
        if stored is not None:
            call.served[site.kind] += 1
            return site.result(stored.clone() if writable else stored)
        if site.kind == "cross":  # the model call may hold one prompt only, and then not the one that decides
            call.give_up("stored attention does not fit")
        call.computed[site.kind] += 1
        return compute(x, *args, **kwargs)

    return forward


def _bypassed(call: MainCall) -> Callable[..., None]:
    """Return a hook for a module that should not run: another pack's block calls its layers without calling the module."""

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        call.give_up("another node computes cross-attention in its own way")

    return hook


def _store(
    site: AttentionSite, run: TGateRun, call: MainCall, uuids: list[UUID], options: TransformerOptions, batch: int
) -> Callable[..., None]:
    """Return a hook that keeps what the module's last layer returns; it also fires where another pack replaced the attention."""
    opening, planning = (call.attention.cross_attention is action for action in (Action.STORE, Action.COMPUTE))
    mean = call.pair is not None and (opening or planning and run.settings.averages_self_attention)
    shares = [_share_of(uuid, call.pair, run.settings) if opening else 0.5 for uuid in uuids] if call.pair is not None else []
    resized = site.kind == "cross" and host.has_input_patches(options, "attn2")
    wanted = call.plan.stores if opening or call.plan.kept is not None else None  # before the gate every prompt is

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.shape[0] % len(uuids) or (resized and output.shape[0] != batch):
            run.stop("another node changes the batch inside cross-attention")
        elif run.stopped:
            return
        elif mean:
            run.cache.store_mean(site.name, shares, output)
        else:
            run.cache.store(site.name, uuids, output, wanted)
        if site.kind == "cross":
            run.seen_sites.add(site.name)
            call.computed["cross"] += 1

    return hook


def _share_of(uuid: UUID, pair: tuple[UUID, UUID], settings: TGateSettings) -> float:
    """Return the share of one of the two prompts in what the gate stores."""
    if settings.keeps_guidance:
        kept = NEGATIVE if settings.cfg_after_gate is CfgAfterGate.DROP_KEEP_NEGATIVE else POSITIVE
        return float(uuid == pair[kept])
    return settings.positive_share if uuid == pair[POSITIVE] else 1 - settings.positive_share


def _measure(site: AttentionSite, run: TGateRun, uuids: list[UUID]) -> Callable[..., None]:
    """Return a hook that shows what the module returns to auto mode."""

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        run.change.add(site.name, uuids, output)

    return hook
