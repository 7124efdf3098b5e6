"""A turn is one repetition's requests on one server: how long they took, and what the server's counters say of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time

from slime_spec.bench.pays.scenarios import Waves
from slime_spec.bench.sglang.servers import Server
from slime_spec.bench.timing import Clock, Time, timed
from slime_spec.bench.tune.acceptance import Acceptance
from slime_spec.bench.tune.candidates import Candidate
from slime_spec.bench.tune.results import Rounds
from slime_spec.bench.tune.workload import Workload
from slime_spec.speculation.counters import accepted_per_position, pooled
from slime_spec.types import GeneratedSample, SpecCounters

WARM_TOKENS = 8
TICK_S = 0.01  # of the clock by which the kernel counts a process's CPU time


@dataclass(frozen=True)
class Turn:
    """Holds one repetition of a server at one batch; ``prompts_s`` are the seconds of its prompts' passes alone.

    Seconds are CPU seconds of the server's processes where it runs on a CPU; less than a tick of that clock counts as a
    tick.
    """

    num_tokens: int
    num_samples: int
    seconds: float
    prompts_s: float
    spec: SpecCounters

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def token_s(self) -> float | None:
        """Return the seconds of a token after the first of its reply; None where the clock was too coarse for any."""
        num_tokens, seconds = self.num_tokens - self.num_samples, self.seconds - self.prompts_s
        return seconds / num_tokens if num_tokens > 0 and seconds > 0.0 else None


Turns = Mapping[int, list[Turn]]  # by batch
Pair = tuple[Turn, Turn]  # with drafts, without


def warm(server: Server, workload: Workload, batch_sizes: Sequence[int], unused: int) -> None:
    """Let a new server compute each batch once, with prompts of the repetition ``unused``: first passes are slow."""
    for batch in batch_sizes:
        _generate(server, workload.waves(batch, unused, WARM_TOKENS))


def take_turn(
    server: Server, workload: Workload, batch: int, repetition: int, time: Time, clock: Clock = perf_counter
) -> Turn:
    """Measure one repetition, and before it its prompts alone; no prefix is cached from what ran before."""
    cpu_clock = server.cpu_s if time == "cpu_s" else process_time
    taken = []
    for num_new_tokens in (1, None):
        server.forget()
        waves = workload.waves(batch, repetition, num_new_tokens)
        taken.append(timed(partial(_generate, server, waves), clock, cpu_clock))
    prompts, whole = taken
    samples = whole.result
    return Turn(
        num_tokens=sum(len(sample.token_ids) for sample in samples),
        num_samples=len(samples),
        seconds=max(TICK_S, float(getattr(whole, time))),
        prompts_s=float(getattr(prompts, time)),
        spec=pooled(sample.spec for sample in samples),
    )


def _generate(server: Server, waves: Waves) -> list[GeneratedSample]:
    samples: list[GeneratedSample] = []
    for wave in waves:
        for generation in [server.engine.generate(request) for request in wave]:
            samples += generation
    return samples


def rounds_of(pairs: Sequence[Pair], most: int) -> Rounds:
    """Return what rounds brought and cost; ``most`` are the tokens of a round whose drafts are all accepted."""
    turns = [drafted for drafted, _ in pairs]
    num_rounds = sum(turn.spec.num_rounds for turn in turns)
    if not num_rounds:
        return Rounds(None, None, most)
    length = sum(turn.num_tokens - turn.num_samples for turn in turns) / num_rounds
    seconds = [(drafted.token_s, plain.token_s) for drafted, plain in pairs]
    ratios = [length * with_s / without_s for with_s, without_s in seconds if with_s and without_s]
    return Rounds(length, statistics.median(ratios) if ratios else None, most)


def acceptance_of_server(candidate: Candidate, turns: Turns) -> Acceptance:
    """Return a setting's acceptance over all batches, as far as its server counts: in all, by position, or not."""
    spec = pooled(turn.spec for each in turns.values() for turn in each)
    if not spec.num_rounds:
        return Acceptance(candidate.name, candidate.rule, (), (), None, None)
    survived = accepted_per_position(spec) if sum(spec.histogram) else []
    num_tried = (spec.num_rounds, *survived)[: len(survived)]
    rates = tuple(stood / tried for stood, tried in zip(survived, num_tried, strict=True) if tried)
    gained, drafted = spec.num_correct / spec.num_rounds, spec.num_proposed / spec.num_rounds
    return Acceptance(candidate.name, candidate.rule, rates, num_tried, gained, drafted)
