"""Run the developer commands; `python dev --help` lists them.

Any Python 3.10 or newer can start them. It makes the environment they need, then hands over to that environment's
Python: the same command again, with `FOVEA_INSIDE` set and `COMFYUI_PATH` naming the ComfyUI. Started this way, the folder
`dev` is on `sys.path` and the checkout is not, so the pack's `nodes` cannot be mistaken for ComfyUI's `nodes.py`.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - said plainly instead of a SyntaxError
    sys.exit("This needs Python 3.10 or newer; you are running " + sys.version.split()[0] + ".")

import demo
import environment
import suite
from environment import SetupError

INSIDE = "FOVEA_INSIDE"
# The script behind a command that needs nothing but the environment.
SCRIPTS = {
    "matrix": "compatibility/matrix.py",
    "beside": "compatibility/other_nodes.py",
    "neighbours": "compatibility/other_nodes.py",
    "soak": "compatibility/soak.py",
    "api": "compatibility/api.py",
    "gpu": "gpu/report.py",
    "thumbnails": "workflows/thumbnails.py",
    "screenshots": "browser/screenshots.py",
    "look": "browser/look.py",
}
TAKES_NO_MORE = ("demo", "env", "check", "thumbnails", "screenshots")
TRAINERS = {
    "scenes": "scenes/train.py",
    "decoder": "scenes/train_decoder.py",
    "dit": "scenes/train_dit.py",
    "emoji": "emoji/train.py",
}
_SHARED_BY_BENCHMARKS = {"__init__", "measure", "memory", "models", "peers", "similarity", "daam_worker", "tgate_diffusers"}


def build_parser() -> argparse.ArgumentParser:
    host = argparse.ArgumentParser(add_help=False)
    host.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI and its Python (or set COMFYUI_PATH)")
    host.add_argument("--python", type=Path, metavar="EXE", help="the Python that runs the ComfyUI given with --comfyui")
    parser = argparse.ArgumentParser(prog="python dev", description="Developer commands of ComfyUI-Fovea.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser
    demo.add_arguments(add("demo", parents=[host], help="run a shipped workflow on a real ComfyUI with the embedded model"))
    test = add(
        "test",
        parents=[host],
        help="run every check on the newest ComfyUI, and on the oldest what depends on it; what follows -- goes to pytest",
    )
    test.add_argument("--host", metavar="VERSION", help="run every check on this pinned ComfyUI, or on 'all' of them")
    add("eval", parents=[host], add_help=False, help="measure the embedded model, or a technique on it: eval [NAME]; eval --help")
    names = ", ".join(name for name in benchmarks() if name != "page")
    add("bench", parents=[host], add_help=False, help=f"measure speed and memory, all on one page, or one: {names}; NAME --help")
    add("train", parents=[host], add_help=False, help=f"train a demo model or a part of one: {', '.join(TRAINERS)}; NAME --help")
    add("matrix", parents=[host], add_help=False, help="try every node on every family of models; matrix --help")
    beside = "try every node beside ComfyUI's own nodes; beside --help"
    add("beside", aliases=["neighbours"], parents=[host], add_help=False, help=beside)
    add("soak", parents=[host], add_help=False, help="run hundreds of prompts on one server: does anything grow? soak --help")
    add("api", parents=[host], add_help=False, help="does a ComfyUI have every name that the pack uses? api --help")
    add("gpu", parents=[host], add_help=False, help="is the pack right and fast on this machine's GPU? one report; gpu --help")
    add("thumbnails", parents=[host], help="put the workflows and their images together again, after one of them changed")
    add("screenshots", parents=[host], help="take the screenshots of docs/screenshots again, with Chromium")
    add("look", parents=[host], add_help=False, help="take images of every node and template in both renderings; look --help")
    add("check", parents=[host], help="run ruff and mypy only")
    add("env", parents=[host], help="only make the environment and the ComfyUIs, and say where they are")
    return parser


def benchmarks() -> list[str]:
    """List the modules of ``dev/bench`` that can be run; what they share is in the others."""
    return sorted(path.stem for path in (environment.DEV / "bench").glob("*.py") if path.stem not in _SHARED_BY_BENCHMARKS)


def prepare(arguments: argparse.Namespace) -> environment.Environment:
    """Choose somebody's own ComfyUI when one is named, else pinned ones: several for the tests, the newest for the rest."""
    comfyui = arguments.comfyui or os.environ.get("COMFYUI_PATH")
    if comfyui:
        return environment.existing(Path(comfyui), arguments.python)
    if arguments.python:
        raise SetupError("--python goes with --comfyui: without it, this makes its own Python")
    if arguments.command in ("test", "env"):
        return environment.ensure(environment.chosen_hosts(getattr(arguments, "host", None)))
    return environment.ensure(environment.HOSTS[:1])


