"""What a part of the report is given, and where it says what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """What a part is given.

    Attributes:
        folder: of the report's parts; out: the part's own file, in which every line is kept as it is said.
        tiny: small networks and few steps, to try the report itself.
        prompts: a folder of workflows in the server's form, for a machine that lacks comfy-cli.
    """

    folder: Path
    out: Path
    tiny: bool = False
    prompts: Path | None = None

    def say(self, text: str) -> None:
        with self.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
