"""The command ``slime-spec eval CHECKPOINT`` evaluates a checkpoint as a run evaluates its weights between steps."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slime_spec.files import write_whole
from slime_spec.launch.eval_arguments import EvalArguments
from slime_spec.launch.preflight import look
from slime_spec.launch.ray_environment import prepare_ray_environment
from slime_spec.launch.rollout_source import own_evaluation_sources
from slime_spec.launch.train import run_parts, with_absolute_paths
from slime_spec.preflight.report import width
from slime_spec.rl.draft_in_training import DraftInTraining
from slime_spec.rl.eval_file import write_evaluation
from slime_spec.rl.evaluation import Evaluated, Evaluation
from slime_spec.rl.loop import first_state
from slime_spec.stop import StopSignals

logger = logging.getLogger(__name__)

SAY_EVERY_S = 10.0


def run_eval(arguments: EvalArguments, folder: Path) -> int:
    """Evaluate, show a table and write what was asked for; return the exit code of the process."""
    with StopSignals() as stop:
        try:
            evaluated = _evaluated(arguments, folder, stop)
        except KeyboardInterrupt:
            if stop.asked is None:
                raise
            logger.warning("stopped by %s: the evaluation is not finished", stop.asked.name)
            return stop.exit_code
    Console(width=width()).print(table(arguments.checkpoint, evaluated))
    return stop.exit_code


def _evaluated(arguments: EvalArguments, folder: Path, stop: StopSignals) -> Sequence[Evaluated]:
    config, kept = arguments.made.config, list[Evaluated]()

    def keep(step: int, evaluated: Sequence[Evaluated]) -> None:
        kept.extend(evaluated)
        if arguments.samples is not None:
            write_evaluation(arguments.samples, step, evaluated, with_samples=True)
        if arguments.json is not None:
            write_whole(arguments.json, as_json(arguments.checkpoint, step, evaluated))

    with ExitStack() as parts, stop.limited_clean_up(), stop.interruptible():
        inputs = look(arguments.made, takes_prompts=False).checked()
        parts.enter_context(closing(inputs))
        config = replace(config, trainer=replace(config.trainer, load=inputs.load))
        config = with_absolute_paths(config, folder)
        prepare_ray_environment(joining=config.cluster.ray_address is not None)
        engines, trainer, loaded = parts.enter_context(run_parts(config, inputs.spec, stop))
        assert engines is not None, "eval has no mode without engines"
        draft = DraftInTraining(config, trainer, engines) if config.trains_draft and trainer is not None else None
        state = first_state(config, loaded, trainer, engines, draft)
        sets = inputs.eval_prompts
        sources = parts.enter_context(own_evaluation_sources(config, sets, inputs.tokenizer, engines))
        evaluation = Evaluation(config.eval, sets, engines, keep, sources)
        with shown_progress() as progress:
            evaluation.evaluate(state.rollout_id, state.weight_version, progress)
    return kept


@contextmanager
def shown_progress() -> Iterator[Callable[[int, int], None]]:
    """Give what shows the progress: a bar on a terminal, elsewhere a line every few seconds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("samples", total=None)
        told_at = time.monotonic()

        def progress(done: int, wanted: int) -> None:
            nonlocal told_at
            bars.update(bar, completed=done, total=wanted)
            if not console.is_terminal and time.monotonic() - told_at >= SAY_EVERY_S:
                told_at = time.monotonic()
                logger.info("generated samples=%d of %d", done, wanted)

        yield progress


def table(checkpoint: str, evaluated: Sequence[Evaluated]) -> Table:
    """Return a row of each set; a column that no set has is left out."""
    made = Table(title=f"Evaluation of {checkpoint}")
    rows = [_cells(each) for each in evaluated]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        made.add_column(name, justify="left" if name == "set" else "right")
    for row in rows:
        made.add_row(*(row.get(name, "") for name in columns))
    return made


def _cells(evaluated: Evaluated) -> dict[str, str]:
    own = own_metrics(evaluated)
    shown = {"set": evaluated.name, "samples": f"{own['num_samples']:.0f}"}
    if "reward" in own:
        interval = f"{own['accuracy_low']:.3f} to {own['accuracy_high']:.3f}"
        shown |= {"reward": f"{own['reward']:.3f}", "accuracy": f"{own['accuracy']:.3f}", "95 % interval": interval}
    shown |= {name: f"{value:.3f}" for name, value in own.items() if name.startswith("pass@") and name != "pass@1"}
    shown |= {"length": f"{own['response_len_mean']:.1f}", "truncated": f"{own['truncated_ratio']:.0%}"}
    if "spec_accept_length" in own:
        shown["accept_len"] = f"{own['spec_accept_length']:.2f}"
    if own["num_excluded"]:
        shown["excluded"] = f"{own['num_excluded']:.0f}"
    return shown


def own_metrics(evaluated: Evaluated) -> dict[str, float]:
    """Return a set's metrics by their names without the set's: ``{"reward": 0.31, "accuracy": 0.31, ...}``."""
    prefix = f"eval/{evaluated.name}"
    return {name.removeprefix(prefix)[1:] or "reward": value for name, value in evaluated.metrics.items()}


def as_json(checkpoint: str, step: int, evaluated: Sequence[Evaluated]) -> str:
    """Return --json's file: ``{"checkpoint": "runs/a", "step": 20, "sets": {"aime": {"reward": 0.31, ...}}}``."""
    sets = {each.name: own_metrics(each) for each in evaluated}
    return json.dumps({"checkpoint": checkpoint, "step": step, "sets": sets}, indent=2) + "\n"


@contextmanager
def engines_folder() -> Iterator[Path]:
    """Give a new folder for the logs of the engines' servers, which is kept where something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix="slime-spec-eval-"))
    try:
        yield folder
    except BaseException:
        if (folder / "engines").exists():
            sys.stderr.write(f"the logs of the engines are kept in {folder / 'engines'}\n")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
