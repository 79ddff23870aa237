"""Report a long command: one line per stage, and errors that name the stage, the reason and what to do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SetupError(RuntimeError):
    """A stage failed: says why and, in `advice`, what to do about it."""

    def __init__(self, why: str, advice: str = "") -> None:
        super().__init__(why)
        self.why, self.advice = why, advice


class Stages:
    """Prints one line per stage, such as `[2/5] torch 2.11.0 ... 81 s`, and names the stage when it fails."""

    def __init__(self, count: int) -> None:
        self.count, self.number = count, 0

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str], None]]:
        """Yield a function that replaces the seconds at the end of the line by a word, such as `ready`."""
        self.number += 1
        closing: list[str] = []
        print(f"[{self.number}/{self.count}] {title} ... ", end="", flush=True)
        start = time.monotonic()
        try:
            yield closing.append
        except BaseException as error:
            print("failed" if isinstance(error, Exception) else "stopped", flush=True)
            if isinstance(error, (OSError, subprocess.SubprocessError)):
                raise SetupError(
                    f"{title}: {error}", "Check free disk space and access rights, then run the command again."
                ) from error
            if isinstance(error, SetupError):
                raise SetupError(f"{title}: {error.why}", error.advice) from error
            raise
        print(closing[0] if closing else f"{time.monotonic() - start:.0f} s", flush=True)
