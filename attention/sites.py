"""Where a network attends: its attention modules, by family.

A *site* is one attention module inside one block. The table knows the blocks whose text enters through a cross-attention
of its own; joint-attention networks (SD3, Flux, Qwen-Image, ...) have no such site, and a class that is not in the table
is treated as having none, never guessed from attribute names (SD3's ``attn2`` is a self-attention).

For seeing, a second table knows every network's blocks and the order of text and image tokens in its attention; a
*layer* is what the pack names and records.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

Kind = Literal["self", "cross"]


@dataclass(frozen=True)
class BlockLayout:
    """The attention modules of one class of block.

    Attributes:
        self_attention, cross_attention: attribute names of the attention modules; each is called with the image tokens
            (batch, tokens, channels) as its first argument.
        projection: name of the last layer of such a module; its output is the module's result.
        returns_tuple: the module returns ``(result,)``.
    """

    self_attention: tuple[str, ...]
    cross_attention: tuple[str, ...]
    projection: str
    returns_tuple: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a network."""

    name: str
    kind: Kind
    module: torch.nn.Module
    projection: torch.nn.Module
    returns_tuple: bool = False

    def result(self, output: torch.Tensor) -> Any:
        """``output`` in the form in which the module returns it."""
        return (output,) if self.returns_tuple else output


# Keyed by the class's module and name, so that the table imports no model code; subclasses are found through the MRO.
_LAYOUTS: dict[str, BlockLayout | None] = {
    "comfy.ldm.modules.attention.BasicTransformerBlock": BlockLayout(("attn1",), ("attn2",), "to_out"),  # SD1, SD2, SDXL, SVD
    "comfy.ldm.pixart.pixartms.PixArtMSBlock": BlockLayout(("attn",), ("cross_attn",), "proj"),
    "comfy.ldm.hydit.models.HunYuanDiTBlock": BlockLayout(("attn1",), ("attn2",), "out_proj", returns_tuple=True),
    "comfy.ldm.wan.model.WanAttentionBlock": BlockLayout(("self_attn",), ("cross_attn",), "o"),
    "comfy.ldm.wan.ar_model.CausalWanAttentionBlock": None,  # its attention writes a key/value cache that a skip would miss
    "comfy.ldm.lightricks.model.BasicTransformerBlock": BlockLayout(("attn1",), ("attn2",), "to_out"),  # LTX-Video
    "comfy.ldm.lightricks.av_model.BasicAVTransformerBlock": BlockLayout(
        ("attn1", "audio_attn1"), ("attn2", "audio_attn2"), "to_out"
    ),
    "comfy.ldm.cosmos.predict2.Block": BlockLayout(("self_attn",), ("cross_attn",), "output_proj"),  # Cosmos-Predict2, Anima
    # The cross-attention design's second attention looks at the timestep too, which must not be frozen.
    f"{__package__}.dit.DiTBlock": BlockLayout(("attn",), (), "proj"),
}


def block_layout(block: torch.nn.Module) -> BlockLayout | None:
    """The layout of a block, or None where the table does not know its class."""
    for cls in type(block).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in _LAYOUTS:
            return _LAYOUTS[name]
    return None


def attention_sites(network: torch.nn.Module) -> list[AttentionSite]:
    """Every self- and cross-attention of a network, in module order; empty for joint-attention and unknown networks."""
    sites = []
    for block_name, block in network.named_modules():
        layout = block_layout(block)
        if layout is None:
            continue
        by_kind: tuple[tuple[tuple[str, ...], Kind], ...] = ((layout.self_attention, "self"), (layout.cross_attention, "cross"))
        for names, kind in by_kind:
            for name in names:
                module = getattr(block, name, None)
                if module is None:
                    continue
                site_kind = _actual_kind(block, name, kind)
                projection = getattr(module, layout.projection)
                sites.append(AttentionSite(f"{block_name}.{name}", site_kind, module, projection, layout.returns_tuple))
    return sites


