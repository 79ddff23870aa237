"""Build the embedded model's parts for the trainers. Start ComfyUI first: its own U-Net and tokenizer are used."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence

import comfy.ldm.modules.attention
import comfy.ops
import torch
from comfy import sd1_clip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.modules.diffusionmodules.util import make_beta_schedule
from host_inprocess import register_demo_model
from torch import Tensor, nn

from scenes import draw

register_demo_model()
layout = importlib.import_module("fovea_demo_model.layout")


# ------------------------------------------------------------------------------------------------- U-Net


def initialise(module: nn.Module) -> None:
    """Fill in default initial values: ComfyUI's layers are made to be loaded and hold whatever was in memory."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.Conv2d.reset_parameters(part)
        elif isinstance(part, nn.Linear):
            nn.Linear.reset_parameters(part)
        elif isinstance(part, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def make_unet() -> nn.Module:
    """Build ComfyUI's U-Net in the embedded model's size, every residual branch starting at zero."""
    unet = UNetModel(
        image_size=layout.LATENT,
        out_channels=layout.LATENT_CHANNELS,
        use_spatial_transformer=True,
        use_checkpoint=False,
        legacy=False,
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        **layout.UNET_DETECTED,
        **{key: value.copy() if isinstance(value, list) else value for key, value in layout.UNET_DECLARED.items()},
    )
    initialise(unet)
    for name, part in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    return unet


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_: object) -> Tensor:
    """Compute softmax(QK^T)V by two batched products: at this size quicker to train on a CPU than the fused kernels."""

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)

    width = q.shape[2] // heads
    weights = torch.bmm(split(q) * width**-0.5, split(k).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, split(v)).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def use_plain_attention() -> None:
    """Let ComfyUI's attention layers use the plain form for the rest of this process."""
    comfy.ldm.modules.attention.optimized_attention = _plain_attention
    comfy.ldm.modules.attention.optimized_attention_masked = _plain_attention


# ---------------------------------------------------------------------------------------------- schedule


def alphas_cumprod() -> Tensor:
    """Return the signal share by timestep [1000], float64, from ComfyUI's own schedule."""
    betas = make_beta_schedule("linear", layout.TIMESTEPS, linear_start=layout.BETA_START, linear_end=layout.BETA_END)
    return torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0)


# ------------------------------------------------------------------------------------------- text encoder


class CaptionTokens:
    """Captions -> CLIP token ids [B, 77]. BPE never merges across words, so each word goes to ComfyUI's tokenizer once."""

    def __init__(self) -> None:
        tokenizer = sd1_clip.SD1Tokenizer()
        self.by_word: dict[str, list[int]] = {}
        for word in draw.WORDS:
            pairs = tokenizer.tokenize_with_weights(word)["l"][0]
            self.by_word[word] = [pair[0] for pair in pairs if pair[0] not in (layout.START_TOKEN, layout.END_TOKEN)]
        self.vocabulary = sorted({layout.START_TOKEN, layout.END_TOKEN, *sum(self.by_word.values(), [])})

    def __call__(self, captions: Iterable[str]) -> Tensor:
        rows = []
        for caption in captions:
            ids = [layout.START_TOKEN]
            for word in caption.replace(",", " ,").split():
                ids += self.by_word[word]
            rows.append(ids + [layout.END_TOKEN] * (layout.TOKENS - len(ids)))
        return torch.tensor(rows)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + mask.to(q.dtype)).softmax(-1)
        x = x + self.self_attn["out_proj"]((weights @ v).transpose(1, 2).flatten(2))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class TextEncoder(nn.Module):
    """The maths and key names of ComfyUI's CLIP text model, on the known words only.

    ComfyUI's class adds in place, which autograd refuses; unknown words are zero rows there.
    """

    rows: Tensor  # token id -> row of the embedding table
    mask: Tensor  # causal, added to the scores

    def __init__(self, vocabulary: Sequence[int]) -> None:
        super().__init__()
        width = layout.TEXT_WIDTH
        self.vocabulary = tuple(vocabulary)
        rows = torch.zeros(layout.TOKEN_COUNT, dtype=torch.long)
        rows[list(vocabulary)] = torch.arange(len(vocabulary))
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("mask", torch.full((layout.TOKENS, layout.TOKENS), -1e9).triu_(1), persistent=False)
        embeddings = {
            "token_embedding": nn.Embedding(len(vocabulary), width),
            "position_embedding": nn.Embedding(layout.TOKENS, width),
        }
        self.embeddings = nn.ModuleDict(embeddings)
        nn.init.normal_(embeddings["token_embedding"].weight, std=0.5)
        nn.init.normal_(embeddings["position_embedding"].weight, std=0.1)
        layers = [
            _Layer(width, layout.TEXT["num_attention_heads"], layout.TEXT["intermediate_size"])
            for _ in range(layout.TEXT["num_hidden_layers"])
        ]
        self.layers = layers  # the same modules as a plain list
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids [B, 77] as conditioning [B, 77, width]."""
        x = self.embeddings["token_embedding"](self.rows[ids]) + self.embeddings["position_embedding"].weight
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.final_layer_norm(x)

    def load_words(self, weights: dict[str, Tensor], vocabulary: Sequence[int]) -> None:
        """Load a state that may know fewer words than this encoder; rows are matched by token id."""
        key = "embeddings.token_embedding.weight"
        table = self.get_parameter(key).detach().clone()
        for token, row in zip(vocabulary, weights[key], strict=True):
            if token in self.vocabulary:
                table[self.vocabulary.index(token)] = row
        self.load_state_dict({**weights, key: table})
