"""Try every node of the pack in turn on one model with real sampling: what each does is measured, not believed.

Attention modules that were not called, maps of the right mass, a latent that moved, a loss that fell, a model that was left as
it was.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from host_inprocess import pack_nodes
from torch import Tensor

from compatibility.tables import PLACES, SAMPLER, WORDS, WORKS, Cell, Outcome, fault

STEPS, GATE_STEPS, CFG = 2, 3, 3.0
_OVERSHOOT = 0.1  # of bicubic interpolation, by which layers are brought to one grid
_NEAR = 1e-6  # relative difference of two latents that are the same but for rounding


class Log(logging.Handler):
    """The pack's log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass
class Counts:
    """What a model really did: prompts it was asked for (0 positive, 1 negative), and attention modules that were called."""

    prompts: list[int] = field(default_factory=list)
    attention: dict[str, int] = field(default_factory=lambda: {"self": 0, "cross": 0})


class Trial:
    """One family with one model, on which the nodes are tried in turn."""

    steady = True  # every step asks the model for each prompt equally often
    noise_mask: Tensor | None = None

    def __init__(self, family: Any, model: Any, log: Log) -> None:
        from fovea_attention.attention import host
        from fovea_attention.attention import networks as sites

        self.family, self.log = family, log
        self.network = host.diffusion_model(model.model)
        self.nodes = pack_nodes()
        self.counts = Counts()
        self.model = model.clone()
        self.model.add_wrapper_with_key("apply_model", "matrix", self._count_prompts)
        for site in sites.attention_sites(self.network):
            site.projection.register_forward_hook(lambda *_, kind=site.kind: self._count_attention(kind))
        self.positive, self.negative, self.null = self.prompts()
        if family.has_prompt:
            for tensor, options in (*self.positive, *self.negative):
                options["fovea"] = words_of_a_prompt(tensor.shape[1])
        self.untouched = self.state()
        self.plain = self.image_latent(self.sampled())
        self.calls = {kind: called // STEPS for kind, called in self.counts.attention.items()}  # in a step
        self.asked = {prompt: called // STEPS for prompt, called in Counter(self.counts.prompts).items()}

    def prompts(self) -> tuple[Any, Any, Any]:
        """Return the positive, negative and empty prompt."""
        return self.family.conds(1), self.family.conds(2), self.family.conds(7)

    # Counting

    def _count_prompts(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.counts.prompts += args[5]["cond_or_uncond"]
        return executor(*args, **kwargs)

    def _count_attention(self, kind: str) -> None:
        self.counts.attention[kind] += 1

    def state(self) -> list[Any]:
        """Return what a node could leave behind: forwards, hooks and options."""
        modules = [(name, module.__dict__.get("forward"), len(module._forward_hooks), len(module._forward_pre_hooks))
                   for name, module in self.network.named_modules()]  # fmt: skip
        options = self.model.model_options["transformer_options"]
        return [modules, sorted(self.model.model_options), sorted(options), len(self.model.get_all_callbacks("on_cleanup"))]

    # Sampling

    def guider(self, model: Any) -> Any:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(CFG)
        return guider

    def sigmas(self, steps: int) -> Tensor:
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", steps)

    def latent(self) -> Any:
        empty = self.family.latent()
        if not self.family.start:
            return empty
        return self.family.start * torch.randn(empty.shape, generator=torch.Generator().manual_seed(4))

    def sampled(self, guider: Any = None, steps: int = STEPS, sampler: Any = None) -> Any:
        """Sample as SamplerCustomAdvanced does; returns the latent."""
        import comfy.sample
        import comfy.samplers

        latent = self.latent()
        sampler = sampler or comfy.samplers.sampler_object("euler")
        self.counts = Counts()
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(latent, 3)
            guider = guider or self.guider(self.model)
            return guider.sample(
                noise, latent, sampler, self.sigmas(steps), denoise_mask=self.noise_mask, disable_pbar=True, seed=3
            )

    @staticmethod
    def image_latent(latent: Any) -> Tensor:
        """Return the latent; of video with sound, the video's."""
        return latent.unbind()[0] if getattr(latent, "is_nested", False) else latent

    def moved(self, latent: Any) -> bool:
        """Return whether a latent differs from the one without the node."""
        return bool((self.image_latent(latent) - self.plain).norm() > _NEAR * self.plain.norm())

    # The nodes

    def judged(self, judge: Callable[[], Cell]) -> Cell:
        """Judge a node; an error counts as a refusal where it is the pack's own and the model has not run."""
        self.log.lines.clear()
        self.counts = Counts()
        try:
            cell = judge()
        except ValueError as error:
            late = "refused, but only after the model had run: " if self.counts.prompts else ""
            cell = fault(late + str(error)) if late else Cell(Outcome.REFUSED, message=str(error))
        except Exception as error:
            cell = fault(f"{type(error).__name__}: {error}")
        if self.state() != self.untouched:
            cell = fault(f"it left something on the model ({cell.outcome.value} {cell.detail})")
        return cell

    def cells(self) -> dict[str, Cell]:
        maps: list[Any] = []
        cells = {
            "T-GATE Cache": self.judged(self.t_gate),
            WORDS: self.judged(lambda: self.words(maps)),
            PLACES: self.judged(lambda: self.places(maps)),
            "Attend-and-Excite": self.judged(self.excite),
            "Attention Distillation": self.judged(self.distill),
            SAMPLER: self.judged(self.ddpm),
        }
        if not torch.equal(self.image_latent(self.sampled()), self.plain):
            return {
                name: fault(f"after all nodes the plain image is another one ({cell.detail})") for name, cell in cells.items()
            }
        return cells

    def t_gate(self) -> Cell:
        """Sample two steps before the gate and one behind it, in which self-attention may be reused too."""
        model = self.nodes["TGateCache"].execute(self.model, gate_at=2 / 3, sp_interval=1, fi_interval=GATE_STEPS)[0]
        latent = self.image_latent(self.sampled(self.guider(model), GATE_STEPS))
        saved = {kind: self.calls[kind] * GATE_STEPS - called for kind, called in self.counts.attention.items()}
        called = Counter(self.counts.prompts)
        dropped = self.asked.get(1, 0) * GATE_STEPS - called[1]
        if latent.isfinite().all() and "did not fit" in self.log.lines[-1]:  # it noticed, and computed everything again
            return Cell(Outcome.REFUSED, message=self.log.lines[-1])
        if not latent.isfinite().all() or (self.steady and called[0] != self.asked[0] * GATE_STEPS):
            return fault("the positive prompt is not computed as often as without it, or the latent is not finite")
        said = self.log.lines[-1]
        null = "null class" if hasattr(self.family, "prediction") else "negative prompt"
        saves = {"cross-attention reused": saved["cross"], "self-attention reused": saved["self"], f"{null} skipped": dropped}
        return self.t_gate_cell([text for text, saving in saves.items() if saving], said)

    def t_gate_cell(self, done: list[str], said: str) -> Cell:
        """Judge what it means that T-GATE saved ``done`` and logged ``said``."""
        if done and "has no separate cross-attention" in said:
            return Cell(Outcome.PART, ", ".join(done))
        if "cross-attention reused" in done and "negative prompt skipped" in done:
            return WORKS
        if done:
            return fault(f"not said: {done}")
        return Cell(Outcome.REFUSED, message=said) if ";" in said else fault("a silent no-op")

    def captured(self, maps: list[Any]) -> Any:
        """Capture the maps of one run for both views, sampled once."""
        if not maps:
            model, found = self.nodes["AttnMapCapture"].execute(self.model, self_attention=True).args
            latent = self.sampled(self.guider(model))
            if self.moved(latent) or not torch.equal(self.image_latent(latent), self.plain):
                raise RuntimeError("the image is another one with Capture Attention Maps")
            maps.append(self._stored(found))
            self.counts = Counts()  # the preview is a node of its own: what it refuses, it refuses before it draws
        return maps[0]

    def _stored(self, maps: Any) -> Any:
        """Return the same maps from a file, through the nodes that keep them."""
        saved = self.nodes["FoveaSaveAttnMaps"].execute(maps, self._image(), "matrix")
        file = saved.ui.as_dict()["text"][0]
        return self.nodes["FoveaLoadAttnMaps"].execute(f"{file} [output]")[0]

    def _image(self) -> Tensor:
        """Return an image in the decoder's proportions."""
        height, width = (round(side * 64 / max(self.family.size)) for side in self.family.size)
        return torch.full((max(self.family.frames, 1), height, width, 3), 0.5)

    def preview(self, maps: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        shown, masks = self.nodes["AttnMapPreview"].execute(maps, self._image(), **settings).args[:2]
        return shown, masks

    def words(self, maps: list[Any]) -> Cell:
        found = self.captured(maps)
        notes = [note for note in found.notes if "token" in note or "layers" in note or "seen" in note]
        shown, masks = self.preview(found)
        positive = found.of()
        steps = len(positive.steps)
        for name, layer in positive.layers.items():
            mass = layer.maps.float().sum(2) / steps
            if not (mass.isfinite().all() and mass.min() > 0 and mass.max() < 1 + _OVERSHOOT):
                return fault(
                    f"the attention of {name} to the words adds up to {float(mass.min()):.3g} to {float(mass.max()):.3g}"
                )
        if not (shown.isfinite().all() and 0 <= masks.min() and masks.max() <= 1 and (masks.flatten(1).std(1) > 0).all()):
            return fault("masks are flat or out of range")
        return Cell(Outcome.PART, message="; ".join(notes)) if notes else WORKS

    def places(self, maps: list[Any]) -> Cell:
        shown, masks = self.preview(self.captured(maps), view="self-attention")
        if not (shown.isfinite().all() and 0 <= masks.min() and masks.max() <= 1 and masks.std() > 0):
            return fault("the view is flat or out of range")
        return WORKS

    def excite(self) -> Cell:
        guider = self.nodes["AttendExciteGuider"].execute(
            self.model,
            self.positive,
            self.negative,
            CFG,
            guide_until=1 / STEPS,
            scale_factor=1000,
            thresholds="",
            attention_grid=4,
        )[0]
        with gradients() as norms:
            latent = self.sampled(guider)
        if not (norms and min(norms) > 0 and self.image_latent(latent).isfinite().all() and self.moved(latent)):
            return fault(f"gradients {norms}, latent {'moved' if self.moved(latent) else 'the same'}")
        return WORKS if any("1 guided steps" in line for line in self.log.lines) else fault("a silent no-op")

    def distill(self) -> Cell:
        import comfy.samplers

        generator = torch.Generator().manual_seed(9)
        reference = torch.randn(self.image_latent(self.family.latent()).shape, generator=generator)
        mask = {} if self.noise_mask is None else {"noise_mask": self.noise_mask}
        with torch.inference_mode():
            output, denoised, report = self.nodes["AttentionDistillSampler"].execute(
                Noise(), self.guider(self.model), comfy.samplers.sampler_object("euler"), self.sigmas(STEPS),
                {"samples": self.latent(), **mask}, {"samples": reference}, self.null, iterations=2, end_at=1 / STEPS,
            ).args  # fmt: skip
        steps = json.loads(report)["steps"]
        if not (output["samples"].isfinite().all() and self.moved(output["samples"]) and len(steps) == 1):
            return fault("the latent is not finite, or the same as without the node")
        if not all(step["loss"][0] > step["loss"][-1] > 0 for step in steps):
            return fault(f"the loss does not fall: {[step['loss'] for step in steps]}")
        return WORKS

    def ddpm(self) -> Cell:
        latent = self.sampled(sampler=self.nodes["DiTSampler"].execute()[0])
        return WORKS if self.image_latent(latent).isfinite().all() and self.moved(latent) else fault("not finite")


class Noise:
    """The noise of ComfyUI's RandomNoise."""

    seed = 3

    def generate_noise(self, latent: dict[str, Any]) -> Any:
        import comfy.sample

        return comfy.sample.prepare_noise(latent["samples"], self.seed)


@contextmanager
def gradients() -> Iterator[list[float]]:
    """Collect the norms of every pass's gradients while it lasts."""
    from fovea_attention.attention.gradient import ModelPass

    norms: list[float] = []
    measure = ModelPass.gradient

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = measure(self, *args, **kwargs)
        if found is not None:  # None: this prompt is not active at this step
            norms.append(float(found.latent.norm()))
        return found

    ModelPass.gradient = watched  # type: ignore[method-assign]
    try:
        yield norms
    finally:
        ModelPass.gradient = measure  # type: ignore[method-assign]


def words_of_a_prompt(rows: int) -> dict[str, Any]:
    """Return what 'Prompt with Subjects' leaves in the encoding of "[cat] and [dog]", for text features of any encoder."""
    words = [(6, "cat", 0), (7, "and", 4), (8, "dog", 8)]  # places that no family of the tests masks
    tokens = [[position, word, start, start + len(word), "text", "l"] for position, word, start in words]
    return {
        "version": 1, "text": "cat and dog", "subjects": [[0, 3], [8, 11]], "tokens": tokens, "length": 9,
        "conditioning_length": rows,
    }  # fmt: skip


@contextmanager
def quiet() -> Iterator[Log]:
    """Keep the pack's log lines in a list, show no progress bars, and put files into a folder that goes away."""
    import comfy.utils
    import folder_paths

    log, logger = Log(), logging.getLogger("fovea")
    before = logger.level, logger.propagate, comfy.utils.PROGRESS_BAR_ENABLED
    folders = folder_paths.get_temp_directory(), folder_paths.get_output_directory()
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    comfy.utils.set_progress_bar_enabled(False)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder_paths.set_temp_directory(folder)
            folder_paths.set_output_directory(folder)
            yield log
    finally:
        logger.removeHandler(log)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        comfy.utils.set_progress_bar_enabled(before[2])
        folder_paths.set_temp_directory(folders[0])
        folder_paths.set_output_directory(folders[1])