def _actual_kind(block: torch.nn.Module, name: str, usual: Kind) -> Kind:
    """U-Net blocks can be built with the two exchanged (``disable_self_attn``, ``switch_temporal_ca_to_sa``)."""
    if name == "attn1" and getattr(block, "disable_self_attn", False):
        return "cross"
    if name == "attn2" and getattr(block, "switch_temporal_ca_to_sa", False):
        return "self"
    return usual


# --- seeing: where text and image stand in every attention call ----------------------------------------------------------

LayerKind = Literal["self", "cross", "joint", "unknown"]
Grid = tuple[int, int, int]  # frames, height, width in tokens


@dataclass(frozen=True)
class JointCall:
    """The lengths a joint attention call is cut by.

    Attributes:
        keys, queries: tokens that are looked at, and that look; image: of them the picture's own; text: rows of the context.
        network: for what only it knows (registers, padding, order).
        arguments: the other conditioning of the model call.
    """

    keys: int
    queries: int
    image: int
    text: int
    network: torch.nn.Module
    arguments: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return self.arguments.get(name) is not None


@dataclass(frozen=True)
class JointSpans:
    """Where text and picture are among the keys; ``again`` is a second copy of the last text tokens (HiDream's per-block Llama
    features), ``rows`` the picture among the queries, where not all tokens look and it is not the first of those that do."""

    text: slice
    image: slice
    again: slice | None = None
    rows: slice | None = None


JointOrder = Callable[[JointCall], JointSpans | None]


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def _text_first(call: JointCall) -> JointSpans:
    """Text, image, reference images."""
    return JointSpans(_span(0, call.text), _span(call.text, call.image))


def _registers_first(call: JointCall) -> JointSpans:
    """AuraFlow: registers, text, image."""
    registers = cast(torch.Tensor, call.network.register_tokens).shape[1]
    return JointSpans(_span(registers, call.text), _span(registers + call.text, call.image))


def _padded_text_first(call: JointCall) -> JointSpans | None:
    """Lumina 2 and Z-Image: text and image, each padded to a multiple. (With reference images their texts come first.)"""
    if call.has("ref_latents"):
        return None
    multiple = getattr(call.network, "pad_tokens_multiple", None) or 1
    return JointSpans(_span(0, call.text), _span(math.ceil(call.text / multiple) * multiple, call.image))


def _image_last(call: JointCall) -> JointSpans:
    """OmniGen2: text, reference images, image. MiniMax H3: text, reference images and sound, sound, image."""
    return JointSpans(_span(0, call.text), _span(call.keys - call.image, call.image))


def _image_then_text(call: JointCall) -> JointSpans:
    """Stable Cascade's keys: image, text, pooled text, pictures. (Its queries are image tokens only.)"""
    return JointSpans(_span(call.image, call.text), _span(0, call.image))


def _text_last(call: JointCall) -> JointSpans:
    """ERNIE-Image, Lens, JoyImage: image, reference images, text."""
    return JointSpans(_span(call.keys - call.text, call.text), _span(0, call.image))


def _cut_text_last(call: JointCall) -> JointSpans:
    """Mochi: image, and the text without its padding."""
    return JointSpans(_span(call.image, call.keys - call.image), _span(0, call.image))


def _boogu(call: JointCall) -> JointSpans | None:
    """Text, image. With reference images a second attention of pictures only has the same look."""
    return None if call.has("ref_latents") else _image_last(call)


def _pixeldit(call: JointCall) -> JointSpans:
    """Text, cut to the length that the network was made for, and image."""
    text = min(call.text, cast(int, call.network.txt_max_length))
    return JointSpans(_span(0, text), _span(text, call.image))


def _hidream(call: JointCall) -> JointSpans | None:
    """Image, T5 text, the last Llama layer's text, and the text of the Llama layer that belongs to the block."""
    llama = call.arguments.get("encoder_hidden_states_llama3")
    if llama is None or call.has("image_cond"):
        return None
    text = call.text + llama.shape[-2]
    return JointSpans(_span(call.image, text), _span(0, call.image), _span(call.image + text, llama.shape[-2]))


