"""DiT: a diffusion model that is a plain transformer over patches of the latent, told a class instead of a prompt.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), written from the paper. The network comes in
four sizes (S, B, L, XL), three patch sizes (2, 4, 8) and four ways for timestep and class to enter (section 3.2, figure 3):

- in-context: two extra tokens in the sequence;
- cross-attention: a second attention in every block, to a sequence of those two;
- adaLN: shift and scale of every layer norm are computed from their sum;
- adaLN-Zero: the same, and gates on what each block adds. This is the published model.

Nothing here knows how a file is read or how an image is sampled (``checkpoint``, ``model``). Layers are ComfyUI's, so
that weights can be offloaded, cast and patched; parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import host
from ..networks.blocks import BlockLayout
from ..networks.table import NetworkLayout
from .embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder, position_table

TransformerOptions = dict[str, Any]
MLP_RATIO = 4
EPS = 1e-6


class Conditioning(str, Enum):
    """How timestep and class enter the network."""

    IN_CONTEXT = "in-context"
    CROSS_ATTENTION = "cross-attention"
    ADALN = "adaLN"
    ADALN_ZERO = "adaLN-Zero"


@dataclass(frozen=True)
class Size:
    depth: int
    width: int
    heads: int


SIZES = {"S": Size(12, 384, 6), "B": Size(12, 768, 12), "L": Size(24, 1024, 16), "XL": Size(28, 1152, 16)}
PATCHES = (2, 4, 8)


def heads_of(width: int) -> int:
    """Return the number of attention heads, which no file tells: the paper's, and for other widths heads of 64 channels."""
    known = {size.width: size.heads for size in SIZES.values()}
    if width not in known and width % 64:
        raise ValueError(f"a width of {width} is neither one of the paper's ({', '.join(map(str, known))}) nor a multiple of 64")
    return known.get(width, width // 64)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * width, **layers)
        self.proj = operations.Linear(width, width, **layers)

    def forward(self, x: Tensor, transformer_options: TransformerOptions) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, T, D) each
        return self.proj(host.optimized_attention(q, k, v, self.heads, transformer_options=transformer_options))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.q = operations.Linear(width, width, **layers)
        self.kv = operations.Linear(width, 2 * width, **layers)
        self.proj = operations.Linear(width, width, **layers)

    def forward(self, x: Tensor, condition: Tensor, transformer_options: TransformerOptions) -> Tensor:
        k, v = self.kv(condition).chunk(2, -1)  # (B, 2, D) each
        mixed = host.optimized_attention(self.q(x), k, v, self.heads, transformer_options=transformer_options)
        return self.proj(mixed)


