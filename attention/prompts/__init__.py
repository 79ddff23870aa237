"""From the text of a prompt to the positions of its tokens."""

from .conditioning import METADATA, PromptInfo, metadata, prompt_infos
from .encoder_rows import UnknownEncoder
from .syntax import parse_subjects
from .token_map import Token, TokenMap, WordTokens
from .tokenizing import tokenize

__all__ = [
    "METADATA",
    "PromptInfo",
    "Token",
    "TokenMap",
    "UnknownEncoder",
    "WordTokens",
    "metadata",
    "parse_subjects",
    "prompt_infos",
    "tokenize",
]
