"""A process that does parts of the report in turn, with ComfyUI started once: ``-m gpu.worker FOLDER SETTINGS NAME ...``.

In the folder, NAME.started is there as soon as a part begins, NAME.md grows with what it says, and NAME.done says how it
ended. So another process can tell which part takes too long, and end this one without losing anything.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path

from gpu.parts import PARTS
from gpu.trial import Trial

START = "start"


def start(folder: Path) -> None:
    """Start ComfyUI in this process, as its own server does, and say what it runs on."""
    mark(folder, START)
    import host_inprocess
    from bench.measure import SAME_KERNEL

    host_inprocess.start_host(argv=SAME_KERNEL)
    dynamic = host_inprocess.begin_dynamic_vram()
    host_inprocess.register_demo_model()
    import comfy.utils
    import torch
    from bench.measure import machine
    from bench.models import Target

    comfy.utils.set_progress_bar_enabled(False)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    (folder / f"{START}.md").write_text(f"{machine(Target.here())}; dynamic VRAM {'on' if dynamic else 'off'}", encoding="utf-8")
    end(folder, START, "ok")


def mark(folder: Path, name: str) -> None:
    (folder / f"{name}.started").touch()


def end(folder: Path, name: str, how: str) -> None:
    (folder / f"{name}.done").write_text(how, encoding="utf-8")


def main(folder: Path, settings: dict[str, str | bool | None], names: list[str]) -> int:
    """Do the parts. Return 1 where the device no longer answers, so that the others need another process."""
    prompts = settings["prompts"]
    for name in names:
        part = PARTS[name]
        if part.inside and "comfy" not in sys.modules:
            start(folder)
        mark(folder, name)
        try:
            tiny, chosen = bool(settings["tiny"]), None if prompts is None else Path(str(prompts))
            part.run(Trial(folder, folder / f"{name}.md", tiny, chosen))
        except Exception as error:
            traceback.print_exc()
            end(folder, name, f"failed: {type(error).__name__}: {error}")
            if "CUDA error" in str(error):
                return 1
            continue
        except SystemExit as error:  # a benchmark whose sides do different work
            end(folder, name, f"failed: {error}")
            continue
        end(folder, name, "ok")
        _free()
    return 0


def _free() -> None:
    if "comfy.model_management" not in sys.modules:
        return
    import gc

    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


class Stopped(BaseException):
    """The part takes too long: whatever it has started is ended on the way out."""


def _stop(number: int, frame: object) -> None:
    raise Stopped


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
