"""``slime-spec tune`` measures acceptance, speeds at each batch size and one push, and says what to run with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from rollout.embedded.validate import check_kv_cache
from slime_spec.bench.timing import tell
from slime_spec.bench.tune.candidates import draft_candidates
from slime_spec.bench.tune.options import TuneOptions
from slime_spec.bench.tune.picture import write_picture
from slime_spec.bench.tune.push import check_push
from slime_spec.bench.tune.report import Found, as_json, show
from slime_spec.bench.tune.results import Swept
from slime_spec.bench.tune.server_settings import server_settings
from slime_spec.bench.tune.server_sweep import ServerPlan, sweep_servers
from slime_spec.bench.tune.sweep import sweep_cores
from slime_spec.bench.tune.verdict import overall, verdict_of
from slime_spec.bench.tune.workload import Workload, read_workload
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.engines import kind_of

WIDTH = 160


def run_tune(options: TuneOptions, argv: Sequence[str]) -> int:
    """Run the command; returns 1 where the push went wrong, else 0: "do not speculate" is an answer.

    Raises ConfigError before anything is loaded for a checkpoint, a draft or prompts that cannot be measured.
    """
    on_servers = kind_of(options.config).has_servers
    workload, sweep = (_on_servers if on_servers else _on_cores)(options)
    torch.set_num_threads(options.threads)
    logging.getLogger().setLevel(logging.WARNING)
    found = measure(options, sweep(), workload)
    if options.json is not None:
        options.json.write_text(as_json(found, ["slime-spec", "tune", *argv]) + "\n")
    if options.chart is not None:
        write_picture(options.chart, found)
    console = Console()
    show(found, console if console.is_terminal else Console(width=WIDTH))
    return 1 if found.push is not None and found.push.problem else 0


def measure(options: TuneOptions, swept: Swept, workload: Workload) -> Found:
    """Add a push to what was swept; the engines that swept have ended before it starts a trainer."""
    push = None
    if options.pushes:
        tell("one push from a trainer to an engine")
        push = check_push(options.config, swept.best, workload)
    return Found(
        per="CPU second" if options.config.rollout.num_gpus_per_engine == 0 else "second",
        replies=f"{workload.num_samples} replies a prompt, up to {workload.params.max_new_tokens} tokens, "
        f"temperature {workload.params.temperature:g}",
        swept=swept,
        verdicts=tuple(verdict_of(each) for each in swept.batches),
        overall=overall(swept.batches),
        push=push,
    )


def _on_cores(options: TuneOptions) -> tuple[Workload, Callable[[], Swept]]:
    """Check what the embedded engine is to measure; returns the workload and the measurement itself."""
    target = ModelSpec.from_folder(options.config.model.hf_checkpoint)
    check_kv_cache(options.config, target)
    drafts = draft_candidates(options.config, options.drafts, target)
    workload = _workload(options)
    return workload, lambda: sweep_cores(options, drafts, workload)


def _on_servers(options: TuneOptions) -> tuple[Workload, Callable[[], Swept]]:
    """Check what servers are to measure; returns the workload and the measurement itself."""
    config, sizes = options.config, options.batch_sizes
    judged = server_settings(config, options.given, options.drafts, options.is_quick)
    workload = _workload(options)
    plan = ServerPlan(
        batch_sizes=sizes,
        num_repetitions=options.num_rounds,
        seconds=options.seconds / len(sizes) / max(1, len(judged.settings)),
        time="seconds" if config.rollout.num_gpus_per_engine else "cpu_s",
        assumed_lengths=options.assumed_lengths,
    )

    def sweep() -> Swept:
        with TemporaryDirectory(prefix="slime-spec-tune-") as folder:
            return sweep_servers(config, judged, plan, workload, Path(folder))

    return workload, sweep


def _workload(options: TuneOptions) -> Workload:
    key, may_lack = options.prompt_key, options.may_lack
    return read_workload(options.config, options.prompts, options.num_new_tokens, key, may_lack)
