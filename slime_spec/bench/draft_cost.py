"""Measure the cost and the gain of drafts: rounds of EAGLE-3 chains at the core, with the drafter timed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace

from rollout.embedded.core import GenerationCore
from slime_spec.bench.cost_model import Pass
from slime_spec.bench.drafts import CHAINS, Shape, eagle3_config
from slime_spec.bench.prompts import Prompts, rotating
from slime_spec.bench.random_engine import assembly_of
from slime_spec.bench.rows import BenchOptions
from slime_spec.bench.timing import settled
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

SHARE_BATCH_SIZE = 8
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class DraftSizes:
    """Holds the sizes that are measured."""

    max_rounds: int = 12
    num_repeats: int = 3
    batch_sizes: tuple[int, ...] = (1, 4, 8)
    shapes: tuple[Shape, ...] = CHAINS


@dataclass
class DraftCost:
    """Collects passes of drafting and of the work around a round or plain step: (batch size, steps, seconds a round).

    ``accept_lengths`` are tokens gained per round, by steps (None: the weights are random); ``outside_shares`` the
    share of a round's time outside target and draft at batch SHARE_BATCH_SIZE.
    """

    drafts: list[Pass] = field(default_factory=list)
    outside: list[Pass] = field(default_factory=list)
    plain_outside: list[Pass] = field(default_factory=list)
    accept_lengths: dict[int, float | None] = field(default_factory=dict)
    outside_shares: dict[str, float] = field(default_factory=dict)


def measure_draft(options: BenchOptions, dtype: str, prompts: Prompts, sizes: DraftSizes) -> DraftCost:
    """Measure greedy rounds of every shape and batch size, plain steps, and the outside share of sampled rounds."""
    found = DraftCost()
    for shape in sizes.shapes:
        core = assembly_of(options)(eagle3_config(options, dtype, shape)).core(0, settled)
        gained: list[GeneratedSample] = []
        for batch_size in sizes.batch_sizes:
            runs = timed_runs(core, prompts, batch_size, sizes, GREEDY)
            found.drafts.append(Pass(batch_size, shape.num_steps, min(run.draft_s for run in runs)))
            found.outside.append(Pass(batch_size, 1, min(run.outside_s for run in runs)))
            gained += [sample for run in runs for sample in run.samples]
            if shape == sizes.shapes[0]:
                plain = timed_runs(core, prompts, batch_size, sizes, replace(GREEDY, speculative=False))
                found.plain_outside.append(Pass(batch_size, 1, min(run.outside_s for run in plain)))
            if batch_size == SHARE_BATCH_SIZE:
                sampled = timed_runs(core, prompts, batch_size, sizes, replace(GREEDY, temperature=1.0))
                for name, measured in (("greedy", runs), ("sampled", sampled)):
                    share = statistics.median(run.outside_share for run in measured)
                    found.outside_shares[f"{name}_{shape.name}"] = share
        num_rounds = sum(sample.spec.num_rounds for sample in gained)
        length = sum(len(sample.token_ids) - 1 for sample in gained) / num_rounds
        found.accept_lengths[shape.num_steps] = length if options.model_shape is None else None
    return found


@dataclass(frozen=True)
class Run:
    """Holds times of one batch's first rounds: times per round, over the rounds in which no sequence had ended."""

    draft_s: float
    outside_s: float
    outside_share: float
    samples: list[GeneratedSample]


def timed_runs(
    core: GenerationCore, prompts: Prompts, batch_size: int, sizes: DraftSizes, params: SamplingParams
) -> list[Run]:
    """Time several batches; the first batch warms up and is left out."""
    batches = [rotating(prompts, i * batch_size, batch_size) for i in range(sizes.num_repeats + 1)]
    return [timed_run(core, batch, params, sizes.max_rounds) for batch in batches][1:]


def timed_run(core: GenerationCore, prompts: Prompts, params: SamplingParams, max_rounds: int) -> Run:
    """Time one batch from when all sequences run until the first ends, or for ``max_rounds``; abort the rest."""
    finished: list[GeneratedSample] = []
    groups = [
        core.add(GroupRequest(str(index), prompt, (index,), params), finished.append)
        for index, prompt in enumerate(prompts)
    ]
    while core.batch.num_running + len(finished) < len(prompts):
        core.step()
    num_ended = len(finished)
    timing = core.timing
    forward_s, draft_s, total_s = timing.forward_s, timing.draft_s, timing.total_s
    num_rounds = 0
    while len(finished) == num_ended and num_rounds < max_rounds:
        core.step()
        num_rounds += 1
    forward_s, draft_s, total_s = timing.forward_s - forward_s, timing.draft_s - draft_s, timing.total_s - total_s
    for group in groups:
        core.abort(group)
    outside_s = total_s - forward_s - draft_s
    return Run(draft_s / num_rounds, outside_s / num_rounds, outside_s / total_s, finished)
