"""The composition root of a run builds every part from the configuration and gives the parts to the loop.

check, read the checkpoint, tokenizer, prompts      nothing heavy has started yet: mistakes stop the run here
run folder, Ray, engines, trainer                   each is a context that cleans up after itself
loop, then the HF export
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from slime_spec.agents.own import own_function
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.build import to_yaml
from slime_spec.config.schema import by_flag
from slime_spec.config.tree import Config
from slime_spec.interfaces import Engines, RunState, Trainer
from slime_spec.launch.compose import Composed
from slime_spec.launch.preflight import Inputs, checkpoints_of, look
from slime_spec.launch.ray_environment import LOGS, prepare_ray_environment
from slime_spec.launch.rollout_source import own_evaluation_sources, rollout_source
from slime_spec.launch.waiting import told
from slime_spec.metrics.examples import Examples
from slime_spec.metrics.log import MetricLog
from slime_spec.placement import Placement
from slime_spec.rl.custom_rollouts import log_evaluation
from slime_spec.rl.draft_in_training import DraftInTraining
from slime_spec.rl.eval_file import write_evaluation
from slime_spec.rl.evaluation import Evaluated, Evaluation
from slime_spec.rl.loop import Job, evaluate_end, first_state, run_loop
from slime_spec.rl.rollout_data import save_rollout
from slime_spec.rl.samples_file import append_samples
from slime_spec.run_folder import RunFolder, folder_of
from slime_spec.run_log import RunLog
from slime_spec.slime_sample import Args
from slime_spec.stop import StopSignals
from slime_spec.types import EngineStats, Sample
from trainer_bridge.checkpoint_folder import has_checkpoint, resolve_checkpoint, saved_step

logger = logging.getLogger(__name__)


def run(made: Composed, argv: Sequence[str]) -> int:
    """Run the configuration; return the exit code of the process: 128 and the signal's number after a signal."""
    with StopSignals() as stop, RunLog() as run_log:
        try:
            _run(made, argv, stop, run_log)
        except KeyboardInterrupt:
            if stop.asked is None:
                raise
            logger.warning("stopped by %s: no step of this launch was finished", stop.asked.name)
    return stop.exit_code


def _run(made: Composed, argv: Sequence[str], stop: StopSignals, run_log: RunLog) -> None:
    """Run the configuration to its end or to a signal."""
    with ExitStack() as parts, stop.limited_clean_up():
        with stop.interruptible():
            looked = look(made)
            inputs, config = looked.checked(), looked.config
            parts.enter_context(closing(inputs))
            prompts = inputs.prompts
            assert prompts is not None, "a run has prompts"
            logger.info("first prompt %s", prompts.first_shown())
            folder = parts.enter_context(_run_folder(config, argv, inputs.load))
            run_log.write_to(folder.log)
            config = replace(config, trainer=replace(config.trainer, load=inputs.load))
            config = with_absolute_paths(config, folder.path)
            logger.info("run folder made path=%s mode=%s", folder.path, config.run.mode)
            prepare_ray_environment(joining=config.cluster.ray_address is not None)
            engines, trainer, loaded = parts.enter_context(run_parts(config, inputs.spec, stop))
            draft = None
            if config.trains_draft and trainer is not None:
                draft = DraftInTraining(config, trainer, engines)
            state = first_state(config, loaded, trainer, engines, draft)
            folder.begin_at(state.rollout_id)
            log = parts.enter_context(MetricLog.open(config, folder.path))
            examples = parts.enter_context(Examples(config.metrics.console))
        checkpoints = checkpoints_of(config, folder.path)
        job = Job(
            config=config,
            rollouts=parts.enter_context(rollout_source(config, prompts, inputs.tokenizer, engines)),
            trainer=trainer,
            engines=engines,
            log=log.log,
            keep_samples=partial(_keep_samples, config, folder, examples),
            save=partial(_save, trainer, checkpoints),
            progress=lambda phase: partial(log.progress, phase),
            stop=stop,
            draft=draft,
            evaluation=parts.enter_context(_evaluation(config, inputs, engines, folder)),
        )
        finish(job, state, partial(_export, trainer, config, folder))
        if stop.asked:
            saved = "no checkpoint was saved"
            if checkpoints is not None and has_checkpoint(checkpoints):
                step = saved_step(resolve_checkpoint(checkpoints))
                saved = f"step {step} of {config.run.num_rollout} is saved, resume with --load {checkpoints}"
            logger.warning("stopped by %s: %s", stop.asked.name, saved)


def finish(job: Job, state: RunState, export: Callable[[RunState], None]) -> None:
    """Run the loop, then export, then evaluate the end, each until a signal.

    A signal to all processes of a job ends the trainer or an engine too: that is an end in order.
    """
    from ray.exceptions import RayError

    from rollout.pool import EngineProcessDied

    try:
        state = run_loop(job, state)
        if not job.stop.asked:
            export(state)
            evaluate_end(job, state)
    except (RayError, EngineProcessDied) as error:
        if not job.stop.asked:
            raise
        reason = str(error).partition("\n")[0]
        logger.error("the signal ended the run's processes before they had saved and exported: %s", reason)


