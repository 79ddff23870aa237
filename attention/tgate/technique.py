"""T-GATE: cross-attention converges early, so after a gate step its cached output is reused.

Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models" (arXiv:2404.02747), and the
authors' second version, which also reuses self-attention between intervals. The exact schedule is ``plan``.

A run of S steps has a gate step G. Before it (semantics planning) everything is computed, except that self-attention may
be reused within intervals. Step G-1 stores the output of every attention module, after its last projection and before the
residual sum. From G on (fidelity improving) cross-attention is the stored output: the module is not called at all. The
negative prompt is no longer computed either, so the stored value is the mean of the positive and the negative one.

Two things are not the paper's. Where the positive prompt is kept, self-attention within intervals is stored as the mean of
both prompts as well: half of the memory, and as near to the plain image. And the gate can be opened again every so many
steps (``refresh_every``): such a step computes and stores everything anew, and until the next one the difference between
the two prompts' noise predictions goes on as it went through the last two of them (``Guidance``).

Nothing is kept on the model: a run's state (``TGateRun``) is made when sampling starts and emptied when it ends, and
modules get another ``forward`` only for the length of one model call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from uuid import UUID

import torch

from .. import host
from ..host import ModelOptions, StepClock, TransformerOptions, follow_sampler, log, read_sigma
from ..networks.blocks import AttentionSite, Kind
from .convergence import SETTLED
from .plan import Action, StepPlan, plan
from .run import NEGATIVE, POSITIVE, MainCall, TGateRun
from .settings import CacheDevice, CfgAfterGate, Mode, TGateSettings

KEY = host.GATE


class TGate:
    """Wrappers of one ``TGateCache`` node. Holds settings only: a run's state lives in that run's options."""

    def __init__(self, settings: TGateSettings) -> None:
        self.settings = settings

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        guider = executor.class_obj
        run = TGateRun(self.settings, StepClock.from_sigmas(sigmas), host.combines_as_cfg(guider))
        try:
            with host.run_scope(guider, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            log.info(run.summary())
            run.release()

    sampler_sample = staticmethod(follow_sampler)

    def predict_noise(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions, seed: Any = None
    ) -> Any:
        run = host.run_state(model_options, KEY)
        if run is not None:
            sigma, model_options = read_sigma(timestep, model_options)
            run.begin_evaluation(sigma, x.shape)
        return executor(x, timestep, model_options, seed)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions
    ) -> Any:
        run: TGateRun | None = host.run_state(model_options, KEY)
        private = host.run_state(model_options, host.INTERNAL_PASS)
        if run is None or run.stopped or private or not run.awaits_main_call:
            return executor(model, conds, x, timestep, model_options)
        run.awaits_main_call = False
        if x.shape != run.latent_shape:
            run.stop("context windows cut each step into several model calls")
            return executor(model, conds, x, timestep, model_options)

        def evaluate(wanted: list[Any]) -> list[torch.Tensor]:
            return executor(model, wanted, x, timestep, model_options)

        return self._main_call(run, model, conds, model_options, evaluate)

    def _main_call(
        self,
        run: TGateRun,
        model: Any,
        conds: list[Any],
        options: ModelOptions,
        evaluate: Callable[[list[Any]], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        sites = run.sites(model)
        may_drop = self._may_drop(run, conds, options)
        text_is_reused = any(site.kind == "cross" for site in sites)
        pair = _only_pair(conds) if may_drop and text_is_reused else None
        if not text_is_reused:
            run.note(_why_no_text_cache(model, sites, run.settings))
        keeps_guidance = may_drop and run.settings.keeps_guidance
        refresh = run.step >= run.gate and run.settings.refreshes(run.step - run.gate)
        # A sampler may jump over the step that stores (dpm_fast): then the first evaluation beyond it stores.
        opened = run.step >= run.gate and not refresh and (run.guidance is not None or not keeps_guidance)
        if sites:
            opened = opened and run.stored_means is (pair is not None)
            step = run.step if opened else min(run.step, run.gate - 1)
            step_plan = plan(step, run.gate, run.settings)
        else:
            step_plan = StepPlan(Action.COMPUTE, Action.COMPUTE)
        storing = [site for site in sites if step_plan.action(site.kind) is Action.STORE]
        if storing:
            run.cache.begin_store(storing)
        if step_plan.self_attention is Action.COMPUTE:  # what was kept of it is of no more use
            run.cache.forget([site for site in sites if site.kind == "self"])

        run.call = MainCall(step_plan, pair)
        try:
            if not (opened and may_drop):
                outputs = evaluate(conds)
                if keeps_guidance and step_plan.self_attention is not Action.REUSE:
                    run.keep_guidance(outputs)
            else:
                kept = self._kept_prompt(run, pair, text_is_reused)
                only = evaluate([cond if index == kept else None for index, cond in enumerate(conds)])[kept]
                outputs = self._both_prompts(run, only, kept)
                run.dropped.add(run.step)
            if refresh:
                run.refreshed.add(run.step)
        finally:
            run.call = None
        if not run.stopped:
            if step_plan.cross_attention is Action.STORE:
                run.stored_means = pair is not None
            if Action.STORE in (step_plan.cross_attention, step_plan.self_attention):
                run.cache_peak_bytes = max(run.cache_peak_bytes, run.cache.bytes)
            self._watch_convergence(run)
        return outputs

    @staticmethod
    def _both_prompts(run: TGateRun, only: torch.Tensor, kept: int) -> list[torch.Tensor]:
        """Return predictions of both prompts from that of one.

        Without kept guidance they are equal: guidance between them is then the identity, for any scale and for every node
        that works on both.
        """
        if run.guidance is None:
            return [only, only]
        difference = run.guidance.at(run.sigma)
        return [only, only - difference] if kept == POSITIVE else [only + difference, only]

    def _may_drop(self, run: TGateRun, conds: list[Any], options: ModelOptions) -> bool:
        if not run.settings.drops_cfg:
            return False
        if len(conds) > 2:
            run.note("the guider uses more than a positive and a negative prompt, so all of them are kept")
        elif len(conds) == 2 and conds[POSITIVE] and conds[NEGATIVE]:
            if not run.combines_as_cfg:
                run.note("the guider does not combine its prompts as plain CFG, so the negative prompt is kept")
            elif host.needs_uncond(options):
                run.note("the sampler or another node needs the negative prompt at every step, so it is kept")
            else:
                return True
        return False

    def _kept_prompt(self, run: TGateRun, pair: tuple[UUID, UUID] | None, text_is_reused: bool) -> int:
        if run.settings.cfg_after_gate is not CfgAfterGate.DROP_KEEP_NEGATIVE:
            return POSITIVE
        if pair is None:  # without the mean in the cache nothing of the positive prompts would be left
            several = "several prompts act together, so the positive ones are kept instead of the negative"
            run.note(
                several if text_is_reused else "the positive prompt is kept instead of the negative: no cache holds any of it"
            )
            return POSITIVE
        return NEGATIVE

    def _watch_convergence(self, run: TGateRun) -> None:
        """Auto mode: once two successive steps agree, the next one stores and the gate opens after it.

        They must agree after having differed: in the first steps all is noise, and attention changes little before it settles.
        """
        if run.settings.mode is not Mode.AUTO or run.step >= run.gate - 1 or not run.first_at_step:
            return
        change = run.change.finish_step()
        if change is None:
            return
        run.changes[run.step] = change
        if change < run.settings.tolerance and change < SETTLED * max(run.changes.values()):
            run.gate = min(run.gate, run.step + 2)
            run.change.clear()

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = host.apply_model_options(args)
        run: TGateRun | None = host.run_state(options, KEY)
        call = run.call if run is not None else None
        if run is None or call is None or run.stopped:
            return executor(*args, **kwargs)
        uuids = host.cond_uuids(options)
        if call.seen.intersection(uuids):
            run.stop("each step calls the model several times for one prompt (tiles or windows)")
            return executor(*args, **kwargs)
        call.seen.update(uuids)

        sites = run.sites(executor.class_obj)
        actions = self._actions(run, call, options, sites, uuids)
        if Action.STORE in actions.values():
            self._choose_cache_device(run, args[0].device)
        with ExitStack() as stack:
            reusing = [site for site in sites if actions[site.kind] is Action.REUSE]
            stack.enter_context(
                host.swapped_forward([(site.module, _reuse(site, run, call, uuids, options)) for site in reusing])
            )
            for site in sites:
                if actions[site.kind] is Action.STORE:
                    hook = _store(site, run, call, uuids, options, batch=args[0].shape[0])
                elif site.kind == "cross" and self._measures(run):
                    hook = _measure(site, run, uuids)
                else:
                    continue
                stack.callback(site.projection.register_forward_hook(hook).remove)
            if actions["cross"] is Action.REUSE:
                args = tuple(host.with_apply_model_options(args, host.without_replacements(options, "attn2")))
            return executor(*args, **kwargs)

    def _actions(
        self, run: TGateRun, call: MainCall, options: TransformerOptions, sites: list[AttentionSite], uuids: list[UUID]
    ) -> dict[Kind, Action]:
        """Return the plan, corrected for what this model call cannot do."""
        actions: dict[Kind, Action] = {"self": call.plan.self_attention, "cross": call.plan.cross_attention}
        if actions["self"] is not Action.COMPUTE and host.has_patches(options, "attn1"):
            run.note("another node changes self-attention, so it is always computed")
            actions["self"] = Action.COMPUTE
        mean = call.pair is not None
        if actions["cross"] is Action.REUSE and not mean:
            # A cond that becomes active after the gate (a timestep range) fills the cache when it first appears.
            if not all(run.cache.holds(site.name, uuids, mean) for site in sites if site.kind == "cross"):
                actions["cross"] = Action.STORE
        return actions

    def _measures(self, run: TGateRun) -> bool:
        return run.settings.mode is Mode.AUTO and run.step < run.gate - 1 and run.first_at_step

    def _choose_cache_device(self, run: TGateRun, device: torch.device) -> None:
        if run.settings.cache_device is CacheDevice.AUTO and run.cache.device is None:
            if host.spare_memory(device) <= 0:
                run.cache.device = torch.device("cpu")
                run.note("little memory is free, so the cache is kept in system memory")


def _why_no_text_cache(model: Any, sites: list[AttentionSite], settings: TGateSettings) -> str:
    if host.is_compiled(model):
        return "the model is compiled, so only the negative prompt is dropped"
    text = f"{type(model).__name__} has no separate cross-attention, so only "
    text += "self-attention is reused and the negative prompt dropped" if sites else "the negative prompt is dropped"
    return text + (", and auto mode opens the gate at gate_at" if settings.mode is Mode.AUTO else "")


def _only_pair(conds: list[Any]) -> tuple[UUID, UUID] | None:
    """Return the uuids of the positive and the negative cond where there is exactly one of each."""
    if len(conds[POSITIVE]) == 1 and len(conds[NEGATIVE]) == 1:
        return conds[POSITIVE][0]["uuid"], conds[NEGATIVE][0]["uuid"]
    return None


def _reuse(
    site: AttentionSite, run: TGateRun, call: MainCall, uuids: list[UUID], options: TransformerOptions
) -> Callable[..., Any]:
    """Return a forward that returns the stored output instead of calling the attention module."""
    compute = site.module.forward
    mean = call.pair is not None and site.name in run.cache.means
    writable = host.has_output_patches(options)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stored = run.cache.load(site.name, uuids, x, mean)
        if stored is None:
            return compute(x, *args, **kwargs)
        run.reused[site.kind].add(run.step)
        return site.result(stored.clone() if writable else stored)

    return forward


def _store(
    site: AttentionSite, run: TGateRun, call: MainCall, uuids: list[UUID], options: TransformerOptions, batch: int
) -> Callable[..., None]:
    """Return a hook that keeps what the module's last layer returns; it also fires where another pack replaced the attention."""
    opening, planning = (call.plan.cross_attention is action for action in (Action.STORE, Action.COMPUTE))
    mean = call.pair is not None and (opening or planning and run.settings.averages_self_attention)
    shares = [_share_of(uuid, call.pair, run.settings) if opening else 0.5 for uuid in uuids] if call.pair is not None else []
    resized = site.kind == "cross" and host.has_input_patches(options, "attn2")

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.shape[0] % len(uuids) or (resized and output.shape[0] != batch):
            run.stop("another node changes the batch inside cross-attention")
        elif run.stopped:
            return
        elif mean:
            run.cache.store_mean(site.name, shares, output)
        else:
            run.cache.store(site.name, uuids, output)

    return hook


def _share_of(uuid: UUID, pair: tuple[UUID, UUID], settings: TGateSettings) -> float:
    """Of one of the two prompts in what the gate stores."""
    if settings.keeps_guidance:
        kept = NEGATIVE if settings.cfg_after_gate is CfgAfterGate.DROP_KEEP_NEGATIVE else POSITIVE
        return float(uuid == pair[kept])
    return settings.positive_share if uuid == pair[POSITIVE] else 1 - settings.positive_share


def _measure(site: AttentionSite, run: TGateRun, uuids: list[UUID]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        run.change.add(site.name, uuids, output)

    return hook
