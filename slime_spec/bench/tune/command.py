"""``slime-spec tune`` measures acceptance, speeds at each batch size and one push, and says what to run with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import torch
from rich.console import Console

from rollout.embedded.calibrate import costs_of
from rollout.embedded.validate import check_kv_cache
from slime_spec.bench.timing import tell
from slime_spec.bench.tune.acceptance import Acceptance, measure_acceptance
from slime_spec.bench.tune.candidates import Candidate, by_rule, configured, draft_candidates, text_candidates
from slime_spec.bench.tune.options import TuneOptions
from slime_spec.bench.tune.push import check_push
from slime_spec.bench.tune.report import Found, as_json, show
from slime_spec.bench.tune.sides import Cores
from slime_spec.bench.tune.sweep import BatchResult, Plan, leading, measure_batch, typical_context
from slime_spec.bench.tune.verdict import overall, verdict_of
from slime_spec.bench.tune.workload import Workload, read_workload
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.speculation.cost_table import CostTable

WIDTH = 160


def run_tune(options: TuneOptions, argv: Sequence[str]) -> int:
    """Run the command; returns 1 where the push went wrong, else 0: "do not speculate" is an answer.

    Raises ConfigError before anything is loaded for a checkpoint, a draft or prompts that cannot be measured.
    """
    target = ModelSpec.from_folder(options.config.model.hf_checkpoint)
    check_kv_cache(options.config, target)
    drafts = draft_candidates(options.config, options.drafts, target)
    workload = read_workload(options.config, options.prompts, options.num_new_tokens, options.prompt_key)
    torch.set_num_threads(options.threads)
    logging.getLogger().setLevel(logging.WARNING)
    found = measure(options, drafts, workload)
    if options.json is not None:
        options.json.write_text(as_json(found, ["slime-spec", "tune", *argv]) + "\n")
    console = Console()
    show(found, console if console.is_terminal else Console(width=WIDTH))
    return 1 if found.push is not None and found.push.problem else 0


def measure(options: TuneOptions, drafts: Sequence[Candidate], workload: Workload) -> Found:
    """Measure everything; the engines' cores end before the push starts a trainer."""
    acceptance, batches, best, costs = _sweep(options, drafts, workload)
    push = None
    if options.pushes:
        tell("one push from a trainer to an engine")
        push = check_push(options.config, best, workload)
    return Found(
        per="CPU second" if options.config.rollout.num_gpus_per_engine == 0 else "second",
        replies=f"{workload.num_samples} replies a prompt, up to {workload.params.max_new_tokens} tokens, "
        f"temperature {workload.params.temperature:g}",
        acceptance=tuple(acceptance.values()),
        batches=tuple(batches),
        costs=costs,
        verdicts=tuple(verdict_of(each) for each in batches),
        overall=overall(batches),
        push=push,
        has_network=best is not None,
    )


def _sweep(
    options: TuneOptions, drafts: Sequence[Candidate], workload: Workload
) -> tuple[dict[Candidate, Acceptance], list[BatchResult], Candidate | None, CostTable | None]:
    """Return acceptance, the results by batch, the leading draft, and the table of its costs."""
    config, sizes = options.config, options.batch_sizes
    cores = Cores(config, max(sizes))
    has_texts = workload.has_earlier or (workload.num_samples > 1 and max(sizes) > 1)
    candidates = text_candidates(has_texts) + [rule for draft in drafts for rule in by_rule(draft, config)]
    acceptance = dict(zip(candidates, measure_acceptance(cores, candidates, workload), strict=True))
    context = typical_context(workload)
    of = _best_rules(cores, acceptance, sizes[0], context)
    own = configured(config)
    plan = Plan(
        of=of,
        others=() if own is None else (cores.side(own),),
        num_repetitions=options.num_rounds,
        seconds=options.seconds / len(sizes),
        assumed_lengths=options.assumed_lengths,
    )
    batches = [measure_batch(cores, plan, workload, size, perf_counter) for size in sizes]
    best = leading(cores, of, sizes[0], context)
    side = cores.side((best or next(iter(of))).alone)
    return acceptance, batches, best, costs_of(side.core)


def _best_rules(
    cores: Cores, acceptance: dict[Candidate, Acceptance], batch: int, context: int
) -> dict[Candidate, Acceptance]:
    """Keep each draft with its best rule of verification alone, and give the others' cores up."""
    names: dict[str, list[Candidate]] = {}
    for candidate in acceptance:
        names.setdefault(candidate.name, []).append(candidate)
    kept = {}
    for group in names.values():
        best = (
            group[0] if len(group) == 1 else leading(cores, {each: acceptance[each] for each in group}, batch, context)
        )
        assert best is not None, "only a network's drafts have several rules"
        kept[best] = acceptance[best]
        for other in group:
            if other is not best:
                cores.drop(other.alone)
    return kept
