"""The loop runs rollout, policy step and push.

    rollouts ─► samples ─► group advantages ─► trainer.step ─► push to every engine ─► metrics
       ▲                        (engines' memory is released meanwhile)     │
       └───────────── evaluation, if due ◄── weights, version v+1 ◄────────┘

Without a trainer it is a rollout-only run; without engines it trains on saved rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from slime_spec.config.tree import Config
from slime_spec.errors import RewardError
from slime_spec.interfaces import Engines, RunState, Trainer
from slime_spec.metrics.engines import benefit_metrics, canary_metrics, engine_metrics
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.metrics.step import perf_metrics, push_metrics, train_metrics
from slime_spec.rl.advantages import train_batch
from slime_spec.rl.clock import PhaseClock
from slime_spec.rl.draft_in_training import DraftInTraining
from slime_spec.rl.evaluation import Evaluation
from slime_spec.rl.rollouts import Progress, Rollout, RolloutSource, SamplesRefused
from slime_spec.stop import StopSignals
from slime_spec.types import EngineStats, Sample
from slime_spec.weights.run import Broadcast, push_to_living, run_push

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Holds the parts of one run, already built; a part that the run's mode does not use is None."""

    config: Config
    rollouts: RolloutSource
    trainer: Trainer | None
    engines: Engines | None
    log: Callable[[int, dict[str, float]], None]
    keep_samples: Callable[[int, list[Sample]], None]
    save: Callable[[RunState], None]
    progress: Callable[[str], Progress]
    stop: StopSignals
    draft: DraftInTraining | None = None
    evaluation: Evaluation | None = None


def first_state(
    config: Config,
    loaded: RunState | None,
    trainer: Trainer | None,
    engines: Engines | None,
    draft: DraftInTraining | None = None,
) -> RunState:
    """Return where the run begins: at its beginning, or where the trainer has ``loaded`` a run.

    A resumed trainer pushes its weights, under a version of their own, before engines serve.
    """
    if trainer is None or loaded is None:
        return RunState(rollout_id=0, next_prompt_id=0, weight_version=0)
    state = loaded
    if engines is not None:
        state = replace(state, weight_version=state.weight_version + state.is_ahead, is_ahead=False)
        push_weights(config, trainer, engines, state.weight_version, PhaseClock())
        if draft is not None:
            draft.resume(state.weight_version, state.draft_updates)
    logger.info("resumed rollout_id=%d version=%d", state.rollout_id, state.weight_version)
    if state.rollout_id >= config.run.num_rollout:
        logger.warning("nothing to do: the checkpoint is at step %d of %d", state.rollout_id, config.run.num_rollout)
    return state


def run_loop(job: Job, state: RunState) -> RunState:
    """Run every step from ``state.rollout_id`` on, until a signal asks for the end; returns where the run stands.

    Where checkpoints are saved, the last finished step's is, also where the next rollout fails.
    """
    interval = None if job.trainer is None else job.config.save_interval
    saved = state
    while state.rollout_id < job.config.run.num_rollout and not job.stop.asked:
        try:  # until the rollout has ended the trainer's weights are those of the step before
            evaluated = _evaluate(job, state)
            clock = PhaseClock()
            before, rollout = _roll_out(job, state, clock)
        except KeyboardInterrupt:
            if not job.stop.asked:
                raise
            break
        except Exception as error:
            if interval and state != saved:
                logger.error("step %d failed, the steps before it are saved: %s", state.rollout_id, error)
                job.save(state)
            raise
        metrics, after = _train_and_push(job, state, rollout, before, clock)
        job.log(state.rollout_id, metrics | evaluated)
        state = after
        if interval and state.rollout_id % interval == 0:
            job.save(state)
            saved = state
    if interval and state != saved:
        job.save(state)
    return state


def evaluate_end(job: Job, state: RunState) -> None:
    """Evaluate the weights at the run's end, where evaluations are due, in a row of metrics after the last step's.

    Weights that no push has brought to the engines are pushed first: the end is evaluated, not the last push.
    """
    evaluation, engines = job.evaluation, job.engines
    if evaluation is None or engines is None or state.rollout_id < job.config.run.num_rollout:
        return
    metrics: dict[str, float] = {}
    if job.trainer is not None and state.is_ahead:
        state = replace(state, weight_version=state.weight_version + 1, is_ahead=False)
        metrics = push_weights(job.config, job.trainer, engines, state.weight_version, PhaseClock())
    try:
        evaluated = _evaluate(job, state)
    except KeyboardInterrupt:
        if not job.stop.asked:
            raise
        return
    if evaluated:
        job.log(state.rollout_id, metrics | evaluated)


def _evaluate(job: Job, state: RunState) -> dict[str, float]:
    """Return the metrics of the weights that the engines have before a step, where their evaluation is due."""
    evaluation, num_steps = job.evaluation, job.config.run.num_rollout
    if evaluation is None or not evaluation.is_due(state.rollout_id, state.weight_version, num_steps):
        return {}
    _bring_up_to(job, state)
    with job.stop.interruptible():
        return evaluation.evaluate(state.rollout_id, state.weight_version, job.progress("eval"))