def _run_folder(config: Config, argv: Sequence[str], load: str | None) -> RunFolder:
    return RunFolder.create(config, argv, to_yaml(config), load, checkpoints_of(config, folder_of(config)))


def with_absolute_paths(config: Config, run_folder: Path) -> Config:
    """Make paths absolute, as actors of a joined Ray have another working directory than the user."""
    trainer, speculative, server = config.trainer, config.speculative, config.sglang_server
    return replace(
        config,
        run=replace(config.run, output_dir=os.path.abspath(run_folder)),
        sglang_server=replace(
            server,
            overrides=_absolute(server.overrides),
            api_key_file=_absolute(server.api_key_file),
            python=_absolute(server.python) if os.sep in (server.python or "") else server.python,  # else on the PATH
        ),
        model=replace(config.model, hf_checkpoint=os.path.abspath(config.model.hf_checkpoint)),
        speculative=replace(
            speculative,
            draft_model_path=_absolute(speculative.draft_model_path),
            token_map=_absolute(speculative.token_map),
            ngram_external_corpus_path=_absolute(speculative.ngram_external_corpus_path),
        ),
        trainer=replace(
            trainer,
            save=_absolute(trainer.save),
            load=_absolute(trainer.load),
            ref_load=_absolute(trainer.ref_load),
        ),
    )


def _absolute(path: str | None) -> str | None:
    """Make a path absolute; a name with a scheme ("builtin:...") is no path."""
    return path if path is None or ":" in path.partition(os.sep)[0] else os.path.abspath(path)


@contextmanager
def run_parts(
    config: Config, spec: ModelSpec | None, stop: StopSignals
) -> Iterator[tuple[Engines | None, Trainer | None, RunState | None]]:
    """Start the trainer and the engines that the mode needs, on Ray; stop them in reverse order.

    The trainer comes first, with the run that it loaded: engines on its GPUs take what it leaves.
    """
    from slime_spec.launch.cluster import cluster

    with ExitStack() as stack, stop.limited_clean_up():  # also of what a signal interrupts while it starts
        reserved = stack.enter_context(cluster(config, spec))
        trainer = None if config.run.mode == "rollout_only" else _trainer(config, reserved.ranks)
        loaded = None
        if trainer is not None:
            stack.callback(trainer.stop)
            with told("the trainer", "trainer ready", LOGS):
                loaded = trainer.load()
        engines = None
        if config.run.mode != "train_only":
            from rollout.pool import EnginePool

            engines = stack.enter_context(EnginePool(config, reserved.engines))
            with told("the engines", "engines ready", LOGS):
                started = engines.start()
            log_started(started)
        yield engines, trainer, loaded


def log_started(started: Sequence[EngineStats]) -> None:
    """Log a line for each engine, and the cost table of the first that has one: engines of a run are alike."""
    for index, stats in enumerate(started):
        logger.info("engine started engine=%d kv_tokens=%d", index, stats.kv_tokens_capacity)
    timed = [(index, stats.costs) for index, stats in enumerate(started) if stats.costs is not None]
    for index, costs in timed[:1]:
        logger.info("timed rounds engine=%d\n%s", index, "\n".join(costs.text()))


def _trainer(config: Config, placement: Placement) -> Trainer:
    from trainer_bridge.megatron.group import MegatronGroup

    return MegatronGroup(config, placement)


@contextmanager
def _evaluation(
    config: Config, inputs: Inputs, engines: Engines | None, folder: RunFolder
) -> Iterator[Evaluation | None]:
    sets = inputs.eval_prompts
    if engines is None or not sets:
        yield None
        return

    log = own_function(config.custom, "eval_log")

    def keep(step: int, evaluated: Sequence[Evaluated]) -> None:
        write_evaluation(folder.evaluation(step), step, evaluated, config.run.save_samples)
        if log is not None:
            log_evaluation(log, Args(**by_flag(config)), step, evaluated)

    with own_evaluation_sources(config, sets, inputs.tokenizer, engines) as own_sources:
        yield Evaluation(config.eval, sets, engines, keep, own_sources)


def _keep_samples(
    config: Config, folder: RunFolder, examples: Examples, rollout_id: int, samples: list[Sample]
) -> None:
    examples.see(rollout_id, samples)
    if config.run.save_samples:
        append_samples(folder.samples, rollout_id, samples)
    if config.run.save_debug_rollout_data:
        save_rollout(config.run.save_debug_rollout_data, rollout_id, samples)


def _export(trainer: Trainer | None, config: Config, folder: RunFolder, state: RunState) -> None:
    if trainer is not None and config.trainer.save_final:
        trainer.export_hf(str(folder.hf_export), str(folder.draft_export))
        logger.info("exported the policy path=%s version=%d", folder.hf_export, state.weight_version)


def _save(trainer: Trainer | None, checkpoints: str | None, state: RunState) -> None:
    assert trainer is not None, "only a run with a trainer saves"
    assert checkpoints is not None, "only a run with an interval saves"
    trainer.save(checkpoints, state)
    logger.info("saved a checkpoint path=%s rollout_id=%d", checkpoints, state.rollout_id)
