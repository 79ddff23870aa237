"""Nodes: schema and wiring. The maths lives in ``attention``."""

from .attn_capture import AttnMapCapture
from .attn_files import FoveaLoadAttnMaps, FoveaSaveAttnMaps
from .attn_preview import AttnMapPreview
from .distill import AttentionDistillSampler
from .dit import DiTClassLabel, DiTLoader, DiTSampler
from .excite import AttendExciteGuider, FoveaAttendExcite
from .mask_box import FoveaMaskBox
from .prompt import FoveaPrompt, FoveaPromptSDXL
from .seamless import (
    FoveaSeamless,
    FoveaSeamlessDecode,
    FoveaSeamlessEncode,
    FoveaTileCrop,
    FoveaTileView,
    FoveaTileWrap,
)
from .tgate import TGateCache

NODES = [
    FoveaPrompt,
    FoveaPromptSDXL,
    TGateCache,
    AttnMapCapture,
    AttnMapPreview,
    FoveaMaskBox,
    FoveaSaveAttnMaps,
    FoveaLoadAttnMaps,
    DiTLoader,
    DiTClassLabel,
    DiTSampler,
    AttendExciteGuider,
    FoveaAttendExcite,
    AttentionDistillSampler,
    FoveaSeamless,
    FoveaSeamlessDecode,
    FoveaSeamlessEncode,
    FoveaTileWrap,
    FoveaTileCrop,
    FoveaTileView,
]
