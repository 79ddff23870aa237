"""Whether a message that a page quotes is one that the pack says."""

from __future__ import annotations

import ast
import re
from functools import cache

from host_inprocess import ROOT


@cache
def own_messages() -> list[str]:
    """Return every text in the pack's sources; what a run fills in is a null character."""
    texts = []
    for path in [*ROOT.glob("attention/**/*.py"), *ROOT.glob("nodes/*.py")]:
        for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(found, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in found.values))
            elif isinstance(found, ast.Constant) and isinstance(found.value, str):
                texts.append(found.value)
    return texts


def is_said(message: str) -> bool:
    """Return whether a message is one of the pack's; ``...`` stands for anything."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.S)
    return any(pattern.search(text) for text in own_messages())