def _hunyuan_video(call: JointCall) -> JointSpans | None:
    """Text and image; 0.3.75 has the image first. Version 1.5 puts vision and glyph tokens before the text, 2.1 glyphs behind."""
    blocks = cast(torch.nn.ModuleList, call.network.double_blocks)
    others_first = getattr(call.network, "cond_type_embedding", None) is not None
    if not getattr(blocks[0], "flipped_img_txt", False):
        start = call.keys - call.image
        reference = call.has("ref_latent")
        if others_first and reference:
            return None
        return JointSpans(_span(start - call.text if others_first else 0, call.text), _span(start, call.image))
    if call.has("ref_latent"):
        return None
    return JointSpans(_span(call.keys - call.text if others_first else call.image, call.text), _span(0, call.image))


def _cached_text_first(call: JointCall) -> JointSpans:
    """HiDream-O1: text, image, reference images. Most of the text does not look: it is causal, and kept over the steps."""
    return JointSpans(
        _span(0, call.text), _span(call.text, call.image), rows=_span(call.text - (call.keys - call.queries), call.image)
    )


@dataclass(frozen=True)
class NetworkLayout:
    """How one class of network is seen.

    Attributes:
        family: its name, for people.
        lists: attributes that hold its blocks -> how the pack names them.
        order: of the tokens, where text and image share one attention; None: text enters through cross-attention.
        patch: attribute with the patch size; "" where a token is one latent pixel; None where the network is convolutional,
            and the grid is that of the feature map.
        leading: arguments of the model call whose tokens come before the image's (in cross-attention networks).
        drops_options: modules whose attention calls lack ``transformer_options``; their global is swapped while a call lasts.
        text: the argument with the text, where it is not the context.
        repeats_text: the host repeats a shorter prompt to the length of a longer one in the same batch.
        attention: the self- and cross-attention modules of a block, where T-GATE's table does not have them.
        differentiable: a gradient can be taken through it; one that keeps keys and values between calls cannot.
    """

    family: str
    lists: tuple[tuple[str, str], ...] = ()
    order: JointOrder | None = None
    patch: str | None = "patch_size"
    leading: tuple[str, ...] = ()
    drops_options: tuple[str, ...] = ()
    text: str = "c_crossattn"
    repeats_text: bool = False
    attention: tuple[str, str] | None = None
    differentiable: bool = True


_BLOCKS = (("blocks", "block"),)
_LAYERS = (("layers", "block"),)
_TRANSFORMER_BLOCKS = (("transformer_blocks", "block"),)
_DOUBLE_SINGLE = (("double_blocks", "double"), ("single_blocks", "single"))

UNET = "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"
CASCADE = "comfy.ldm.cascade.stage_c.StageC"