def _roll_out(job: Job, state: RunState, clock: PhaseClock) -> tuple[Sequence[EngineStats], Rollout]:
    """Return a step's samples, kept and with rewards, and what the engines said before."""
    before = [] if job.engines is None else job.engines.stats()
    _bring_up_to(job, state)
    try:
        with job.stop.interruptible(), clock.phase("rollout"):
            rollout = job.rollouts.rollout(state, job.progress("rollout"))
    except SamplesRefused as error:
        job.keep_samples(state.rollout_id, error.samples)
        raise
    job.keep_samples(state.rollout_id, rollout.samples)
    _check_rewards(state.rollout_id, rollout.samples)
    return before, rollout


def _train_and_push(
    job: Job, state: RunState, rollout: Rollout, before: Sequence[EngineStats], clock: PhaseClock
) -> tuple[dict[str, float], RunState]:
    """Make one policy step and one push of a step's samples."""
    samples = rollout.samples
    metrics = {**rollout_metrics(samples), **rollout.metrics}
    version, is_ahead = state.weight_version, state.is_ahead
    if job.trainer is not None:
        metrics |= _train(job, job.trainer, state.rollout_id, rollout, metrics, before, clock)
        is_ahead = True
        due = (state.rollout_id + 1) % job.config.push.interval == 0
        if job.engines is not None and due and not job.stop.asked:
            version, is_ahead = version + 1, False
            job.progress("push")(0, 1)
            metrics |= push_weights(job.config, job.trainer, job.engines, version, clock)
            if job.draft is not None:
                metrics |= job.draft.push(version, clock)
    if job.engines is not None:
        after = job.engines.stats()
        speculates = job.config.speculative.record.speculates
        metrics |= engine_metrics(before, after, speculates) | benefit_metrics(before, after)
    metrics |= perf_metrics(samples, clock.seconds, clock.total_s)
    unfinished = rollout.unfinished_prompt_ids
    updates = None if job.draft is None else job.draft.record
    return metrics, RunState(state.rollout_id + 1, rollout.next_prompt_id, version, unfinished, is_ahead, updates)


def _check_rewards(rollout_id: int, samples: list[Sample]) -> None:
    """Raise RewardError where no sample of the step has a reward: training on nothing would look like a run."""
    if samples and all(sample.reward is None for sample in samples):
        raise RewardError(f"no sample of step {rollout_id} has a reward ({len(samples)} samples): {samples[-1].error}")


def _train(
    job: Job,
    trainer: Trainer,
    step: int,
    rollout: Rollout,
    rolled_out: Mapping[str, float],
    before: Sequence[EngineStats],
    clock: PhaseClock,
) -> dict[str, float]:
    """Make a step's policy update; ``rolled_out`` are the metrics of its rollout."""
    config = job.config
    batch = train_batch(rollout.samples, config.algorithm, config.rollout.routing_replay, rollout.advantages)
    if not batch:
        logger.warning(
            "step trained on nothing: no scored response has a token that counts samples=%d", len(rollout.samples)
        )
        return {}
    learns_draft = False
    metrics: dict[str, float] = {}
    if job.draft is not None:
        after = [] if job.engines is None else job.engines.stats()
        learns_draft, metrics = job.draft.decide(step, rolled_out, clock.seconds["rollout"], before, after)
    job.progress("train")(0, 1)
    with _engines_released(job), clock.phase("train"):
        metrics |= train_metrics(trainer.step(batch, learns_draft))
    if job.draft is not None:
        job.draft.stepped(learns_draft, metrics)
    return metrics


@contextmanager
def _engines_released(job: Job) -> Iterator[None]:
    """Release the engines' memory to the trainer for the length of the block, in colocate mode."""
    if job.engines is None or not job.config.engines_leave:
        yield
        return
    job.engines.set_resident(False)
    try:
        yield
    finally:
        job.engines.set_resident(True)


def push_weights(
    config: Config, trainer: Trainer, engines: Engines, version: int, clock: PhaseClock
) -> dict[str, float]:
    """Bring every engine to ``version``; whatever is raised instead, every engine goes on (see run_push)."""
    with clock.phase("sync"):
        push = push_to_living(
            lambda receivers: trainer.push(version, "target", receivers),
            engines,
            "target",
            config.push.verify,
            config.push.pause_mode,
        )
    return {} if push is None else push_metrics(push) | canary_metrics(engines.stats())


def _bring_up_to(job: Job, state: RunState) -> None:
    """Have engines that are made in place of dead ones begin with the weights of ``state``."""
    if job.engines is not None:
        job.engines.bring_up_with(partial(_bring_up, job, state))


def _bring_up(job: Job, state: RunState, engine: int, broadcast: Broadcast) -> bool:
    """See BringUp: by a push of its own. An engine starts with the checkpoint's weights, which are version 0.

    Where the trainer is ahead of what was pushed nobody has those weights any more, and the next push is waited for.
    """
    if job.trainer is None or not state.weight_version:
        return True
    if state.is_ahead:
        return False
    with closing(job.trainer.push(state.weight_version, "target", (engine,), is_new=True)) as messages:
        run_push(messages, broadcast, job.config.push.verify)
    if job.draft is not None:
        job.draft.bring_up(engine, broadcast)
    return True