def hand_over(made: environment.Environment, rest: list[str]) -> int:
    """Run the same command again in the environment's Python; on Windows as a child, elsewhere in place of this process."""
    command = [str(made.python), str(environment.DEV), *rest]
    env = environment.clean_env(COMFYUI_PATH=str(made.hosts[0]), **{INSIDE: "1"})
    if os.name == "nt":
        return subprocess.run(command, env=env).returncode
    sys.stdout.flush()
    os.execve(command[0], command, env)


def run_script(script: Path, rest: list[str]) -> int:
    """Run a script of `dev` as if it had been started itself."""
    sys.argv = [str(script), *rest]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def run_inside(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run the command itself, now that this Python has all it needs."""
    if arguments.command == "demo":
        return demo.main(Path(os.environ["COMFYUI_PATH"]), arguments)
    if arguments.command in ("eval", "bench", "train"):
        script, rest = chosen_script(arguments.command, rest)
        return run_script(script, rest)
    return run_script(environment.DEV / SCRIPTS[arguments.command], rest)


def chosen_script(command: str, rest: list[str]) -> tuple[Path, list[str]]:
    """Choose the script of ``eval [NAME]``, ``bench [NAME]`` or ``train NAME``; returns it and the arguments left for it."""
    if command == "eval":
        folder, whole = environment.DEV / "scenes", "the model"
        usual = folder / "evaluate.py"
        named = {path.stem.removeprefix("evaluate_"): path for path in sorted(folder.glob("evaluate_*.py"))}
        named["emoji"] = environment.DEV / "emoji" / "evaluate.py"
    elif command == "train":
        named = {name: environment.DEV / script for name, script in TRAINERS.items()}
        if not rest or rest[0] not in named:
            sys.exit(f"python dev train NAME: choose one of: {', '.join(named)}")
        return named[rest[0]], rest[1:]
    else:
        folder, whole = environment.DEV / "bench", "all of them, on one page"
        usual, named = folder / "page.py", {name: folder / f"{name}.py" for name in benchmarks()}
    if not rest or rest[0].startswith("-"):
        return usual, rest
    if rest[0] not in named:
        sys.exit(f"python dev {command}: there is no '{rest[0]}'; choose one of: {', '.join(named)} (or none: {whole})")
    return named[rest[0]], rest[1:]


def run_outside(arguments: argparse.Namespace, rest: list[str], line: list[str]) -> int:
    """Make the environment, then run the command with it."""
    made = prepare(arguments)
    if arguments.command == "env":
        print(f"Python: {made.python}", *(f"ComfyUI: {host}" for host in made.hosts), sep="\n")
        return 0
    if arguments.command == "check":
        return suite.check(made.python)
    if arguments.command == "test":
        return suite.main(made, [argument for argument in rest if argument != "--"], whole=bool(arguments.host or rest))
    return hand_over(made, line)


def main(line: list[str]) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(line)
    if rest and (arguments.command in TAKES_NO_MORE or (arguments.command == "test" and rest[0] != "--")):
        hint = "; arguments for pytest go after --" if arguments.command == "test" else ""
        parser.error(f"unknown argument {rest[0]}{hint}")
    if os.environ.pop(INSIDE, None):
        return run_inside(arguments, rest)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run_outside(arguments, rest, line)
    except SetupError as error:
        print(f"\n{error}" + (f"\n  {error.advice}" if error.advice else ""), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