_NETWORKS: dict[str, NetworkLayout | None] = {
    f"{__package__}.dit.DiT": NetworkLayout("DiT", _BLOCKS),
    UNET: NetworkLayout("U-Net", patch=None, repeats_text=True),
    CASCADE: NetworkLayout("Stable Cascade", order=_image_then_text, patch=None, repeats_text=True, text="clip_text"),
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": NetworkLayout("SD3", (("joint_blocks", "block"),), _text_first),
    "comfy.ldm.flux.model.Flux": NetworkLayout("Flux", _DOUBLE_SINGLE, _text_first),
    "comfy.ldm.chroma.model.Chroma": NetworkLayout("Chroma", _DOUBLE_SINGLE, _text_first),
    "comfy.ldm.aura.mmdit.MMDiT": NetworkLayout(
        "AuraFlow", (("double_layers", "double"), ("single_layers", "single")), _registers_first
    ),
    "comfy.ldm.lumina.model.NextDiT": NetworkLayout("Lumina 2 / Z-Image", _LAYERS, _padded_text_first),
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": NetworkLayout("Qwen-Image", _TRANSFORMER_BLOCKS, _text_first),
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": NetworkLayout(
        "HiDream", (("double_stream_blocks", "double"), ("single_stream_blocks", "single")), _hidream
    ),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": NetworkLayout("HunyuanVideo", _DOUBLE_SINGLE, _hunyuan_video),
    "comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel": NetworkLayout("OmniGen2", _LAYERS, _image_last),
    "comfy.ldm.krea2.model.SingleStreamDiT": NetworkLayout("Krea 2", _BLOCKS, _text_first, patch="patch"),
    "comfy.ldm.ernie.model.ErnieImageModel": NetworkLayout(
        "ERNIE-Image", _LAYERS, _text_last, drops_options=("comfy.ldm.ernie.model",)
    ),
    "comfy.ldm.pixart.pixartms.PixArtMS": NetworkLayout("PixArt", _BLOCKS, drops_options=("comfy.ldm.pixart.blocks",)),
    "comfy.ldm.hydit.models.HunYuanDiT": NetworkLayout("HunyuanDiT", _BLOCKS, drops_options=("comfy.ldm.hydit.attn_layers",)),
    "comfy.ldm.wan.model.WanModel": NetworkLayout("Wan", _BLOCKS, leading=("reference_latent",)),
    "comfy.ldm.wan.model.HumoWanModel": NetworkLayout("Wan", _BLOCKS),  # these two have the reference behind the picture
    "comfy.ldm.wan.model.WanModel_S2V": NetworkLayout("Wan", _BLOCKS),
    "comfy.ldm.wan.ar_model.CausalWanModel": None,
    "comfy.ldm.lightricks.model.LTXVModel": NetworkLayout("LTX-Video", _TRANSFORMER_BLOCKS, patch=""),
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": NetworkLayout("Cosmos-Predict2", _BLOCKS, patch="patch_spatial"),
    "comfy.ldm.lens.model.LensTransformer2DModel": NetworkLayout("Lens", _TRANSFORMER_BLOCKS, _text_last, patch=""),
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel": NetworkLayout("JoyImage", (("double_blocks", "double"),), _text_last),
    "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel": NetworkLayout("MageFlow", _TRANSFORMER_BLOCKS, _text_first),
    "comfy.ldm.boogu.model.BooguTransformer2DModel": NetworkLayout(
        "Boogu", (("double_stream_layers", "double"), ("single_stream_layers", "single")), _boogu
    ),
    "comfy.ldm.pixeldit.model.PixDiT_T2I": NetworkLayout("PixelDiT", (("patch_blocks", "block"),), _pixeldit, repeats_text=True),
    "comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint": NetworkLayout("Mochi", _BLOCKS, _cut_text_last),
    "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": NetworkLayout("Ideogram 4", _LAYERS, _text_first, patch=""),
    "comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel": NetworkLayout("CogVideoX", _BLOCKS, _text_first, repeats_text=True),
    "comfy.ldm.minimax.model.MiniMaxH3Model": NetworkLayout("MiniMax H3", _BLOCKS, _image_last),
    "comfy.ldm.hidream_o1.model.HiDreamO1Transformer": NetworkLayout(
        "HiDream-O1", (("language_model.layers", "block"),), _cached_text_first, text="input_ids", differentiable=False
    ),
    "comfy.ldm.cosmos.model.GeneralDIT": NetworkLayout(
        "Cosmos 1", _BLOCKS, patch="patch_spatial", attention=("blocks.0.block.attn", "blocks.1.block.attn")
    ),
    "comfy.ldm.kandinsky5.model.Kandinsky5": NetworkLayout(
        "Kandinsky 5", (("visual_transformer_blocks", "block"),), attention=("self_attention", "cross_attention")
    ),
}


