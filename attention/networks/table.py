"""The table of networks: for each class its blocks, the order of its tokens, and what is special about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch

from .lookup import entry_of
from .token_order import (
    JointOrder,
    boogu,
    cached_text_first,
    cut_text_last,
    hidream,
    hunyuan_video,
    image_last,
    image_then_text,
    padded_text_first,
    pixeldit,
    registers_first,
    text_first,
    text_last,
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
        repeats_text: ComfyUI repeats a shorter prompt to the length of a longer one in the same batch.
        attention: the self- and cross-attention modules of a block, where T-GATE's table does not have them.
        no_gradient: what this model does so that no gradient can be taken through it; empty where one can.
        guided: its blocks also attend for a guide (a pose video), whose tokens are fewer than the image's.
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
    no_gradient: str = ""
    guided: bool = False


_BLOCKS = (("blocks", "block"),)
_LAYERS = (("layers", "block"),)
_TRANSFORMER_BLOCKS = (("transformer_blocks", "block"),)
_DOUBLE_SINGLE = (("double_blocks", "double"), ("single_blocks", "single"))
UNET = "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"
CASCADE = "comfy.ldm.cascade.stage_c.StageC"
_WAN = NetworkLayout("Wan", _BLOCKS, leading=("reference_latent",))

_NETWORKS: dict[str, NetworkLayout | None] = {
    UNET: NetworkLayout("U-Net", patch=None, repeats_text=True),
    CASCADE: NetworkLayout("Stable Cascade", order=image_then_text, patch=None, repeats_text=True, text="clip_text"),
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": NetworkLayout("SD3", (("joint_blocks", "block"),), text_first),
    "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": NetworkLayout(
        "SD3", (("joint_blocks", "block"),), text_first
    ),
    "comfy.ldm.flux.model.Flux": NetworkLayout("Flux", _DOUBLE_SINGLE, text_first),
    "comfy.ldm.chroma.model.Chroma": NetworkLayout("Chroma", _DOUBLE_SINGLE, text_first),
    "comfy.ldm.chroma_radiance.model.ChromaRadiance": NetworkLayout("Chroma", _DOUBLE_SINGLE, text_first),
    "comfy.ldm.aura.mmdit.MMDiT": NetworkLayout(
        "AuraFlow", (("double_layers", "double"), ("single_layers", "single")), registers_first
    ),
    "comfy.ldm.lumina.model.NextDiT": NetworkLayout("Lumina 2 / Z-Image", _LAYERS, padded_text_first),
    "comfy.ldm.lumina.model.NextDiTPixelSpace": NetworkLayout("Lumina 2 / Z-Image", _LAYERS, padded_text_first),
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": NetworkLayout("Qwen-Image", _TRANSFORMER_BLOCKS, text_first),
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": NetworkLayout(
        "HiDream", (("double_stream_blocks", "double"), ("single_stream_blocks", "single")), hidream
    ),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": NetworkLayout("HunyuanVideo", _DOUBLE_SINGLE, hunyuan_video),
    "comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel": NetworkLayout("OmniGen2", _LAYERS, image_last),
    "comfy.ldm.krea2.model.SingleStreamDiT": NetworkLayout("Krea 2", _BLOCKS, text_first, patch="patch"),
    "comfy.ldm.ernie.model.ErnieImageModel": NetworkLayout(
        "ERNIE-Image", _LAYERS, text_last, drops_options=("comfy.ldm.ernie.model",)
    ),
    "comfy.ldm.pixart.pixartms.PixArtMS": NetworkLayout("PixArt", _BLOCKS, drops_options=("comfy.ldm.pixart.blocks",)),
    "comfy.ldm.hydit.models.HunYuanDiT": NetworkLayout("HunyuanDiT", _BLOCKS, drops_options=("comfy.ldm.hydit.attn_layers",)),
    "comfy.ldm.wan.model.WanModel": _WAN,
    "comfy.ldm.wan.model.VaceWanModel": _WAN,
    "comfy.ldm.wan.model.CameraWanModel": _WAN,
    "comfy.ldm.wan.model.SCAILWanModel": _WAN,
    "comfy.ldm.wan.model.SCAIL2WanModel": _WAN,
    "comfy.ldm.wan.model_animate.AnimateWanModel": _WAN,
    "comfy.ldm.wan.model_wandancer.WanDancerModel": _WAN,
    "comfy.ldm.wan.model_animate2.WanAnimate2Model": NetworkLayout(
        "Wan", _BLOCKS, guided=True, no_gradient="writes the pose video's keys and values in place"
    ),
    "comfy.ldm.wan.model.HumoWanModel": NetworkLayout("Wan", _BLOCKS),  # these two have the reference behind the image
    "comfy.ldm.wan.model.WanModel_S2V": NetworkLayout("Wan", _BLOCKS),
    "comfy.ldm.wan.ar_model.CausalWanModel": None,
    "comfy.ldm.lightricks.model.LTXVModel": NetworkLayout("LTX-Video", _TRANSFORMER_BLOCKS, patch=""),
    "comfy.ldm.lightricks.av_model.LTXAVModel": NetworkLayout("LTX-Video", _TRANSFORMER_BLOCKS, patch=""),
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": NetworkLayout("Cosmos-Predict2", _BLOCKS, patch="patch_spatial"),
    "comfy.ldm.anima.model.Anima": NetworkLayout("Cosmos-Predict2", _BLOCKS, patch="patch_spatial"),
    "comfy.ldm.lens.model.LensTransformer2DModel": NetworkLayout("Lens", _TRANSFORMER_BLOCKS, text_last, patch=""),
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel": NetworkLayout("JoyImage", (("double_blocks", "double"),), text_last),
    "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel": NetworkLayout("MageFlow", _TRANSFORMER_BLOCKS, text_first),
    "comfy.ldm.boogu.model.BooguTransformer2DModel": NetworkLayout(
        "Boogu", (("double_stream_layers", "double"), ("single_stream_layers", "single")), boogu
    ),
    "comfy.ldm.pixeldit.model.PixDiT_T2I": NetworkLayout("PixelDiT", (("patch_blocks", "block"),), pixeldit, repeats_text=True),
    "comfy.ldm.pixeldit.pid.PidNet": NetworkLayout("PixelDiT", (("patch_blocks", "block"),), pixeldit, repeats_text=True),
    "comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint": NetworkLayout("Mochi", _BLOCKS, cut_text_last),
    "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": NetworkLayout("Ideogram 4", _LAYERS, text_first, patch=""),
    "comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel": NetworkLayout("CogVideoX", _BLOCKS, text_first, repeats_text=True),
    "comfy.ldm.minimax.model.MiniMaxH3Model": NetworkLayout("MiniMax H3", _BLOCKS, image_last),
    "comfy.ldm.hidream_o1.model.HiDreamO1Transformer": NetworkLayout(
        "HiDream-O1",
        (("language_model.layers", "block"),),
        cached_text_first,
        text="input_ids",
        no_gradient="keeps keys and values between its calls",
    ),
    "comfy.ldm.cosmos.model.GeneralDIT": NetworkLayout(
        "Cosmos 1", _BLOCKS, patch="patch_spatial", attention=("blocks.0.block.attn", "blocks.1.block.attn")
    ),
    "comfy.ldm.kandinsky5.model.Kandinsky5": NetworkLayout(
        "Kandinsky 5", (("visual_transformer_blocks", "block"),), attention=("self_attention", "cross_attention")
    ),
}


def network_layout(network: torch.nn.Module) -> NetworkLayout | None:
    """Return what is known of a network; None for a class that is not in the table, and for changed subclasses of one that is."""
    layout = entry_of(type(network), _NETWORKS, "network_layout")
    return layout if layout is not None and _has_known_blocks(network, layout) else None


def _has_known_blocks(network: torch.nn.Module, layout: NetworkLayout) -> bool:
    """Return whether the blocks are ComfyUI's or the pack's own: a subclass may have put its own in their place."""
    known = (__package__.partition(".")[0], "comfy", "torch")  # torch: blocks that are compiled in place
    blocks = (block for attribute, _ in layout.lists for block in blocks_of(network, attribute))
    return all(type(block).__module__.partition(".")[0] in known for block in blocks)


def blocks_of(network: torch.nn.Module, attribute: str) -> Iterable[torch.nn.Module]:
    """Return the members of a list or dictionary of blocks."""
    blocks = network.get_submodule(attribute)
    return blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else cast(torch.nn.ModuleList, blocks)


def unknown_network_message(network: torch.nn.Module) -> str:
    """Return why there are no words for this network."""
    return (
        f"{type(network).__name__} is not in Fovea's table of networks, so it is not known which tokens of its attention are "
        "words; only self-attention views may work"
    )


# Models whose text is padded to a fixed length in front.
LEFT_PADDED_MODELS = ("Flux2",)
