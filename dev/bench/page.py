"""Run all benchmarks in one go, onto the pages of docs/benchmarks.

    python dev bench [--only NAME ...] [--threads N] [--tiny] [--peer NAME=PATH] [--daam PYTHON] [--pages FOLDER]

Each benchmark runs in a process of its own, one after the other, and its part of a page is replaced as soon as it is done: pages
that were interrupted keep what they had. Figures are ratios of variants that took turns in one process; seconds are shown to
judge them by, and hold for this machine alone. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.peers import add_peer_argument

DEV = Path(__file__).resolve().parent.parent
PAGES = DEV.parent / "docs" / "benchmarks"
INTRODUCTION = """# {title}

Made by `python dev bench`. Variants take turns in one process, after a round that does not count; what is compared is ratios, as
medians with the lowest and the highest. Below every title is the command that repeats it alone. [All benchmarks](README.md).
"""
# The title of each page, and its parts in their order; what follows a hyphen tells two parts of one benchmark apart.
CONTENTS: dict[str, tuple[str, Sequence[str]]] = {
    "t-gate": ("Benchmarks of T-GATE", ("tgate", "tgate-sdxl", "tgate-pixart", "tgate-auto", "cache")),
    "pareto": ("T-GATE and what else makes sampling faster", ("pareto", "pareto-intervals")),
    "gradients": ("Benchmarks of guided sampling", ("gradient", "excite", "distill")),
    "maps": ("Benchmarks of attention maps", ("maps", "maps-daam")),
    "dit": ("Benchmarks of DiT", ("dit",)),
    "overhead": ("What the pack itself costs", ("launches", "overhead", "scaling", "profile")),
}
# {plots} is the folder of the pages.
PARTS: dict[str, Sequence[str]] = {
    "tgate": ("--parts", "speed", "--size", "192", "--steps", "5"),
    "tgate-sdxl": ("--parts", "speed", "--shape", "sdxl", "--size", "128", "--steps", "5"),
    "tgate-pixart": ("--parts", "speed", "--shape", "pixart", "--steps", "5"),
    "tgate-auto": ("--parts", "auto", "--prompts", "32"),
    "pareto": ("--prompts", "16", "--plot", "{plots}/pareto.svg"),
    "pareto-intervals": ("--prompts", "16", "--intervals"),
    "cache": (),
    "gradient": (),
    "excite": ("--size", "256", "--steps", "10", "--pairs", "3"),
    "distill": ("--size", "192", "--steps", "2", "--iterations", "2"),
    "maps": ("--size", "192", "--steps", "3"),
    "maps-daam": ("--parts", "unet", "--settings", "capture", "--size", "512", "--steps", "1"),
    "dit": ("--steps", "3"),
    "launches": ("--pairs", "5"),
    "overhead": (),
    "scaling": (),
    "profile": (),
}
WITH_PEERS = ("tgate", "maps", "dit")
WITH_DAAM = "maps-daam"  # left out without
TINY = {
    "tgate": ("--tiny", "--parts", "speed"), "tgate-sdxl": ("--tiny", "--parts", "speed", "--shape", "sdxl"),
    "tgate-pixart": ("--tiny", "--parts", "speed", "--shape", "pixart"),
    "tgate-auto": ("--tiny", "--parts", "auto", "--prompts", "1"),
    "pareto": ("--prompts", "2", "--repeats", "1", "--only", "fewer steps"),
    "pareto-intervals": ("--prompts", "2", "--repeats", "1", "--intervals"), "gradient": ("--tiny", "--pairs", "1"),
    "excite": ("--tiny",), "distill": ("--tiny",), "maps": ("--tiny",), "maps-daam": ("--tiny", "--parts", "unet"),
    "dit": ("--tiny", "--pairs", "1"), "profile": ("--tiny",),
    "launches": ("--shapes", "sd15", "--pairs", "1"),
}  # fmt: skip


def part_of(page: str, name: str) -> str | None:
    """Return what a page has between the marks of a part."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", page, re.S)
    return found[1] if found else None


def page_of(part: str) -> str:
    """Return the name of the page that a part is on."""
    return next(name for name, (_, parts) in CONTENTS.items() if part in parts)


def with_part(page: str, name: str, text: str) -> str:
    """Put a new text for a part on its page; parts keep the order of ``CONTENTS``."""
    title, order = CONTENTS[page_of(name)]
    parts = {each: part_of(page, each) for each in order} | {name: text}
    shown = [f"<!-- {each} -->\n{kept}\n<!-- end of {each} -->\n" for each, kept in parts.items() if kept is not None]
    return "\n".join([INTRODUCTION.format(title=title), *shown])


def benchmark_of(part: str) -> str:
    return part.partition("-")[0]


def arguments_of(name: str, args: argparse.Namespace, plots: Path) -> list[str]:
    found = list(TINY.get(name, ())) if args.tiny else [each.format(plots=plots) for each in PARTS[name]]
    if args.threads:
        found += ["--threads", str(args.threads)]
    if name in WITH_PEERS and not (name == "dit" and args.tiny):
        found += [item for peer in args.peer for item in ("--peer", peer)]
    if name == WITH_DAAM:
        found += ["--daam", str(args.daam)]
    return found


def shown_command(name: str, arguments: Sequence[str], root: Path) -> str:
    """Write the command as a reader would type it: relative paths, and no other machine's."""
    words = [re.sub(r"^([^=]+)=.*", r"\1=PATH", word) if "=" in word else word.replace(f"{root}/", "") for word in arguments]
    if "--daam" in words:
        words[words.index("--daam") + 1] = "PYTHON"
    return " ".join(["python dev bench", benchmark_of(name), *(f'"{word}"' if " " in word else word for word in words)])


def run_part(name: str, args: argparse.Namespace) -> None:
    """Run one benchmark and put its report on its page."""
    folder: Path = args.pages.resolve()
    arguments = arguments_of(name, args, folder)
    shown = shown_command(name, arguments, folder.parent.parent)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "report.md")
        command = [sys.executable, str(DEV), "bench", benchmark_of(name), *arguments, "--out", str(out)]
        print(f"\n=== {shown}", flush=True)
        subprocess.run(command, check=True, env={**os.environ, "FOVEA_INSIDE": "1"})
        title, _, rest = out.read_text(encoding="utf-8").strip().partition("\n")
    text = f"{title}\n\n`{shown}`, {datetime.date.today():%Y-%m-%d}\n\n{rest.strip()}"
    plot = folder / f"{name}.svg"
    if any(str(plot) in each for each in arguments):
        text += f"\n\n![{title.removeprefix('## ')}]({plot.name})"
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{page_of(name)}.md"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    page.write_text(with_part(before, name, text), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts; the pages keep their others")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the pages themselves")
    add_peer_argument(parser)
    parser.add_argument("--daam", type=Path, metavar="PYTHON", help="measure daam with this Python (bench maps --help)")
    parser.add_argument("--pages", type=Path, default=PAGES, metavar="FOLDER")
    args = parser.parse_args(argv)
    for name in args.only or PARTS:
        if name == WITH_DAAM and not args.daam:
            print(f"\n=== {name} is left out: it needs --daam PYTHON", flush=True)
            continue
        run_part(name, args)
    print(f"\nThe pages: {args.pages}")


if __name__ == "__main__":
    main()