@dataclass(frozen=True)
class CaptureLayer:
    """A module whose attention calls belong to one named layer.

    Attributes:
        name: in the pack's syntax: "input.4", "output.3.1" (second transformer of the block), "middle", "double.7".
        skip: attention calls at the start of each forward that are not the text's (Wan i2v: image embedding).
    """

    name: str
    kind: LayerKind
    module: torch.nn.Module
    skip: int = 0


def network_layout(network: torch.nn.Module) -> NetworkLayout | None:
    """What the table knows of a network's class or its nearest known base class."""
    for cls in type(network).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in _NETWORKS:
            return _NETWORKS[name]
    return None


def unknown_network_message(network: torch.nn.Module) -> str:
    """Why there are no words for this network."""
    return (
        f"{type(network).__name__} is not in Fovea's table of networks, so it is not known which tokens of its attention are "
        "words; only self-attention views may work"
    )


def check_differentiable(network: torch.nn.Module, technique: str) -> None:
    """Raises ``ValueError`` where ``technique`` needs a gradient and none can be taken through the network."""
    layout = network_layout(network)
    if layout is not None and not layout.differentiable:
        raise ValueError(
            f"{technique} cannot work with {type(network).__name__}: this model keeps keys and values between its calls, so no "
            "gradient can be taken through it. Use another model."
        )


def capture_layers(network: torch.nn.Module) -> list[CaptureLayer]:
    """Every layer that can be recorded, in the network's order; a cross-attention block gives a "self" and a "cross" one."""
    layout = network_layout(network)
    if layout is None:
        return _unknown_layers(network)
    if layout.family == "U-Net":
        return _unet_layers(network)
    if layout.family == "Stable Cascade":
        return _cascade_layers(network)
    layers: list[CaptureLayer] = []
    for attribute, prefix in layout.lists:
        for index, block in enumerate(_blocks_of(network, attribute)):
            name = f"{prefix}.{index}"
            if layout.order is not None:
                layers.append(CaptureLayer(name, "joint", block))
            elif layout.attention is not None:
                to_itself, to_text = (block.get_submodule(attention) for attention in layout.attention)
                layers += [CaptureLayer(name, "self", to_itself), CaptureLayer(name, "cross", to_text)]
            else:
                layers += _block_layers(name, block)
    return layers


def _blocks_of(network: torch.nn.Module, attribute: str) -> Iterable[torch.nn.Module]:
    """The members of a list or dictionary of blocks."""
    blocks = network.get_submodule(attribute)
    return blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else cast(torch.nn.ModuleList, blocks)


def _block_layers(name: str, block: torch.nn.Module) -> list[CaptureLayer]:
    """The attention modules of one block. (Of an audio-video block only the video's own, which come first.)"""
    layout = block_layout(block)
    if layout is None:
        return []
    layers = []
    for names, usual in ((layout.self_attention, "self"), (layout.cross_attention, "cross")):
        module = getattr(block, names[0], None) if names else None
        if module is not None:
            kind = _actual_kind(block, names[0], cast(Kind, usual))
            if (usual, kind) == ("self", "cross"):
                continue  # it looks at the text a second time; the block's own cross-attention stands for both
            layers.append(CaptureLayer(name, kind, module, skip=int(hasattr(module, "k_img"))))
    return layers


_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.\d+)?\.transformer_blocks\.(\d+)")


def _unet_layers(network: torch.nn.Module) -> list[CaptureLayer]:
    """Spatial transformers; the temporal ones of a video U-Net attend between frames, not in the picture."""
    found = [(match, block) for name, block in network.named_modules() if (match := _UNET_BLOCK.fullmatch(name))]
    depths = Counter(_unet_block(match) for match, _ in found)
    layers = []
    for match, block in found:
        name = _unet_block(match)
        layers += _block_layers(f"{name}.{match[3]}" if depths[name] > 1 else name, block)
    return layers


def _unet_block(match: re.Match[str]) -> str:
    side = match[1].split("_")[0]
    return side if side == "middle" else f"{side}.{match[2]}"


