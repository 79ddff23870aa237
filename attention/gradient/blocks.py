"""Blocks that keep nothing but their inputs, and are computed again when their gradient is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import host
from .plain import differentiable, has_gradient, plain_tensor
from .rerun import is_floating, put_back, requires_gradient, rerun, taken_out
from .watch import LastLayerSeen, Measurements, Watch


class ChangedInPlace(RuntimeError):
    """A network has changed in place what its gradient needs; with copies it can be taken."""


@contextmanager
def recomputing_blocks(blocks: list[torch.nn.Module], watch: Watch, *, copies: bool, keeps_copies: bool) -> Iterator[None]:
    """Let ``blocks`` of a network be computed again in the backward pass, which must run inside this block too.

    Args:
        watch: what is measured inside a block comes out of it with a gradient.
        copies: blocks work on copies of their arguments, since some add to their tokens in place.
        keeps_copies: what is kept are copies as well, since something may be added in place behind a block.

    Raises:
        ChangedInPlace: where ``copies`` was needed.
    """

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def block(*args: Any, **kwargs: Any) -> Any:
            if not (torch.is_grad_enabled() and has_gradient((args, kwargs))):
                return forward(*args, **kwargs)
            inputs: list[Tensor] = []
            others: list[Tensor] = []
            call = taken_out((args, kwargs), inputs, requires_gradient)
            if keeps_copies:
                inputs, call = [x.clone() for x in inputs], put_back(call, None, _copy)
            if not copies:
                taken_out(call, others, is_floating)
            result = _BlockResult(forward, watch)

            def run(tensors: Sequence[Tensor]) -> list[Tensor]:
                if copies:
                    return result.outputs(put_back(call, [x.clone() for x in tensors], _copy))
                return result.outputs(put_back(call, tensors))

            def first(tensors: Sequence[Tensor]) -> list[Tensor]:
                versions = [x._version for x in (*tensors, *others)]
                outputs = run(tensors)
                if not copies and versions != [x._version for x in (*tensors, *others)]:
                    raise ChangedInPlace("A block changes its arguments in place.")
                return [plain_tensor(tensor) for tensor in outputs]

            def again(tensors: Sequence[Tensor]) -> list[Tensor]:
                if not copies:
                    return run(tensors)
                with differentiable():
                    return run(tensors)

            return result.handed_out(rerun(first, again, inputs))

        return block

    with host.swapped_forward([(block, recomputed(block.forward)) for block in blocks]):
        yield


class _BlockResult:
    """What one block returns and what is measured in it, as one list of tensors."""

    def __init__(self, forward: Callable[..., Any], watch: Watch) -> None:
        self.forward, self.watch = forward, watch

    def outputs(self, call: tuple[Any, Any]) -> list[Tensor]:
        """Run the block."""
        found: Measurements = []
        outputs: list[Tensor] = []
        value, self.ended = None, False
        with self.watch.into(found):
            try:
                value = self.forward(*call[0], **call[1])
            except LastLayerSeen:
                self.ended = True
        self.value = taken_out(value, outputs, is_floating)
        leaves, self.form = tree_flatten([measured for _, measured in found])
        self.layers = [layer for layer, _ in found]
        self.measured = taken_out(leaves, outputs, is_floating)
        return outputs

    def handed_out(self, outputs: Sequence[Tensor]) -> Any:
        """Return the block's result on other tensors, and tell what was measured."""
        measured = tree_unflatten(put_back(self.measured, outputs), self.form)
        self.watch.found.extend(zip(self.layers, measured, strict=True))
        if self.ended:
            raise LastLayerSeen
        return put_back(self.value, outputs)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_floating_point() else tensor
