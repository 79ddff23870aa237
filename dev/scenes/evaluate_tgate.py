"""Measure what T-GATE's default costs: plain and faster runs of the same prompts and noise, judged and compared.

    python dev eval tgate [--prompts N] [--steps N] [--cfg X] [--seed N] [--batch N] [--only NAME ...] [--json FILE]

Images come from ComfyUI's own nodes and are judged by ``detect``: are both objects of the prompt there, in the right colour and
shape? What is saved is counted in rows, a row being one prompt of one step that the network computes, so it does not depend on
the machine. With ``--json`` every batch is kept, and a run that was cut off goes on where it was. `python dev bench pareto`
compares more settings, of fewer prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.measure import table
from bench.similarity import peak_signal_to_noise
from host_inprocess import host_node, pack_nodes, start_host
from torch import Tensor

from scenes import evaluate
from scenes.evaluate import Prompt

PLAIN = "plain"
Apply = Callable[[Any], Any]


def t_gate(**inputs: Any) -> Apply:
    """Return what applies T-GATE Cache; inputs that are not named have the values of a new node in the browser."""

    def apply(model: Any) -> Any:
        node = pack_nodes()["TGateCache"]
        new = {one.id: one.default for one in node.GET_SCHEMA().inputs if one.id != "model"}
        return node.execute(model, **{**new, **inputs})[0]

    return apply


def easy_cache(model: Any) -> Any:
    """Apply ComfyUI's EasyCache between the shares of the steps where its own defaults do."""
    settings = {"reuse_threshold": 0.1, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    return host_node("EasyCacheNode", "comfy_extras.nodes_easycache")(model=model, **settings)[0]


RUNS: dict[str, Apply] = {
    PLAIN: lambda model: model,
    "default": t_gate(),
    "as published": t_gate(schedule="as published"),
    "EasyCache 0.1": easy_cache,
}


def generate(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], numbers: Sequence[int], *, steps: int, cfg: float, seed: int
) -> tuple[Tensor, float]:
    """Generate images [N, 256, 256, 3] of some prompts and count the rows an image; prompt i has noise i of ``seed``."""
    counted: list[int] = []
    first = model.model.diffusion_model.input_blocks[0][0]  # EasyCache acts before it
    counter = first.register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[0]))
    try:
        images = evaluate.generate(
            model, clip, vae, [chosen[number] for number in numbers], numbers=numbers, batch=len(numbers),
            steps=steps, cfg=cfg, seed=seed,
        )  # fmt: skip
    finally:
        counter.remove()
    return images, sum(counted) / len(numbers)


def compare(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], runs: Sequence[str], *, batch: int,
    kept: dict[str, dict[str, Any]], keep: Callable[[], None] | None = None, **sampling: Any,
) -> None:  # fmt: skip
    """Measure some of ``RUNS`` beside the plain one, batch by batch.

    Args:
        kept: run -> number of a prompt -> whether both objects are right, the rows, and the PSNR to the plain image in dB
            (none for the plain run); what is there is left out, and the rest is completed.
        keep: called after each batch.
    """
    every = [PLAIN, *(name for name in runs if name != PLAIN)]
    found = {name: kept.setdefault(name, {}) for name in every}
    left = [number for number in range(len(chosen)) if any(str(number) not in found[name] for name in every)]
    for start in range(0, len(left), batch):
        numbers = left[start : start + batch]
        plain = torch.empty(0)
        for name in every:
            images, rows = generate(RUNS[name](model), clip, vae, chosen, numbers, **sampling)
            plain = images if name == PLAIN else plain
            near = [None] * len(numbers) if name == PLAIN else peak_signal_to_noise(images, plain).tolist()
            judged = evaluate.score(images, [chosen[number] for number in numbers])
            for number, objects, decibels in zip(numbers, judged, near, strict=True):
                found[name][str(number)] = {"right": all(one.right for one in objects), "rows": rows, "psnr": decibels}
        if keep is not None:
            keep()
        print(f"  {min(start + batch, len(left))} of {len(left)} prompts", flush=True)


def report(found: dict[str, dict[str, Any]], runs: Sequence[str], count: int) -> str:
    """Return the table of the first ``count`` prompts. The mean of dB is that of the geometric mean of squared distances."""
    plain = [found[PLAIN][str(number)] for number in range(count)]
    lines = []
    for name in (PLAIN, *(name for name in runs if name != PLAIN)):
        own = [found[name][str(number)] for number in range(count)]
        right = evaluate.share([one["right"] for one in own])
        differ = sum(one["right"] != other["right"] for one, other in zip(own, plain, strict=True))
        near = [one["psnr"] for one in own if one["psnr"] is not None]
        lines.append((
            name, f"{right['hits']} of {count}", f"{right['share']:.3f} ({right['low']:.3f} to {right['high']:.3f})",
            "" if name == PLAIN else differ, f"{statistics.mean(near):.1f}" if near else "",
            f"{statistics.median(near):.1f}" if near else "",
            f"{sum(one['rows'] for one in plain) / sum(one['rows'] for one in own):.3f}",
        ))  # fmt: skip
    header = ("run", "both objects right", "share (95 % interval)", "verdicts that differ", "PSNR to plain, dB: mean", "median",
              "fewer rows, times")  # fmt: skip
    return table(header, lines)


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval tgate``."""
    parser = argparse.ArgumentParser(prog="python dev eval tgate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1, help="images at once; T-GATE decides for a whole batch")
    parser.add_argument(
        "--only", nargs="+", choices=list(RUNS), default=[PLAIN, "default"], help="these runs, beside the plain one"
    )
    parser.add_argument("--json", type=Path, help="keep all findings here, and go on from what is there")
    args = parser.parse_args(argv)
    if "comfy" not in sys.modules:
        start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    model, clip, vae = evaluate.load(args.checkpoint.resolve())
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed}
    found = evaluate.resumed(args.json, {**sampling, "batch": args.batch})
    keep = (lambda: evaluate.write_json(args.json, found)) if args.json else None
    chosen = evaluate.prompts(args.prompts)
    compare(model, clip, vae, chosen, args.only, batch=args.batch, kept=found["runs"], keep=keep, **sampling)
    print(f"\n{args.prompts} prompts of two objects, {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}\n")
    print(report(found["runs"], args.only, args.prompts))


if __name__ == "__main__":
    main()
