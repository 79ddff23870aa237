"""Nodes: schema and wiring. The maths lives in ``attention``."""

from .attn_capture import AttnMapCapture
from .attn_files import FoveaLoadAttnMaps, FoveaSaveAttnMaps
from .attn_preview import AttnMapPreview
from .distill import AttentionDistillSampler
from .dit import DiTClassLabel, DiTLoader, DiTSampler
from .excite import AttendExciteGuider
from .prompt import FoveaPrompt
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
    TGateCache,
    AttnMapCapture,
    AttnMapPreview,
    FoveaSaveAttnMaps,
    FoveaLoadAttnMaps,
    DiTLoader,
    DiTClassLabel,
    DiTSampler,
    AttendExciteGuider,
    AttentionDistillSampler,
    FoveaSeamless,
    FoveaSeamlessDecode,
    FoveaSeamlessEncode,
    FoveaTileWrap,
    FoveaTileCrop,
    FoveaTileView,
]