def _cascade_layers(network: torch.nn.Module) -> list[CaptureLayer]:
    layers = []
    for side in ("down", "up"):
        for name, module in cast(torch.nn.Module, getattr(network, f"{side}_blocks")).named_modules():
            if type(module).__name__ == "Attention2D":
                layers.append(CaptureLayer(f"{side}.{name.removesuffix('.attention')}", "joint", module))
    return layers


def _unknown_layers(network: torch.nn.Module) -> list[CaptureLayer]:
    """The longest list of blocks of a network that the table does not know, or the network itself."""
    lists = [(name, child) for name, child in network.named_children() if isinstance(child, torch.nn.ModuleList) and len(child)]
    if not lists:
        return [CaptureLayer("network", "unknown", network)]
    _, blocks = max(lists, key=lambda item: len(item[1]))
    return [CaptureLayer(f"block.{index}", "unknown", block) for index, block in enumerate(blocks)]


_UNET_CHECKPOINTS = ("ResBlock", "VideoResBlock", "BasicTransformerBlock")


def checkpoint_blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a network that can be computed again from their inputs, none inside another."""
    layout = network_layout(network)
    if layout is not None and layout.family == "U-Net":
        return [module for module in network.modules() if type(module).__name__ in _UNET_CHECKPOINTS]
    if layout is None or not layout.lists:
        return [layer.module for layer in _unknown_layers(network) if layer.module is not network]
    return [block for attribute, _ in layout.lists for block in _blocks_of(network, attribute)]


# Models whose text is padded to a fixed length in front.
LEFT_PADDED_MODELS = ("Flux2",)


def token_grid(network: torch.nn.Module, layout: NetworkLayout | None, latent: Sequence[int], tokens: int) -> Grid | None:
    """The grid of image tokens for a latent (batch, channels, [frames,] height, width).

    Of a network that is convolutional or not in the table: the reduction that gives ``tokens`` tokens, or None.
    """
    *frames, height, width = latent[2:]
    if len(frames) > 1 or not latent[2:]:
        return None
    if layout is None or layout.patch is None:
        grids = (_patched(frames, height, width, (1, patch, patch)) for patch in (1, 2, 4, 8, 16, 32))
        return next((grid for grid in grids if math.prod(grid) == tokens), None)
    patch = getattr(network, layout.patch) if layout.patch else 1
    if isinstance(patch, int):
        length = getattr(network, "patch_temporal", None) or getattr(network, "patch_size_t", None) or 1
        return _patched(frames, height, width, (length, patch, patch))
    return _patched(frames, height, width, (1, 1, *patch)[-3:])


def layer_grid(network: torch.nn.Module, layout: NetworkLayout | None, name: str, latent: Sequence[int]) -> Grid | None:
    """The grid of image tokens in one named layer, known before it runs; None for networks where it is not."""
    if layout is None:
        return None
    if layout.family == "U-Net":
        block = "middle" if name.startswith("middle") else ".".join(name.split(".")[:2])
        size = _unet_sizes(network, latent[-2], latent[-1]).get(block)
        return None if size is None else (1, *size)
    return token_grid(network, layout, latent, 0) if layout.patch is not None else None


def _unet_sizes(network: torch.nn.Module, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Height and width in each block of a U-Net; every level halves the one before, rounding up."""
    sizes: list[tuple[int, int]] = []
    for block in cast(Iterable[torch.nn.Module], network.input_blocks):
        if any(type(module).__name__ == "Downsample" for module in block.modules()):
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        sizes.append((height, width))
    named = {f"input.{index}": size for index, size in enumerate(sizes)}
    return {**named, "middle": sizes[-1], **{f"output.{index}": size for index, size in enumerate(reversed(sizes))}}


def _patched(frames: Sequence[int], height: int, width: int, patch: Sequence[int]) -> Grid:
    length = frames[0] if frames else 1
    return math.ceil(length / patch[0]), math.ceil(height / patch[1]), math.ceil(width / patch[2])
