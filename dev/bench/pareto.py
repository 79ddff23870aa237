"""Compare T-GATE with what else makes sampling faster: how near each stays to the plain image, and the time it saves.

    python dev bench pareto [--prompts N] [--repeats N] [--cfg X] [--steps N] [--only KIND ...] [--intervals] [--plot FILE]
                            [--out FILE]

On the embedded model: T-GATE's settings, ComfyUI's EasyCache and LazyCache, and simply fewer steps. Agreement with the plain
image is that of the detector's verdict (both objects right), PSNR, and MS-SSIM (Wang et al., 2003), all of the same prompts
and noise. Time is that of sampling alone, all variants taking turns in one process. A variant is on the front where no other
is both faster and nearer.
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

from bench.measure import add_run_arguments, machine, publish, ratios, start, table, take_turns
from bench.models import Target
from bench.similarity import peak_signal_to_noise, structural_similarity

PLAIN, T_GATE, EASY, LAZY, FEWER = "plain", "T-GATE", "EasyCache", "LazyCache", "fewer steps"
PUBLISHED = "drop (keep negative, as published)"
TIMED_IMAGES = 4  # a batch


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


VARIANTS = [
    Variant(PLAIN, ""),
    t_gate("defaults (0.4)"),
    *(t_gate(f"gate_at {gate:g}", gate_at=gate) for gate in (0.3, 0.6)),
    t_gate("v1", sp_interval=1),
    t_gate("positive_share 1", positive_share=1),
    *(t_gate(f"refresh_every {every}", refresh_every=every) for every in (2, 3, 5)),
    *(t_gate(f"v1, refresh_every {every}", sp_interval=1, refresh_every=every) for every in (2, 3)),
    t_gate("no attention reused", reuses=False),
    t_gate("no attention reused, refresh_every 2", reuses=False, refresh_every=2),
    t_gate("cfg kept", cfg_after_gate="keep"),
    t_gate("as published", cfg_after_gate=PUBLISHED),
    t_gate("auto, tolerance 0.1", mode="auto", tolerance=0.1),
    *(cached(kind, threshold) for kind in (EASY, LAZY) for threshold in (0.05, 0.1, 0.2)),
    *(Variant(FEWER, f"{share:.0%}", steps=share) for share in (0.88, 0.84, 0.8, 0.64, 0.52)),
]
KINDS = (T_GATE, EASY, LAZY, FEWER)

# Of self-attention, before the gate (sp_interval; 1 is v1) and after it.
INTERVALS = [
    Variant(PLAIN, ""),
    t_gate("defaults (sp_interval 5, fi_interval 1)"),
    *(t_gate(f"sp_interval {every}", sp_interval=every) for every in (1, 2)),
    *(t_gate(f"fi_interval {every}", fi_interval=every) for every in (2, 5)),
]


@dataclass
class Found:
    """What a variant's images are beside the plain ones, and its times beside plain sampling's."""

    variant: Variant
    right: list[bool]
    same: float
    psnr: float
    ms_ssim: float
    speed: tuple[float, float, float] = (1.0, 1.0, 1.0)


def measure_images(variants: Sequence[Variant], count: int, **sampling: Any) -> list[Found]:
    model, clip, vae = evaluate.load()
    prompts = evaluate.prompts(count)
    steps = sampling.pop("steps")
    found: list[Found] = []
    plain, verdicts = torch.empty(0), [False]
    for variant in variants:
        some = {**sampling, "steps": round(variant.steps * steps)}
        with variant.sampling():
            images = evaluate.generate(variant.apply(model), clip, vae, prompts, **some)
        right = [all(finding.right for finding in image) for image in evaluate.score(images, prompts)]
        if variant.kind == PLAIN:
            plain, verdicts = images, right
        same = sum(a == b for a, b in zip(right, verdicts, strict=True)) / count
        psnr, similar = peak_signal_to_noise(images, plain), structural_similarity(images, plain)
        found.append(Found(variant, right, same, float(psnr.median()), float(similar.median())))
        print(f"  {variant.name}: {found[-1].psnr:.1f} dB, MS-SSIM {found[-1].ms_ssim:.3f}", flush=True)
    return found


def measure_time(found: Sequence[Found], repeats: int, *, steps: int, cfg: float) -> None:
    """Fill in the speeds."""
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

    timings = take_turns({one.variant.name: sampling(one.variant) for one in found}, repeats)
    for one in found:
        one.speed = ratios(timings[PLAIN], timings[one.variant.name])


def front(found: Sequence[Found]) -> set[str]:
    """Return the names of those that no other beats in both speed and nearness."""

    def beaten(one: Found) -> bool:
        return any(
            other.speed[0] >= one.speed[0] and other.psnr >= one.psnr and (other.speed[0], other.psnr) != (one.speed[0], one.psnr)
            for other in found
        )

    return {one.variant.name for one in found if not beaten(one)}


def report(found: Sequence[Found], prompts: int, repeats: int, *, steps: int, cfg: float) -> str:
    best = front(found)
    rows = []
    for one in found:
        shares = evaluate.share(one.right)
        rows.append((
            one.variant.name, "{:.2f} ({:.2f} to {:.2f})".format(*one.speed),
            "" if one.variant.kind == PLAIN else f"{one.psnr:.1f}", f"{one.ms_ssim:.3f}", f"{one.same:.3f}",
            f"{shares['share']:.3f} ({shares['low']:.3f} to {shares['high']:.3f})", "yes" if one.variant.name in best else "",
        ))  # fmt: skip
    header = ("variant", f"times as fast (median of {repeats})", "PSNR to plain, dB", "MS-SSIM to plain", "same verdict",
              "both objects right (95 % interval)", "on the front")  # fmt: skip
    settings = (
        f"{prompts} prompts of two objects, {steps} steps, cfg {cfg:g}, medians over images; times of a batch of "
        f"{TIMED_IMAGES}, in turns."
    )
    return f"{settings}\n\n{table(header, rows)}"


def plot(found: Sequence[Found], path: Path) -> None:
    """Plot nearness against speed, with a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind, mark in zip(KINDS, "osDx", strict=True):
        own = sorted((one for one in found if one.variant.kind == kind), key=lambda one: one.speed[0])
        axes.scatter([one.speed[0] for one in own], [one.psnr for one in own], marker=mark, label=kind)
        for one in own:
            axes.annotate(one.variant.settings, (one.speed[0], one.psnr), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel="times as fast as plain sampling", ylabel="median PSNR to the plain image, dB")
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
    parser.add_argument("--plot", type=Path, help="draw nearness against speed here (.png or .svg)")
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
