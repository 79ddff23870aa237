"""Which tokens each row of a conditioning comes from, for any of ComfyUI's text encoders.

Encoders concatenate chunks (CLIP), join several encoders along features (SDXL) or along tokens (SD3), and cut chat
templates off (Qwen-Image, HunyuanVideo). None of that is repeated here: ComfyUI's own ``encode_token_weights`` runs on a
shallow copy of the encoder whose networks are replaced by stand-ins that answer with numbered rows. Where the numbers
come out is where the tokens are. Nothing is computed with weights, and the encoder itself is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import host

HostTokens = dict[str, list[list[tuple[Any, ...]]]]

# Outputs that models join to the conditioning, after its rows, and how often: HunyuanDiT's mT5, HiDream's Llama (the last
# layer for all blocks, then each block's own).
JOINED_OUTPUTS = {"conditioning_mt5xl": 1, "conditioning_llama3": 2}

# Anima's adapter answers with one row per T5 token, filled up to this length.
_ADAPTED_IDS, _ADAPTED_LENGTH = "t5xxl_ids", 512


class UnknownEncoder(ValueError):
    """The positions of this encoder's tokens cannot be told."""


@dataclass(frozen=True)
class RawToken:
    """One entry of what ``clip.tokenize`` returns."""

    encoder: str
    chunk: int
    value: Any  # a token id, or the vector of an embedding
    group: int | None  # piece of text or embedding that it comes from; 0 = start, end, padding; None = not known


@dataclass(frozen=True)
class ContextRows:
    """The text tokens a model attends to, in order: for each row the indices of its raw tokens (none in unknown padding)."""

    rows: list[list[int]]
    conditioning_length: int  # rows of the conditioning tensor; further rows come from tensors beside it


def raw_tokens(host_tokens: HostTokens) -> list[RawToken]:
    raw = []
    for encoder, chunks in host_tokens.items():
        grouped = any(len(token) > 2 and token[2] for chunk in chunks for token in chunk)
        for number, chunk in enumerate(chunks):
            raw += [RawToken(encoder, number, token[0], token[2] if grouped else None) for token in chunk]
    return raw


def context_rows(encoder: Any, host_tokens: HostTokens) -> ContextRows:
    """Run the encoder's own bookkeeping on numbered stand-ins and read off where each token went."""
    try:
        output, count = _encode_numbers(encoder, host_tokens)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise UnknownEncoder(_refusal(encoder)) from error
    conditioning, extra = output[0], output[2] if len(output) > 2 else {}
    rows = _read(conditioning, count, encoder)
    length = len(rows)
    for name, times in JOINED_OUTPUTS.items():
        if name in extra:
            rows += _read(extra[name], count, encoder) * times
    if _ADAPTED_IDS in extra:
        rows = _adapted_rows(host_tokens)
    return ContextRows(rows, length)


def _encode_numbers(encoder: Any, host_tokens: HostTokens) -> tuple[tuple[Any, ...], int]:
    numbers: dict[int, int] = {}
    numbered = {name: [_number_chunk(chunk, numbers) for chunk in chunks] for name, chunks in host_tokens.items()}
    if _is_network(encoder):
        output = _StandIn(encoder, numbers).encode_token_weights(numbered[""])
    else:
        output = type(encoder).encode_token_weights(_with_stand_ins(encoder, numbers), numbered)
    return output, len(numbers)


class _NumberedId(int):
    """A token id that can be told from the other tokens with the same id."""


def _number_chunk(chunk: list[tuple[Any, ...]], numbers: dict[int, int]) -> list[tuple[Any, float]]:
    numbered = []
    for token in chunk:
        value = token[0].view_as(token[0]) if torch.is_tensor(token[0]) else _NumberedId(token[0])
        numbers[id(value)] = len(numbers) + 1
        numbered.append((value, 1.0))
    return numbered


def _is_network(module: Any) -> bool:
    return hasattr(module, "encode_token_weights") and hasattr(module, "process_tokens")


def _with_stand_ins(encoder: Any, numbers: dict[int, int]) -> Any:
    stage = copy.copy(encoder)
    children = dict(encoder._modules)
    for name, child in children.items():
        if child is None:
            continue
        if not _is_network(child):  # a projection mixes rows' features beyond recognition
            raise UnknownEncoder(_refusal(encoder))
        children[name] = _StandIn(child, numbers)
    stage.__dict__["_modules"] = children
    return stage


class _StandIn:
    """Answers like one of ComfyUI's ``SDClipModel`` objects, with every feature of a row set to its token's number."""

    def __init__(self, network: Any, numbers: dict[int, int]):
        if type(network).encode_token_weights.__qualname__ != "ClipTokenWeightEncoder.encode_token_weights":
            raise UnknownEncoder(_refusal(network))
        self.layer = network.layer
        self.layers = network.num_layers + 1
        self.width = network.transformer.get_input_embeddings().weight.shape[-1]
        self.with_mask = network.return_attention_masks
        self.numbers = numbers
        self.device = host.intermediate_device()

    def encode_token_weights(self, token_weight_pairs: list[list[tuple[Any, float]]]) -> tuple[Any, ...]:
        numbers = [number for chunk in token_weight_pairs for number in self._rows(chunk)]
        rows = torch.tensor([numbers], dtype=torch.float32, device=self.device).unsqueeze(-1).expand(1, -1, self.width)
        if self.layer == "all" or isinstance(self.layer, list):
            rows = rows.unsqueeze(1).expand(1, self.layers if self.layer == "all" else len(self.layer), -1, -1)
        pooled = torch.zeros(1, self.width, device=self.device)
        if self.with_mask:
            return rows, pooled, {"attention_mask": torch.ones(1, len(numbers), dtype=torch.long, device=self.device)}
        return rows, pooled

    def _rows(self, chunk: list[tuple[Any, float]]) -> Iterator[int]:
        """Embeddings made for another encoder are left out by ComfyUI, which pads at the end instead."""
        left_out = 0
        for value, _ in chunk:
            if torch.is_tensor(value) and value.shape[-1] != self.width:
                left_out += 1
            else:
                yield self.numbers[id(value)]
        yield from [0] * left_out


def _read(output: torch.Tensor, count: int, encoder: Any) -> list[list[int]]:
    """Return numbered rows -> the indices of the raw tokens in each; a row may hold two encoders side by side."""
    if output.ndim == 4:
        output = output[:, -1]
    values = output[0].float().cpu()
    largest = values.amax(dim=-1)
    smallest = torch.where(values > 0, values, torch.inf).amin(dim=-1).minimum(largest)
    if not all(torch.equal(v, v.round()) and bool(((v >= 0) & (v <= count)).all()) for v in (largest, smallest)):
        raise UnknownEncoder(_refusal(encoder))
    return [sorted({int(n) - 1 for n in pair if n > 0}) for pair in zip(smallest.tolist(), largest.tolist(), strict=True)]


def _adapted_rows(host_tokens: HostTokens) -> list[list[int]]:
    raw = raw_tokens(host_tokens)
    rows = [[index] for index, token in enumerate(raw) if token.encoder == "t5xxl" and token.chunk == 0]
    return rows + [[] for _ in range(_ADAPTED_LENGTH - len(rows))]


def _refusal(encoder: Any) -> str:
    return (
        f"The words of a prompt cannot be found in the output of this text encoder ({type(encoder).__name__}): it is not one "
        "Fovea knows. Use views that need no words, or a model with another text encoder."
    )