class Mlp(nn.Module):
    def __init__(self, width: int, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(width, MLP_RATIO * width, **layers)
        self.fc2 = operations.Linear(MLP_RATIO * width, width, **layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (B, T, D) scaled and shifted per channel by (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A transformer block whose ``forward`` takes tokens (B, T, D) and what its design conditions on.

    That is the sum of the embeddings (B, D) for adaLN and adaLN-Zero, both of them (B, 2, D) for cross-attention, and is
    not used in-context, where they are in the sequence.
    """

    # The cross-attention design's second attention looks at the timestep too, which must not be frozen.
    block_layout = BlockLayout(("attn",), (), "proj")

    def __init__(
        self, width: int, heads: int, design: Conditioning, mlp_eps: float, layers: dict[str, Any], operations: Any
    ) -> None:
        super().__init__()
        plain = design in (Conditioning.IN_CONTEXT, Conditioning.CROSS_ATTENTION)
        self.norm1 = operations.LayerNorm(width, eps=EPS, elementwise_affine=plain, **layers)
        self.attn = SelfAttention(width, heads, layers, operations)
        if design is Conditioning.CROSS_ATTENTION:
            self.norm_cross = operations.LayerNorm(width, eps=EPS, elementwise_affine=True, **layers)
            self.cross_attn = CrossAttention(width, heads, layers, operations)
        self.norm2 = operations.LayerNorm(width, eps=mlp_eps, elementwise_affine=plain, **layers)
        self.mlp = Mlp(width, layers, operations)
        if not plain:
            parts = 6 if design is Conditioning.ADALN_ZERO else 4
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, parts * width, **layers))
        self.design = design

    def forward(self, x: Tensor, c: Tensor, transformer_options: TransformerOptions) -> Tensor:
        if self.design is Conditioning.ADALN_ZERO:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
            x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), transformer_options)
            return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        if self.design is Conditioning.ADALN:
            shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, -1)
            x = x + self.attn(modulate(self.norm1(x), shift1, scale1), transformer_options)
            return x + self.mlp(modulate(self.norm2(x), shift2, scale2))
        x = x + self.attn(self.norm1(x), transformer_options)
        if self.design is Conditioning.CROSS_ATTENTION:
            x = x + self.cross_attn(self.norm_cross(x), c, transformer_options)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Layer norm, adaptive where the blocks' norms are, and a linear decoder to patches."""

    def __init__(self, width: int, outputs: int, adaptive: bool, layers: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.norm_final = operations.LayerNorm(width, eps=EPS, elementwise_affine=not adaptive, **layers)
        self.linear = operations.Linear(width, outputs, **layers)
        if adaptive:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 2 * width, **layers))
        self.adaptive = adaptive

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm_final(x)
        if self.adaptive:
            x = modulate(x, *self.adaLN_modulation(c).chunk(2, -1))
        return self.linear(x)


class DiT(nn.Module):
    """The network.

    Args:
        depth, width, heads: blocks, channels of a token, attention heads (``SIZES``).
        patch_size: side of a patch, in latent pixels.
        classes: without the null class, whose index is ``classes``.
        null_class: it has one; a network that was trained without dropping labels has none.
        in_channels, out_channels: of the latent; twice as many come out where the variance is learned (section 3.1).
        conditioning: one of the four designs.
        frequency_shift, mlp_eps: the two details in which diffusers' network differs from the paper's (1 and 1e-5 there).
        operations: a class of layers of ``comfy.ops``.
    """

    network_layout = NetworkLayout("DiT", (("blocks", "block"),))

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        patch_size: int,
        classes: int = 1000,
        in_channels: int = 4,
        out_channels: int = 8,
        conditioning: str = Conditioning.ADALN_ZERO.value,
        frequency_shift: int = 0,
        mlp_eps: float = EPS,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = host.plain_operations,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        layers = {"dtype": dtype, "device": device}
        self.dtype = dtype
        self.width = width
        self.patch_size = patch_size
        self.classes = classes
        self.null_class = null_class
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.conditioning = Conditioning(conditioning)
        adaptive = self.conditioning in (Conditioning.ADALN, Conditioning.ADALN_ZERO)
        self.x_embedder = PatchEmbedder(in_channels, width, patch_size, layers, operations)
        self.t_embedder = TimestepEmbedder(width, frequency_shift, layers, operations)
        self.y_embedder = LabelEmbedder(classes + null_class, width, layers, operations)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, self.conditioning, mlp_eps, layers, operations) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * out_channels, adaptive, layers, operations)

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor,
        transformer_options: TransformerOptions | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the noise (and variance) of a latent.

        Args:
            x: (B, in_channels, H, W), of any size; one that is no multiple of the patch is padded.
            timesteps: (B,), of any number type.
            y: (B,) int class indices, ``classes`` is the null class; or (B, K), to be blended.
            label_weights: (B, K), how much of each of K classes.
            transformer_options: of ComfyUI; patches that replace a block are called as in ComfyUI's own transformers.

        Returns:
            (B, out_channels, H, W): first the prediction, then, where it is learned, the variance's interpolation.
        """
        options = {} if transformer_options is None else transformer_options.copy()
        height, width = x.shape[-2:]
        x = host.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        grid = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size

        t = self.t_embedder(timesteps, x.dtype)  # (B, D)
        label = self.y_embedder(y, x.dtype, label_weights)  # (B, D)
        both = torch.stack([t, label], 1)  # (B, 2, D)
        c = both if self.conditioning is Conditioning.CROSS_ATTENTION else t + label
        tokens = self.x_embedder(x) + position_table(*grid, self.width, x.device).to(x.dtype)  # (B, T, D)
        if self.conditioning is Conditioning.IN_CONTEXT:
            tokens = torch.cat([tokens, both], 1)
        tokens = self._through_blocks(tokens, c, options)[:, : grid[0] * grid[1]]
        return self._unpatched(self.final_layer(tokens, c), grid)[..., :height, :width]

    def _through_blocks(self, x: Tensor, c: Tensor, options: TransformerOptions) -> Tensor:
        replacements = options.get("patches_replace", {}).get("dit", {})
        patches = options.get("patches", {}).get("double_block", [])
        options["total_blocks"] = len(self.blocks)
        options["block_type"] = "double"
        for index, block in enumerate(self.blocks):
            options["block_index"] = index
            replacement = replacements.get(("double_block", index))
            if replacement is None:
                x = block(x, c, options)
            else:
                arguments = {"img": x, "vec": c, "transformer_options": options}
                x = replacement(arguments, {"original_block": _as_original(block)})["img"]
            for patch in patches:
                arguments = {"img": x, "vec": c, "block_index": index, "img_offset": 0, "transformer_options": options}
                x = patch(arguments)["img"]
        return x

    def _unpatched(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn (B, T, p * p * C) into (B, C, H, W)."""
        p = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)


def _as_original(block: nn.Module) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """Return a block as ComfyUI hands it to a replacement."""
    return lambda args: {"img": block(args["img"], args["vec"], args["transformer_options"])}
