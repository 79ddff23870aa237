"""Tiny text encoders of every family that can be built from ComfyUI's own classes and tokenizers, without weights.

Their linear layers are zero, so each row of what they encode depends on its own token only (and on its place, for CLIP):
rows that change with a word are the word's rows, which is how token positions are proven against ComfyUI's encoding.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.sd
import comfy.supported_models_base
import sentencepiece
import tokenizers
import torch
import transformers

CLIP_CONFIG = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
T5_CONFIG = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2}


def llm_config(layers: int = 3) -> dict[str, int]:
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }


def clip(
    tokenizer: type, model: Callable[..., Any], *, tokenizer_data: dict[str, Any] | None = None, embeddings: Path | None = None,
    zero_linear: bool = True, **model_options: Any,
) -> comfy.sd.CLIP:  # fmt: skip
    """ComfyUI's CLIP object around a tiny encoder; ``model_options`` are those of ComfyUI's encoder classes."""
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    built = comfy.sd.CLIP(
        target,
        embedding_directory=None if embeddings is None else str(embeddings),
        tokenizer_data=tokenizer_data or {},
        model_options={"dtype": torch.float32, **model_options},
    )
    fill(built.cond_stage_model, zero_linear)
    return built


def fill(model: torch.nn.Module, zero_linear: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if ".visual." in f".{name}.":
                continue  # image towers at full size, never used and never written to
            for kind, parameter in module.named_parameters(recurse=False):
                if "Norm" in type(module).__name__:
                    parameter.fill_(0.0 if kind == "bias" or getattr(module, "add", False) else 1.0)
                elif isinstance(module, torch.nn.Linear) and zero_linear:
                    parameter.zero_()
                else:
                    parameter.normal_(std=0.5, generator=generator)


@cache
def sentencepiece_model(pad: int, eos: int, bos: int, unk: int) -> bytes:
    """One piece for each letter. (Real vocabularies of this kind that come with ComfyUI: T5's and Aura's.)"""
    text = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?'()<>|_\\-/\" 一只猫狗鸟和青蛙"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 9), model_writer=written, vocab_size=500, model_type="char", character_coverage=1.0,
        hard_vocab_limit=False, pad_id=pad, eos_id=eos, bos_id=bos, unk_id=unk, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def gemma_pieces() -> torch.Tensor:
    return torch.frombuffer(bytearray(sentencepiece_model(0, 1, 2, 3)), dtype=torch.uint8)


def t5_pieces() -> torch.Tensor:
    return torch.frombuffer(bytearray(sentencepiece_model(0, 1, -1, 2)), dtype=torch.uint8)


@cache
def mistral_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """In the manner of Mistral's: byte-level, few merges, a start token, padding token 11."""
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "<a>",
        "<b>",
        "<c>",
        "<d>",
        "<pad>",
    ]
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("a", "n"), ("an", "d")]
    words = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    model = tokenizers.models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@contextmanager
def mistral_vocabulary() -> Iterator[None]:
    """Mistral's vocabulary comes inside checkpoints, in a format that not every transformers release converts."""
    host = importlib.import_module("comfy.text_encoders.flux")
    made = staticmethod(lambda path, **options: mistral_tokenizer())
    with (
        patch.object(host, "load_mistral_tokenizer", lambda data: {}),
        patch.object(host.MistralTokenizerClass, "from_pretrained", made),
    ):
        yield


@contextmanager
def llama_tokenizer() -> Iterator[None]:
    """ComfyUI's class for it ignores the shipped ``tokenizer.json`` under transformers 5 (no spaces, no Chinese)."""
    host = importlib.import_module("comfy.text_encoders.hunyuan_video")
    with patch.object(host, "LlamaTokenizerFast", transformers.PreTrainedTokenizerFast):
        yield


# --- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Where ComfyUI keeps a text encoder, and how to make it small."""

    module: str
    tokenizer: str
    model: str  # a class, or `name()` for one of ComfyUI's factories
    options: dict[str, Any]
    tokenizer_data: dict[str, Callable[[], Any]] = field(default_factory=dict)
    factory: dict[str, Any] = field(default_factory=dict)
    model_module: str | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def available(self) -> bool:
        """Whether this host has the family."""
        found = importlib.util.find_spec(self.module) is not None
        return found and hasattr(importlib.import_module(self.module), self.tokenizer)

    def build(self, **options: Any) -> comfy.sd.CLIP:
        host = importlib.import_module(self.module)
        kind = getattr(importlib.import_module(self.model_module or self.module), self.model.removesuffix("()"))
        model = kind(**self.factory) if self.model.endswith("()") else kind
        data = {name: make() for name, make in self.tokenizer_data.items()}
        with self.around():
            return clip(getattr(host, self.tokenizer), model, tokenizer_data=data, **{**self.options, **options})


L = {"clip_l_model_config": CLIP_CONFIG}
L_AND_G = {**L, "clip_g_model_config": {**CLIP_CONFIG, "hidden_size": 48}}
T5 = {"t5xxl_model_config": T5_CONFIG}
TE = "comfy.text_encoders."

# SD3 fills CLIP's features up to T5's 4096.
SD3_T5 = {"t5xxl_model_config": {"d_model": 4096, "d_ff": 8, "d_kv": 8, "num_heads": 1, "num_layers": 1}}


def _llm(name: str, layers: int = 3) -> dict[str, Any]:
    return {f"{name}_model_config": llm_config(layers)}


