"""SGLang and the embedded engine reply greedily to the same prompts with one algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from slime_spec.bench.local_engine import greedy, started_engine
from slime_spec.bench.prompts import Prompts, in_domain, tokenized
from slime_spec.bench.rows import BenchOptions
from slime_spec.bench.sglang.servers import started
from slime_spec.bench.sglang.settings import embedded, engine_settings
from slime_spec.speculation.counters import pooled
from slime_spec.types import GeneratedSample

Samples = Sequence[GeneratedSample]
LENGTH = "tokens/round"  # unit of accept lengths


@dataclass(frozen=True)
class Replies:
    """Holds the replies of exactly ``num_new_tokens`` tokens, all prompts at once, in the prompts' order."""

    sglang: Samples
    embedded: Samples


def prompts_of(options: BenchOptions) -> Prompts:
    """Return half questions of the shipped draft's task and half texts to repeat, which n-grams can draft."""
    num_copies = options.num_prompts // 2
    copies = islice(cycle(tokenized(options.model, "copy")), num_copies)
    return (*in_domain(options.model, options.num_prompts - num_copies, options.seeds[0]), *copies)


@cache
def replies(options: BenchOptions, algorithm: str) -> Replies:
    """Generate the replies once per command: parts exactness and counters share one server."""
    prompts = prompts_of(options)
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        config = engine_settings(options, algorithm, prompts, len(prompts), Path(log))
        with started(config) as server:
            theirs = server.greedy(prompts, options.num_new_tokens)
        with started_engine(embedded(config)) as engine:
            ours = greedy(engine, prompts, options.num_new_tokens, speculative=True)
    return Replies(tuple(theirs), tuple(ours))


def accept_length(samples: Samples) -> float:
    """Return reply tokens over verify rounds: SGLang's formula, prefill's token included; NaN without rounds."""
    num_rounds = pooled(each.spec for each in samples).num_rounds
    return sum(len(each.token_ids) for each in samples) / num_rounds if num_rounds else math.nan


def accepted_per_round(samples: Samples) -> float:
    """Return accepted drafts over verify rounds; NaN without rounds."""
    spec = pooled(each.spec for each in samples)
    return spec.num_correct / spec.num_rounds if spec.num_rounds else math.nan
