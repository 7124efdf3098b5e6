"""Check that the SGLang engine's counters add up for each request, and that the embedded engine accepts the same.

Two differences are known. The last round of SGLang may accept drafts beyond the request's budget, which are cut off,
while ours proposes none there. The draft of SGLang's STANDALONE never sees the first token of the text, ours does.
"""

from __future__ import annotations

from slime_spec.algorithms import find_algorithm
from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.bench.sglang.exactness import exactly
from slime_spec.bench.sglang.replies import LENGTH, Samples, accept_length, replies
from slime_spec.bench.sglang.settings import CHAIN
from slime_spec.types import GeneratedSample, SpecCounters


def measure(options: BenchOptions) -> list[Row]:
    rows: list[Row] = []
    for algorithm in options.algorithms:
        if find_algorithm(algorithm).speculates:
            found = replies(options, algorithm)
            rows += counter_rows(algorithm, found.sglang, CHAIN["num_draft_tokens"])
            if find_algorithm(algorithm).has_weights:
                rows += acceptance_rows(options, algorithm, found.sglang, found.embedded)
    return rows


def counter_rows(algorithm: str, samples: Samples, num_draft_tokens: int) -> list[Row]:
    prefix = f"counters.{algorithm.lower()}"
    share = sum(adds_up(sample, num_draft_tokens) for sample in samples) / len(samples)
    what = (
        f"{algorithm}: of {len(samples)} requests, those whose counters add up: histogram to rounds, proposed to "
        f"rounds times {num_draft_tokens - 1}, prefill, rounds and accepted drafts to the reply's tokens"
    )
    length = accept_length(samples)
    return [
        at_least(f"{prefix}.add_up", what, share, "share", 1.0),
        Row(f"{prefix}.accept_length", f"{algorithm}: reply tokens over verify rounds", length, LENGTH),
    ]


def acceptance_rows(options: BenchOptions, algorithm: str, theirs: Samples, ours: Samples) -> list[Row]:
    same = sum(
        their.token_ids == our.token_ids and our.spec.histogram in within_budget(their)
        for their, our in zip(theirs, ours, strict=True)
    ) / len(theirs)
    prefix = f"counters.{algorithm.lower()}"
    what = f"{algorithm}: of {len(theirs)} requests, those whose acceptance histogram is the embedded engine's"
    length = Row(
        f"{prefix}.embedded.accept_length",
        f"{algorithm}: the embedded engine's reply tokens over verify rounds",
        accept_length(ours),
        LENGTH,
    )
    if find_algorithm(algorithm).is_whole_model:
        what += " (SGLang's draft never sees the text's first token)"
        return [Row(f"{prefix}.same_histogram", what, same, "share"), length]
    return [exactly(options, f"{prefix}.same_histogram", what, same), length]


def adds_up(sample: GeneratedSample, num_draft_tokens: int) -> bool:
    """Return whether the counters of a reply that its budget ended add up."""
    spec, most = sample.spec, num_draft_tokens - 1
    made = 1 + spec.num_rounds + spec.num_correct
    return (
        sum(spec.histogram) == spec.num_rounds > 0
        and spec.num_correct_unbinned == 0
        and spec.num_proposed == spec.num_rounds * most
        and len(sample.token_ids) <= made <= len(sample.token_ids) + most
    )


def within_budget(sample: GeneratedSample) -> list[tuple[int, ...]]:
    """Return the sample's possible histograms without the drafts that its last round accepted beyond its budget."""
    spec = sample.spec
    beyond = 1 + spec.num_rounds + spec.num_correct - len(sample.token_ids)
    if beyond <= 0:
        return [spec.histogram]
    lasts = (accepted for accepted, count in enumerate(spec.histogram) if count and accepted >= beyond)
    return [_moved(spec, last, last - beyond) for last in lasts]


def _moved(spec: SpecCounters, old: int, new: int) -> tuple[int, ...]:
    """Return the histogram with one round moved to another count, without trailing zeros."""
    counts = list(spec.histogram)
    counts[old] -= 1
    counts[new] += 1
    while counts and not counts[-1]:
        counts.pop()
    return tuple(counts)
