"""Name the places: the checkout, its `dev` folder, and the folder that holds everything made here."""

from __future__ import annotations

import os
from pathlib import Path

DEV = Path(__file__).resolve().parent.parent
ROOT = DEV.parent


def home() -> Path:
    """Return the folder that holds everything made here."""
    return Path(os.environ.get("FOVEA_HOME") or ROOT / ".fovea").resolve()
