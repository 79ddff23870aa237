"""Compare T-GATE with what else makes sampling faster: how near each stays to the plain image, and the time it saves.

    python dev bench pareto [--prompts N] [--repeats N] [--cfg X] [--steps N] [--only KIND ...] [--intervals] [--plot FILE]
                            [--out FILE]

On the embedded model: T-GATE's settings, ComfyUI's EasyCache and LazyCache, both together, and simply fewer steps. Agreement
with the plain image is that of the detector's verdict (both objects right), PSNR, and MS-SSIM (Wang et al., 2003), all of the
same prompts and noise. What a variant saves is counted: the network's rows (a prompt of one image in one step) and its
multiply-accumulates. Time is that of sampling alone, all variants taking turns in one process. A variant is on the front where no
other is both nearer and computes less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from host_inprocess import host_node, load_pack, pack_nodes
from scenes import evaluate

from bench.measure import add_run_arguments, machine, multiply_accumulates, publish, ratios, start, table, take_turns
from bench.models import Target
from bench.similarity import peak_signal_to_noise, structural_similarity

PLAIN, T_GATE, EASY, LAZY, FEWER = "plain", "T-GATE", "EasyCache", "LazyCache", "fewer steps"
BOTH = "T-GATE with EasyCache"
PUBLISHED = "drop (keep negative, as published)"
TIMED_IMAGES = 1  # in a batch


@dataclass(frozen=True)
class Variant:
    """One way to sample.

    Attributes:
        settings: as they are shown.
        apply: what it does to a MODEL.
        steps: its share of them.
        reuses: False keeps T-GATE from reusing any attention, so that what is left is what it does to guidance.
    """

    kind: str
    settings: str
    apply: Callable[[Any], Any] = lambda model: model
    steps: float = 1.0
    reuses: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.settings}" if self.settings else self.kind

    def sampling(self) -> AbstractContextManager[Any]:
        """Sample as this variant while it lasts."""
        load_pack()
        from fovea_attention.attention.tgate import run

        return nullcontext() if self.reuses else mock.patch.object(run, "attention_sites", lambda network: [])


def t_gate(settings: str, *, reuses: bool = True, **inputs: Any) -> Variant:
    return Variant(T_GATE, settings, lambda model: pack_nodes()["TGateCache"].execute(model, **inputs)[0], reuses=reuses)


def cached(kind: str, threshold: float) -> Variant:
    """Apply one of ComfyUI's caches where its own defaults do."""

    def apply(model: Any) -> Any:
        settings = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
        return host_node(f"{kind}Node", "comfy_extras.nodes_easycache")(model=model, **settings)[0]

    return Variant(kind, f"threshold {threshold:g}", apply)


def skipping(max_error: float) -> dict[str, Any]:
    """Return the inputs of T-GATE Cache that skips whole steps."""
    return {"schedule": "skip steps", "max_error": max_error}


def both(settings: str, threshold: float, **inputs: Any) -> Variant:
    """Apply EasyCache, and T-GATE on top of it."""
    other, own = cached(EASY, threshold), t_gate(settings, **inputs)
    return Variant(BOTH, f"{settings}, {other.settings}", lambda model: own.apply(other.apply(model)))


VARIANTS = [
    Variant(PLAIN, ""),
    t_gate("as published (keep positive)"),
    t_gate("as published (keep negative)", cfg_after_gate=PUBLISHED),
    t_gate("as published, v1", sp_interval=1),
    t_gate("as published, cfg kept", cfg_after_gate="keep"),
    *(t_gate(f"as published, v1, refresh_every {every}", sp_interval=1, refresh_every=every) for every in (2, 3)),
    t_gate("as published, v1, no attention reused", sp_interval=1, reuses=False),
    *(t_gate(f"skip steps, max_error {error:g}", **skipping(error)) for error in (0.01, 0.02, 0.03, 0.05)),
    t_gate("skip steps, gate_at 0.25", gate_at=0.25, **skipping(0.03)),
    both("skip steps", 0.1, **skipping(0.03)),
    both("as published, v1, refresh_every 2", 0.1, sp_interval=1, refresh_every=2),
    *(cached(EASY, threshold) for threshold in (0.1, 0.2)),
    *(cached(LAZY, threshold) for threshold in (0.05, 0.1)),
    *(Variant(FEWER, f"{share:.0%}", steps=share) for share in (0.88, 0.8, 0.64)),
]
KINDS = (T_GATE, BOTH, EASY, LAZY, FEWER)

# Of self-attention, before the gate (sp_interval; 1 is v1) and after it.
INTERVALS = [
    Variant(PLAIN, ""),
    t_gate("sp_interval 5, fi_interval 1"),
    *(t_gate(f"sp_interval {every}", sp_interval=every) for every in (1, 2)),
    *(t_gate(f"fi_interval {every}", fi_interval=every) for every in (2, 5)),
]


@dataclass
class Found:
    """What a variant's images are beside the plain ones, and what it computes and takes beside plain sampling."""

    variant: Variant
    right: list[bool]
    same: float
    psnr: float
    ms_ssim: float
    speed: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rows: float = 0.0  # of the network, for an image
    macs: float = 0.0


