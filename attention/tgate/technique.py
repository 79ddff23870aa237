"""T-GATE: cross-attention converges early, so after a gate step its cached output is reused.

Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models" (arXiv:2404.02747), and the
authors' second version, which also reuses self-attention between intervals. The exact schedule is ``plan``, and what one
evaluation does is decided by ``evaluation.plan_evaluation``.

A run of S steps has a gate step G. Before it (semantics planning) everything is computed, except that self-attention may
be reused within intervals. Step G-1 stores the output of every attention module, after its last projection and before the
residual sum. From G on (fidelity improving) cross-attention is the stored output: the module is not called at all. The
negative prompt is no longer computed either, so the stored value is the mean of the positive and the negative one.

Two things are not the paper's. Where the positive prompt is kept, self-attention within intervals is stored as the mean of
both prompts as well: half of the memory, and as near to the plain image. And the gate can be opened again every so many
steps (``refresh_every``): such a step computes and stores everything anew, and until the next one the difference between
the two prompts' noise predictions goes on as it went through the last two of them (``Guidance``).

Reuse is never taken for granted. The gate is open for an evaluation only where every cross-attention module holds what it
will be asked for; until then both prompts are computed and stored. Where stored outputs turn out not to fit (another node
changed the size of the layers, or calls them in its own way), the evaluation is given up and made again in full.

Nothing is kept on the model: a run's state (``TGateRun``) is made when sampling starts and emptied when it ends, and
modules get another ``forward`` only for the length of one model call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import torch

from .. import host
from ..host import ModelOptions, StepClock, TransformerOptions, follow_sampler, read_sigma
from ..networks.blocks import AttentionSite, Kind
from ..networks.grids import image_tokens
from ..networks.table import network_layout
from .convergence import SETTLED
from .evaluation import POSITIVE, EvaluationPlan, Situation, has_no_negative, plan_evaluation
from .modules import attention_as
from .plan import Action, gate_window
from .report import CHANGED_BATCH, SEVERAL_CALLS, evaluated_in_parts
from .room import announced_bytes, find_room
from .run import MOST_MISFITS, MainCall, TGateRun
from .settings import TGateSettings

KEY = host.GATE
KINDS: tuple[Kind, ...] = ("self", "cross")

Evaluate = Callable[[list[Any]], list[torch.Tensor]]


class TGate:
    """Wrappers of one ``TGateCache`` node. Holds settings only: a run's state lives in that run's options."""

    def __init__(self, settings: TGateSettings) -> None:
        self.settings = settings
        self.text = host.NodeText()

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Make the state of a run, and say at its end what was done."""
        guider = executor.class_obj
        clock = StepClock.from_sigmas(sigmas)
        window = gate_window(self.settings, clock, partial(host.sigma_at_share, guider))
        run = TGateRun(self.settings, clock, host.combines_as_cfg(guider), window, len(noise))
        try:
            with host.run_scope(guider, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self.text.tell(run.summary())
            run.release()

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """Let ComfyUI make room for the cache as well."""
        room = announced_bytes(self.settings, model.model, noise_shape)
        return host.prepare_with_room(room, executor, model, noise_shape, *args, **kwargs)

    sampler_sample = staticmethod(follow_sampler)

    def predict_noise(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions, seed: Any = None
    ) -> Any:
        """Take note of an evaluation: its noise level and its step."""
        run = host.run_state(model_options, KEY)
        if run is not None:
            sigma, model_options = read_sigma(timestep, model_options)
            run.begin_evaluation(sigma, x.shape, host.steps_done(model_options))
            run.report.beside_lazycache = host.lazycache_acts(model_options)
        return executor(x, timestep, model_options, seed)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions
    ) -> Any:
        """Plan the sampler's own evaluation of its prompts, and carry the plan out."""
        run: TGateRun | None = host.run_state(model_options, KEY)
        private = host.run_state(model_options, host.INTERNAL_PASS)
        if run is None or run.stopped or private or not run.awaits_main_call:
            if run is not None and not private:
                run.report.one_by_one |= any(cond["uuid"] not in run.main_conds for one in conds for cond in one or ())
            return executor(model, conds, x, timestep, model_options)
        run.awaits_main_call = False
        run.main_conds = {cond["uuid"] for one in conds for cond in one or ()}
        in_parts = evaluated_in_parts(x, run.latent_shape, run.images)
        if in_parts:
            run.stop(in_parts)
            return executor(model, conds, x, timestep, model_options)

        def evaluate(wanted: list[Any]) -> list[torch.Tensor]:
            return executor(model, wanted, x, timestep, model_options)

        sites = run.sites(model)
        replacements = host.acting_replacements(model_options, "attn2", run.sigma)
        run.see_others((replacements, host.acting_hooks(conds, run.sigma)), sites)
        now = run.situation(sites, conds, host.needs_uncond(model_options))
        if not now.reuses_text and run.reuses_text:
            run.report.no_text = "the model is compiled" if host.is_compiled(model) else _no_text(model)
        run.report.no_negative |= has_no_negative(now.prompts)
        plan = plan_evaluation(run.settings, now)
        outputs = self._carry_out(run, plan, sites, now, model_options, conds, evaluate)
        if outputs is None and not run.stopped:  # what was stored did not fit
            outputs = self._carry_out(run, plan.stored_again(), run.sites(model), now, model_options, conds, evaluate)
        return evaluate(conds) if outputs is None else outputs

    def _carry_out(
        self,
        run: TGateRun,
        plan: EvaluationPlan,
        sites: list[AttentionSite],
        now: Situation,
        options: ModelOptions,
        conds: list[Any],
        evaluate: Evaluate,
    ) -> list[torch.Tensor] | None:
        """Do what a plan says. Return the prediction of each list of conds, or None where what was stored did not fit."""
        for note in plan.notes:
            run.note(note)
        run.prepare_cache(plan, sites, {uuid for one in now.active for uuid in one})
        if plan.must_compute:
            host.make_easycache_compute(options)
        if plan.kept is not None and run.settings.keeps_guidance:
            host.make_lazycache_compute(options)
        lists = now.active if plan.kept is None else (now.active[plan.kept],)
        run.call = call = MainCall(plan, [uuid for one in lists for uuid in one])
        try:
            predictions = evaluate(conds if plan.kept is None else [c if i == plan.kept else None for i, c in enumerate(conds)])
        except Exception:
            if call.misfit is None:
                raise
            self._note_misfit(run, call.misfit)
            return None
        finally:
            run.call = None
        if plan.kept is not None and not call.seen:  # no model call: ComfyUI found no prompt that acts
            return None
        if not run.stopped:
            self._take_note(run, plan, call, skipped=host.easycache_skipped(options), predictions=predictions)
        return predictions if plan.kept is None else self._both_prompts(run, predictions[plan.kept], plan.kept)

    @staticmethod
    def _note_misfit(run: TGateRun, reason: str) -> None:
        run.report.misfits.add(run.step)
        run.misfits += 1
        if run.misfits >= MOST_MISFITS and run.reuses_text:
            run.reuses_text = False
            run.cache.clear()
            run.note(f"cross-attention is no longer reused: {reason} again and again")

    @staticmethod
    def _take_note(run: TGateRun, plan: EvaluationPlan, call: MainCall, skipped: bool, predictions: list[torch.Tensor]) -> None:
        """Keep what an evaluation found, and count what it did."""
        report, step = run.report, run.step
        report.evaluated.add(step)
        if skipped:  # EasyCache answered: nothing was computed, stored or reused
            report.skipped.add(step)
            return
        if plan.keeps_guidance and plan.attention.self_attention is not Action.REUSE:
            run.keep_guidance(predictions)
        run.negative_is_old = plan.kept is not None
        run.last = step
        if plan.kept is not None:
            report.dropped.add(step)
        if plan.refreshes:
            report.refreshed.add(step)
        if plan.stores_late:
            report.stored_late.add(step)
        for kind in KINDS:
            if plan.attention.action(kind) is Action.REUSE and call.served[kind]:
                if not call.computed[kind]:
                    report.reused[kind].add(step)
                elif kind == "cross":
                    report.in_part[step] = (call.served[kind], call.served[kind] + call.computed[kind])
        if call.served["cross"]:
            run.misfits = 0
        run.count_memory()
        TGate._watch_convergence(run)

    @staticmethod
    def _watch_convergence(run: TGateRun) -> None:
        """Auto mode: let the gate open after the next step, which stores, once two successive steps agree.

        They must agree after having differed: in the first steps all is noise, and attention changes little before it settles.
        """
        change = run.change.finish_step() if run.measures else None
        if change is None:
            return
        run.changes[run.step] = change
        if change < run.settings.tolerance and change < SETTLED * max(run.changes.values()):
            run.gate = min(run.gate, run.step + 2)
            run.change.clear()

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

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the attention modules do in one model call what is planned for its evaluation."""
        options = host.apply_model_options(args)
        run: TGateRun | None = host.run_state(options, KEY)
        call = run.call if run is not None else None
        if run is None or call is None or run.stopped:
            return executor(*args, **kwargs)
        prompts = host.prompts_of_call(options, len(args[0]), run.latent_shape[0], call.active)
        uuids = [uuid for _, uuid in prompts or ()]
        if prompts is None or call.seen.intersection(uuids):
            reason = CHANGED_BATCH if prompts is None else SEVERAL_CALLS
            run.stop(reason)
            if call.plan.kept is not None or call.served["cross"]:
                call.give_up(reason)
            return executor(*args, **kwargs)
        call.seen.update(uuids)

        find_room(run, call, executor.class_obj, args[0], host.latent_shape(args, kwargs), len(uuids))
        if run.stopped:
            return executor(*args, **kwargs)
        sites = run.sites(executor.class_obj)
        actions = self._actions(run, call, options, sites, uuids)
        if call.plan.kept is not None:
            host.move_easycache(options, uuids, call.active)
        if actions["cross"] is Action.REUSE:
            args = tuple(host.with_apply_model_options(args, host.without_replacements(options, "attn2")))
        batch, guided = args[0].shape[0], any(site.guided for site in sites)
        tokens = image_tokens(host.diffusion_model(executor.class_obj), args[0].shape) if guided else None
        with attention_as(actions, sites, run, call, uuids, options, batch, tokens):
            return executor(*args, **kwargs)

    def _actions(
        self, run: TGateRun, call: MainCall, options: TransformerOptions, sites: list[AttentionSite], uuids: list[UUID]
    ) -> dict[Kind, Action]:
        """Return the plan, corrected for what this model call cannot do."""
        actions: dict[Kind, Action] = {"self": call.attention.self_attention, "cross": call.attention.cross_attention}
        if not run.cache.keeps_self:
            actions["self"] = Action.COMPUTE
        if actions["self"] is not Action.COMPUTE and host.has_patches(options, "attn1"):
            run.note("another node changes self-attention, so it is always computed")
            actions["self"] = Action.COMPUTE
        if actions["cross"] is Action.REUSE and run.reuses_text:
            # A cond that becomes active after the gate (a timestep range) fills the cache when it first appears.
            if call.pair is None and not run.cache.holds(run.seen_sites, uuids):
                actions["cross"] = Action.STORE
            elif host.changes_unseen(options, "attn2"):
                run.note(
                    "another node changes cross-attention (IPAdapter and its kin), which is reused as it was when the gate "
                    "opened: what that node starts or ends later has no effect"
                )
        return actions


def _no_text(model: Any) -> str:
    layout = network_layout(host.diffusion_model(model))
    known = layout is not None and layout.attention is None
    return f"{type(model).__name__} has no separate cross-attention" + ("" if known else " that T-GATE knows")