FAMILIES = {
    "sd1": Family("comfy.sd1_clip", "SD1Tokenizer", "SD1ClipModel", L),
    "sdxl": Family("comfy.sdxl_clip", "SDXLTokenizer", "SDXLClipModel", L_AND_G),
    "sdxl-refiner": Family("comfy.sdxl_clip", "SDXLTokenizer", "SDXLRefinerClipModel", L_AND_G),
    "cascade": Family("comfy.sdxl_clip", "StableCascadeTokenizer", "StableCascadeClipModel", L_AND_G),
    "sd2": Family(TE + "sd2_clip", "SD2Tokenizer", "SD2ClipModel", {"clip_h_model_config": CLIP_CONFIG}),
    "sd3": Family(TE + "sd3_clip", "SD3Tokenizer", "sd3_clip()", {**L_AND_G, **SD3_T5}),
    "sd3-no-t5": Family(TE + "sd3_clip", "SD3Tokenizer", "sd3_clip()", L_AND_G, factory={"t5": False}),
    "sd3-only-t5": Family(
        TE + "sd3_clip", "SD3Tokenizer", "sd3_clip()", SD3_T5, factory={"clip_l": False, "clip_g": False}
    ),
    "flux": Family(TE + "flux", "FluxTokenizer", "flux_clip()", {**L, **T5}),
    "pixart": Family(TE + "pixart_t5", "PixArtTokenizer", "pixart_te()", T5),
    "mochi": Family(TE + "genmo", "MochiT5Tokenizer", "mochi_te()", T5),
    "cosmos": Family(TE + "cosmos", "CosmosT5Tokenizer", "te()", T5),
    "ltxv": Family(TE + "lt", "LTXVT5Tokenizer", "ltxv_te()", T5),
    "cogvideo": Family(TE + "cogvideo", "CogVideoXTokenizer", "cogvideo_te()", T5),
    "aura": Family(TE + "aura_t5", "AuraT5Tokenizer", "AuraT5Model", {"pile_t5xl_model_config": T5_CONFIG}),
    "wan": Family(TE + "wan", "WanT5Tokenizer", "te()", {"umt5xxl_model_config": T5_CONFIG}, {"spiece_model": t5_pieces}),
    "hunyuan-dit": Family(
        TE + "hydit", "HyditTokenizer", "HyditModel",
        {"hydit_clip_model_config": CLIP_CONFIG, "mt5xl_model_config": T5_CONFIG}, {"mt5xl.spiece_model": t5_pieces},
    ),
    "hunyuan-video": Family(
        TE + "hunyuan_video", "HunyuanVideoTokenizer", "hunyuan_video_clip()", {**L, **_llm("llama", 4)},
        around=llama_tokenizer,
    ),
    "hunyuan-video-1.5": Family(
        TE + "hunyuan_video", "HunyuanVideo15Tokenizer", "te()", _llm("qwen25_7b", 4), factory={"byt5": False},
        model_module=TE + "hunyuan_image",
    ),
    "hunyuan-image": Family(
        TE + "hunyuan_image", "HunyuanImageTokenizer", "te()", _llm("qwen25_7b", 4), factory={"byt5": False}
    ),
    "qwen-image": Family(TE + "qwen_image", "QwenImageTokenizer", "te()", _llm("qwen25_7b")),
    "omnigen2": Family(TE + "omnigen2", "Omnigen2Tokenizer", "te()", _llm("qwen25_3b")),
    "z-image": Family(TE + "z_image", "ZImageTokenizer", "te()", _llm("qwen3_4b")),
    "lumina2": Family(TE + "lumina2", "LuminaTokenizer", "te()", _llm("gemma2_2b"), {"spiece_model": gemma_pieces}),
    "hidream": Family(
        TE + "hidream", "HiDreamTokenizer", "hidream_clip()", {**L_AND_G, **T5, **_llm("llama")}, around=llama_tokenizer
    ),
    "flux2": Family(TE + "flux", "Flux2Tokenizer", "flux2_te()", _llm("mistral3_24b", 32), around=mistral_vocabulary),
    "klein": Family(TE + "flux", "KleinTokenizer", "klein_te()", _llm("qwen3_4b", 30)),
    "ovis": Family(TE + "ovis", "OvisTokenizer", "te()", _llm("qwen3_2b")),
    "kandinsky5": Family(TE + "kandinsky5", "Kandinsky5TokenizerImage", "te()", {**L, **_llm("qwen25_7b")}),
    "longcat-image": Family(TE + "longcat_image", "LongCatImageTokenizer", "te()", _llm("qwen25_7b")),
    "krea2": Family(TE + "krea2", "Krea2Tokenizer", "te()", _llm("qwen3vl_4b", 37)),
    "mage-flow": Family(TE + "mage_flow", "MageFlowTokenizer", "te()", _llm("qwen3vl_4b")),
    "joyimage": Family(TE + "joyimage", "JoyImageTokenizer", "te()", _llm("qwen3vl_8b")),
    "boogu": Family(TE + "boogu", "BooguTokenizer", "te()", _llm("qwen3vl_8b")),
    "ideogram4": Family(TE + "ideogram4", "Ideogram4Tokenizer", "te()", _llm("qwen3vl_8b", 37)),
    "ernie": Family(TE + "ernie", "ErnieTokenizer", "te()", _llm("ministral3_3b"), around=mistral_vocabulary),
    "anima": Family(TE + "anima", "AnimaTokenizer", "te()", _llm("qwen3_06b")),
    "pixeldit": Family(
        TE + "pixeldit", "PixelDiTGemma2Tokenizer", "pixeldit_te()", _llm("gemma2_2b"), {"spiece_model": gemma_pieces}
    ),
}  # fmt: skip


@cache
def tiny(name: str) -> comfy.sd.CLIP:
    return FAMILIES[name].build()