def measure_images(variants: Sequence[Variant], count: int, **sampling: Any) -> list[Found]:
    model, clip, vae = evaluate.load()
    prompts = evaluate.prompts(count)
    steps = sampling.pop("steps")
    counted: list[int] = []
    first = model.model.diffusion_model.input_blocks[0][0]  # EasyCache acts before it
    counter = first.register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[0]))
    found: list[Found] = []
    plain, verdicts = torch.empty(0), [False]
    for variant in variants:
        some = {**sampling, "steps": round(variant.steps * steps)}
        counted.clear()
        with variant.sampling():
            images = evaluate.generate(variant.apply(model), clip, vae, prompts, **some)
        right = [all(finding.right for finding in image) for image in evaluate.score(images, prompts)]
        if variant.kind == PLAIN:
            plain, verdicts = images, right
        same = sum(a == b for a, b in zip(right, verdicts, strict=True)) / count
        psnr, similar = peak_signal_to_noise(images, plain), structural_similarity(images, plain)
        found.append(Found(variant, right, same, float(psnr.median()), float(similar.median()), rows=sum(counted) / count))
        print(
            f"  {variant.name}: {found[-1].rows:.1f} rows, {found[-1].psnr:.1f} dB, MS-SSIM {found[-1].ms_ssim:.3f}", flush=True
        )
    counter.remove()
    return found


def measure_time(found: Sequence[Found], repeats: int, *, steps: int, cfg: float) -> None:
    """Fill in the speeds, and what is computed for them."""
    model, clip, _ = evaluate.load()
    prompts = evaluate.prompts(TIMED_IMAGES)
    latent = host_node("EmptyLatentImage")(width=evaluate.SIDE, height=evaluate.SIDE, batch_size=TIMED_IMAGES)[0]
    conds = {"positive": evaluate.encode(clip, [prompt.text for prompt in prompts]), "negative": evaluate.encode(clip, [""])}

    def sampling(variant: Variant) -> Callable[[], object]:
        patched = variant.apply(model)
        settings = {"seed": 0, "steps": round(variant.steps * steps), "cfg": cfg, "sampler_name": "euler", "scheduler": "normal"}

        @torch.inference_mode()
        def run() -> object:
            with variant.sampling():
                return host_node("KSampler")(model=patched, **conds, latent_image=latent, denoise=1.0, **settings)

        return run

    for one in found:
        one.macs = multiply_accumulates(sampling(one.variant))
    timings = take_turns({one.variant.name: sampling(one.variant) for one in found}, repeats)
    for one in found:
        one.speed = ratios(timings[PLAIN], timings[one.variant.name])


def gain(one: Found, found: Sequence[Found]) -> float:
    """Return how many times less a variant computes than plain sampling; where that was not counted, its speed."""
    return found[0].macs / one.macs if one.macs else one.speed[0]


def front(found: Sequence[Found]) -> set[str]:
    """Return the names of those that no other beats in both gain and nearness."""
    at = {one.variant.name: (gain(one, found), one.psnr) for one in found}

    def beaten(one: Found) -> bool:
        own = at[one.variant.name]
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in at.values())

    return {one.variant.name for one in found if not beaten(one)}


def report(found: Sequence[Found], prompts: int, repeats: int, *, steps: int, cfg: float) -> str:
    best = front(found)
    rows = []
    for one in found:
        shares = evaluate.share(one.right)
        rows.append((
            one.variant.name, f"{found[0].rows / one.rows:.2f}", f"{gain(one, found):.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*one.speed),
            "" if one.variant.kind == PLAIN else f"{one.psnr:.1f}", f"{one.ms_ssim:.3f}", f"{one.same:.3f}",
            f"{shares['share']:.3f} ({shares['low']:.3f} to {shares['high']:.3f})", "yes" if one.variant.name in best else "",
        ))  # fmt: skip
    header = ("variant", "fewer rows, times", "fewer MACs, times", f"times as fast (median of {repeats})",
              "PSNR to plain, dB", "MS-SSIM to plain", "same verdict",
              "both objects right (95 % interval)", "on the front")  # fmt: skip
    settings = (
        f"{prompts} prompts of two objects, {steps} steps, cfg {cfg:g}, medians over images; times of a batch of "
        f"{TIMED_IMAGES}, in turns."
    )
    return f"{settings}\n\n{table(header, rows)}"


def plot(found: Sequence[Found], path: Path) -> None:
    """Plot nearness against what is saved, with a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind, mark in zip(KINDS, "o^sDx", strict=True):
        own = sorted((one for one in found if one.variant.kind == kind), key=lambda one: gain(one, found))
        axes.scatter([gain(one, found) for one in own], [one.psnr for one in own], marker=mark, label=kind)
        for one in own:
            axes.annotate(
                one.variant.settings, (gain(one, found), one.psnr), fontsize=6, xytext=(4, 3), textcoords="offset points"
            )
    axes.set(xlabel="times fewer multiply-accumulates than plain sampling", ylabel="median PSNR to the plain image, dB")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench pareto", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of all variants")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these kinds, beside the plain run")
    parser.add_argument("--intervals", action="store_true", help="T-GATE's intervals instead")
    parser.add_argument("--plot", type=Path, help="draw nearness against what is saved here (.png or .svg)")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    chosen = INTERVALS if args.intervals else VARIANTS
    variants = [variant for variant in chosen if variant.kind in (PLAIN, *(args.only or KINDS))]
    sampling = {"steps": args.steps, "cfg": args.cfg}
    found = measure_images(variants, args.prompts, **sampling)
    measure_time(found, args.repeats, **sampling)
    if args.plot:
        plot(found, args.plot)
    text = report(found, args.prompts, args.repeats, **sampling)
    title = "T-GATE's intervals" if args.intervals else "T-GATE and what else makes sampling faster"
    publish(f"## {title}\n\nMeasured on: {machine(Target.here())}.\n\n{text}", args.out)


if __name__ == "__main__":
    main()
