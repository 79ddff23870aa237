"""Pack the numbers of a training state tightly: what must be exact stays so, what the next steps correct is kept in a few bits.

Everything is entropy-coded (zlib), because the exponents of weights are few. Vectors in, named byte tensors out, and back.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Packed = dict[str, Tensor]

# Numbers that share a scale, and levels on each side of zero: less than four bits. Of what is rounded, the momentum moves the
# next steps most, and a variance, whose root divides it, least.
BLOCK, LEVELS = 256, 7
LOG_STEP, LOG_LOW, LOG_HIGH = 2.0, -8, 7  # steps of a variance's logarithm (base 2), of which few are far from zero


def _squeeze(numbers: Tensor) -> Tensor:
    coder = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)  # no repeats to look for
    data = numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(coder.compress(data) + coder.flush()), dtype=torch.uint8)


def _expand(packed: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.frombuffer(bytearray(zlib.decompress(packed.numpy().tobytes())), dtype=dtype)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors to one float32 vector on the CPU."""
    return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into the shapes of ``like``."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


# ------------------------------------------------------------------------------------------------------- rounded weights


def pack_rounded(vector: Tensor, dtype: torch.dtype) -> Packed:
    """Keep numbers in a type of two bytes, the bytes with the exponents apart from the others."""
    pairs = vector.to(dtype).view(torch.uint8).view(-1, 2)
    kind = torch.tensor([dtype == torch.bfloat16], dtype=torch.uint8)
    return {"low": _squeeze(pairs[:, 0]), "high": _squeeze(pairs[:, 1]), "bfloat16": kind}


def unpack_rounded(packed: Packed) -> Tensor:
    pairs = torch.stack([_expand(packed["low"]), _expand(packed["high"])], 1)
    return pairs.view(torch.bfloat16 if packed["bfloat16"].item() else torch.float16).flatten().float()


# -------------------------------------------------------------------------------------------------- blocks of few bits


def pack_blocks(vector: Tensor) -> Packed:
    """Keep numbers in 15 levels of the largest of their block: differences and momenta, whose errors the next steps outweigh."""
    padded = torch.nn.functional.pad(vector, (0, -len(vector) % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True) / LEVELS
    levels = (padded / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-LEVELS, LEVELS) + LEVELS
    return {"levels": _squeeze(levels.byte().flatten()[: len(vector)]), "scale": _squeeze(scale.flatten())}


def unpack_blocks(packed: Packed) -> Tensor:
    levels = _expand(packed["levels"]).float() - LEVELS
    scale = _expand(packed["scale"], torch.float32)
    return levels * scale.repeat_interleave(BLOCK)[: len(levels)]


# ----------------------------------------------------------------------------------------------- variances of gradients


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the matrix of rank one that has these means of rows and columns (Adafactor, equation 5)."""
    return rows[:, None] * columns / rows.mean().clamp(min=torch.finfo(torch.float32).tiny)


def pack_variances(tensors: Sequence[Tensor]) -> Packed:
    """Keep Adam's second moments: of a matrix its means and, in powers of four, how far each number is from their product."""
    factors, levels = [], []
    for tensor in tensors:
        if tensor.ndim < 2:
            factors.append(tensor.float().cpu().flatten())
            continue
        matrix = tensor.float().cpu().flatten(1)
        rows, columns = matrix.mean(1), matrix.mean(0)
        factors += [rows, columns]
        ratio = (matrix.clamp(min=1e-30) / _product(rows, columns).clamp(min=1e-30)).log2() / LOG_STEP
        levels.append((ratio.round().clamp(LOG_LOW, LOG_HIGH) - LOG_LOW).byte().flatten())
    return {"factors": _squeeze(torch.cat(factors)), "levels": _squeeze(torch.cat(levels) if levels else torch.zeros(0))}


def unpack_variances(packed: Packed, like: Sequence[Tensor]) -> list[Tensor]:
    factors, levels = _expand(packed["factors"], torch.float32), _expand(packed["levels"])
    found, at_factor, at_level = [], 0, 0

    def take(count: int) -> Tensor:
        nonlocal at_factor
        at_factor += count
        return factors[at_factor - count : at_factor]

    for tensor in like:
        if tensor.ndim < 2:
            found.append(take(tensor.numel()).view(tensor.shape))
            continue
        height, width = len(tensor), int(np.prod(tensor.shape[1:]))
        matrix = _product(take(height), take(width))
        ratio = (levels[at_level : at_level + tensor.numel()].view(height, width).float() + LOG_LOW) * LOG_STEP
        at_level += tensor.numel()
        found.append((matrix * ratio.exp2()).view(tensor.shape))
    return found
