"""The prompt's own rows among those of an attention call that computes several prompts at once.

Regional prompts made inside cross-attention ("attention couple") repeat the image's queries for each prompt and put the keys of
all of them into one call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gradient.watch import AttentionCall
from ..host import AttentionInputs
from ..networks.layers import AttentionLayer

# How far keys that were computed in another batch may be off, as a share of their length.
_SAME_KEYS = 1e-2


@dataclass(frozen=True)
class OwnPrompt:
    """What the rows of a prompt are recognised by.

    Attributes:
        text: (1 or batch, rows, channels), as the network gets it; None where it is not known.
        owners: who patches cross-attention, for a message.
    """

    text: Tensor | None
    owners: str


def own_inputs(layer: AttentionLayer, call: AttentionCall, images: Tensor, prompt: OwnPrompt) -> AttentionInputs:
    """Return the arguments of a cross-attention call, one row for each image: the prompt's own.

    Args:
        images: indices in the batch of the images that the pass is about.

    Raises:
        ValueError: the prompt is not among those that are computed.
    """
    inputs, count = call.inputs, len(images)
    if not is_unet(call) or layer.kind != "cross" or inputs.batch == count:
        return inputs
    own = None if prompt.text is None else _own_keys(layer, prompt.text.to(inputs.k.device))
    if own is None or inputs.batch % count or inputs.keys % own.shape[1]:
        raise ValueError(_refusal(prompt))
    found = [
        _row_of(inputs.k, own[int(image) % len(own)], candidates)
        for image, candidates in zip(images, _rows_of_images(inputs.q, count), strict=True)
    ]
    rows, keys = torch.tensor(found, device=inputs.q.device), own.shape[1]
    if -1 in found:
        raise ValueError(_refusal(prompt))
    mask = inputs.mask
    if mask is not None:
        mask = (mask[rows] if mask.shape[0] > 1 else mask)[..., :keys]
    return replace(inputs, q=inputs.q[rows], k=inputs.k[rows][:, :, :keys], mask=mask)


def is_unet(call: AttentionCall) -> bool:
    """Return whether the call is of a U-Net, the only networks whose cross-attention other nodes patch."""
    return call.context.layout is not None and call.context.layout.family == "U-Net"


def _rows_of_images(queries: Tensor, count: int) -> list[range]:
    """Return each image's rows: image after image for every prompt, or prompt after prompt for every image."""
    batch = len(queries)
    if bool((queries[:count] == queries[count : 2 * count]).all()):
        return [range(image, batch, count) for image in range(count)]
    each = batch // count
    return [range(image * each, (image + 1) * each) for image in range(count)]


def _own_keys(layer: AttentionLayer, text: Tensor) -> Tensor | None:
    """Return the keys that the layer makes of the prompt, (1 or batch, rows, heads * channels)."""
    project = getattr(layer.module, "to_k", None)
    if project is None:
        return None
    with torch.no_grad():
        return project(text)


def _row_of(keys: Tensor, own: Tensor, candidates: range) -> int:
    """Return the first of the candidates whose keys are the prompt's own, once or several times over (prompts of unequal length
    are repeated to a common one); -1 where none is."""
    for row in candidates:
        given = keys[row].detach().transpose(0, 1).flatten(1)  # keys, heads * channels
        times = len(given) // len(own)
        expected = own.to(given).repeat(times, 1)
        if bool((given - expected).norm() <= _SAME_KEYS * expected.norm()):
            return row
    return -1


def _refusal(prompt: OwnPrompt) -> str:
    return (
        f"Attend-and-Excite Guider: another node ({prompt.owners or 'of an unknown module'}) computes several prompts in one "
        "cross-attention (attention couple), and the rows of 'positive' are not among them, so its subjects cannot be guided. "
        "Connect the base prompt of that node to 'positive', or use ComfyUI's own nodes for regional prompts "
        "(Conditioning Set Mask, Conditioning Combine)."
    )
