"""From the text of a prompt to the positions of its tokens."""

from .conditioning import FINGERPRINT, METADATA, PromptInfo, encoded_fingerprint, known_metadata, metadata, prompt_infos
from .encoder_rows import UnknownEncoder
from .syntax import parse_subjects
from .token_map import Token, TokenMap, WordTokens
from .tokenizing import tokenize
from .two_texts import encode_two_texts
from .word_list import parse_token_groups, parse_word_list

__all__ = [
    "FINGERPRINT",
    "METADATA",
    "PromptInfo",
    "Token",
    "TokenMap",
    "UnknownEncoder",
    "WordTokens",
    "encode_two_texts",
    "encoded_fingerprint",
    "known_metadata",
    "metadata",
    "parse_subjects",
    "parse_token_groups",
    "parse_word_list",
    "prompt_infos",
    "tokenize",
]
