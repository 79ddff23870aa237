"""Train the emoji model in pieces of a few minutes, each going on from one state file.

    python dev train emoji vae=5 judge=4 model=3 [--state FILE] [--set PART.NAME=VALUE ...]
    cd dev && python -m emoji.train ...          the same where there is torch but no ComfyUI, as on a machine with a GPU

The numbers are minutes of this piece; a part ends sooner when its samples are done. The VAE comes first: the others need it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

STARTED = time.monotonic()

import torch  # noqa: E402

from emoji import piece, state, train_judge, train_model, train_vae  # noqa: E402
from emoji.compose import Composer  # noqa: E402
from emoji.optimise import Plan  # noqa: E402
from emoji.piece import Part, Setting  # noqa: E402
from emoji.state import PartState  # noqa: E402

PLANS = {"vae": train_vae.PLAN, "judge": train_judge.PLAN, "model": train_model.PLAN}


def changed(plans: dict[str, Plan], changes: list[str]) -> dict[str, Plan]:
    """Return the plans with changes such as ``model.batch=256``.

    Raises:
        SystemExit: a change names no part or nothing of a plan.
    """
    plans = dict(plans)
    for change in changes:
        place, _, value = change.partition("=")
        part, _, name = place.partition(".")
        kinds = {item.name: type(getattr(plans[part], item.name)) for item in dataclasses.fields(Plan)} if part in plans else {}
        if name not in kinds or kinds[name] is bool:
            raise SystemExit(f"--set {change}: write PART.NAME=VALUE, for example model.batch=256")
        plans[part] = dataclasses.replace(plans[part], **{name: kinds[name](float(value))})
    return plans


def make_part(name: str, setting: Setting, plan: Plan, parts: dict[str, PartState]) -> Part:
    """Build a part.

    Raises:
        SystemExit: it needs a VAE that is trained to the end, and there is none yet.
    """
    torch.manual_seed(setting.seed)  # of the first weights
    if name == "vae":
        return train_vae.VaePart(setting, plan)
    if "vae" not in parts or not parts["vae"].finished:
        done = parts["vae"].samples if "vae" in parts else 0
        raise SystemExit(f"{name}: the VAE comes first, and it has seen {done} of its samples; train it with vae=MINUTES")
    vae = train_vae.trained_vae(parts["vae"], setting.device)
    return (train_judge.JudgePart if name == "judge" else train_model.ModelPart)(setting, vae, plan)


def train(
    wanted: dict[str, float], path: Path, setting: Setting, plans: dict[str, Plan], started: float | None = None
) -> dict[str, PartState]:
    """Train the parts for so many minutes each, the first from ``started`` on, and save the state as it grows; returns it."""
    parts = state.load(path)
    clock = time.monotonic() if started is None else started
    for name, minutes in wanted.items():
        if name in parts and parts[name].finished and parts[name].samples >= plans[name].samples:
            print(f"{name}: trained to the end already", flush=True)
            continue
        part = make_part(name, setting, plans[name], parts)

        def save(made: PartState, name: str = name) -> None:
            parts[name] = made
            size = state.save(path, parts, name)
            if size > state.MOST_BYTES:
                print(f"{path.name} has {size:,} bytes, more than {state.MOST_BYTES:,}", flush=True)

        save(piece.run(part, parts.get(name), clock + minutes * 60, save))
        clock = time.monotonic()
        about = parts[name].about()
        print(f"{name}: {json.dumps(about)}", flush=True)
    return state.load(path)


def minutes(text: str) -> tuple[str, float]:
    """Read ``PART=MINUTES``."""
    part, _, number = text.partition("=")
    if part not in PLANS:
        raise argparse.ArgumentTypeError(f"there is no part '{part}'; the parts are {', '.join(PLANS)}")
    return part, float(number)


def main(argv: list[str] | None = None) -> None:
    """Run the trainer."""
    parser = argparse.ArgumentParser(prog="python dev train emoji", description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=minutes, nargs="+", metavar="PART=MINUTES", help=f"parts: {', '.join(PLANS)}")
    parser.add_argument("--state", type=Path, default=state.PATH, help="the file to go on from and to save to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="PART.NAME=VALUE", help="change a number of a part's plan")
    parser.add_argument("--pool", type=int, default=Setting.pool, help="latents that the model is trained from")
    parser.add_argument("--reuse", type=int, default=Setting.reuse, help="how often a scene is trained on, on average")
    parser.add_argument("--crop", type=int, default=0, help="train the VAE on the middle of the images only, of this side")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    compiled = device.type == "cuda" and not args.eager
    setting = Setting(device, Composer(device, args.seed), args.seed, compiled, args.crop, args.pool, args.reuse)
    print(f"composer ready after {time.monotonic() - STARTED:.0f} s", flush=True)
    train(dict(args.parts), args.state, setting, changed(PLANS, args.set), STARTED)


if __name__ == "__main__":
    main()
