"""Compare greedy replies with and without speculation: equal in fp32; in bf16 each divergence must be a near tie.

Logits of a pass over several tokens may differ in the last bits from those of passes over one: where two tokens are
that close, bf16 may choose the other. So every first divergence is shown with the margin of the two best tokens there,
and the margin is compared with the largest difference that the number of tokens in a pass makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.plan import RowSpan
from slime_spec.algorithms import EAGLE3, HISTORY, LOOKUP, NGRAM
from slime_spec.bench.drafts import Shape, eagle3_config
from slime_spec.bench.engine import engine_logits
from slime_spec.bench.local_engine import engine_config, greedy, started_engine
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain, tokenized
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most, left_out_rows
from slime_spec.bench.timing import Budget, tell
from slime_spec.config.tree import Config
from slime_spec.types import GeneratedSample

SHAPES = (Shape(3, 1, 4), Shape(5, 4, 8))
NUM_NOISE_PROMPTS = 4
# Two logits may each be off by the largest difference, in opposite directions.
MARGIN_REACH = 2.0


@dataclass(frozen=True)
class ExactnessSizes:
    """Holds the sizes that are compared."""

    num_new_tokens: int = 128
    batch_size: int = 8
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def measure(options: BenchOptions) -> list[Row]:
    ordinary, copy = tokenized(options.model, "ordinary"), tokenized(options.model, "copy")
    kinds = ordinary, copy, in_domain(options.model, len(copy), options.seeds[0])
    prompts = tuple(prompt for each in zip(*kinds, strict=True) for prompt in each)[: options.num_prompts]
    batch_size = max(options.batch_sizes, default=ExactnessSizes.batch_size)
    sizes = ExactnessSizes(options.num_new_tokens, batch_size, options.dtypes or ExactnessSizes.dtypes)
    return measure_exactness(options, prompts, sizes)


def measure_exactness(options: BenchOptions, prompts: Prompts, sizes: ExactnessSizes) -> list[Row]:
    """Compare per dtype and way of drafting; then report, per dtype, the margins of all divergences."""
    rows: list[Row] = []
    left_out: list[str] = []
    budget = Budget(options.seconds)
    for dtype in sizes.dtypes:
        ways = speculating(options, dtype)
        plain = engine_config(options.model, dtype, num_gpus=options.num_gpus or 0)
        found: dict[str, list[Tokens]] = {}
        late: list[str] = []
        expected = None
        for name in budget.within(ways, late):
            expected = expected or _replies("plain decoding", plain, prompts, sizes)
            found[name] = _replies(name, ways[name], prompts, sizes)
            rows.append(_identity_row(dtype, name, expected, found[name]))
        if expected is not None:
            rows += _margins(plain, prompts, expected, list(found.values()))
        left_out += [f"{SHORT[dtype]} {name}" for name in late]
    return [*rows, *left_out_rows("exactness", left_out)]


def _margins(
    plain: Config, prompts: Prompts, expected: Sequence[Tokens], found: Sequence[Sequence[Tokens]]
) -> list[Row]:
    """Return the rows about divergences; there shall be none in fp32, and where there is one its margin is told."""
    dtype = plain.engine.dtype
    if dtype == "float32" and all(each == expected for each in found):
        return []
    tell(f"exactness: margins, {SHORT[dtype]}")
    core = Assembly(plain).core(0, perf_counter)
    margins = divergence_margins(core, prompts, expected, *found)
    return _margin_rows(dtype, margins, logit_noise(core, prompts[:NUM_NOISE_PROMPTS]))


def speculating(options: BenchOptions, dtype: str) -> dict[str, Config]:
    """Return the ways of drafting that are compared with plain decoding."""
    plain = engine_config(options.model, dtype, num_gpus=options.num_gpus or 0)
    weightless = {
        name: replace(plain, speculative=replace(plain.speculative, algorithm=name))
        for name in (LOOKUP.name, HISTORY.name, NGRAM.name)
    }
    eagle3 = {f"{EAGLE3.name}_{shape.name}": eagle3_config(options, dtype, shape) for shape in SHAPES}
    return {**weightless, **eagle3}


Tokens = tuple[int, ...]


def _replies(name: str, config: Config, prompts: Prompts, sizes: ExactnessSizes) -> list[Tokens]:
    """Generate every prompt's greedy reply, batch by batch, with a new engine."""
    tell(f"exactness: {len(prompts)} replies, {SHORT[config.engine.dtype]}, {name}")
    samples: list[GeneratedSample] = []
    with started_engine(config) as engine:
        for start in range(0, len(prompts), sizes.batch_size):
            samples += greedy(engine, prompts[start : start + sizes.batch_size], sizes.num_new_tokens, speculative=True)
    return [each.token_ids for each in samples]


def _identity_row(dtype: str, name: str, expected: Sequence[Tokens], found: Sequence[Tokens]) -> Row:
    share = sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)
    id = f"exactness.{SHORT[dtype]}.{name.lower()}.greedy_identical"
    what = f"{SHORT[dtype]}: of {len(expected)} replies, those that {name} left unchanged, token for token"
    return at_least(id, what, share, "share", 1.0) if dtype == "float32" else Row(id, what, share, "share")


def _margin_rows(dtype: str, margins: Sequence[float], noise: float) -> list[Row]:
    what = f"{SHORT[dtype]}: largest difference that 4 tokens a pass instead of one make to a logit"
    rows = [Row(f"exactness.{SHORT[dtype]}.logit_noise", what, noise, "logits")]
    what = f"{SHORT[dtype]}: largest margin of the two best tokens at {len(margins)} first divergences"
    id = f"exactness.{SHORT[dtype]}.margin_max"
    return [*rows, at_most(id, what, max(margins, default=0.0), "logits", MARGIN_REACH * noise)]


def divergence_margins(
    core: GenerationCore, prompts: Prompts, expected: Sequence[Tokens], *found: Sequence[Tokens]
) -> list[float]:
    """Return, for each changed reply, the margin of plain decoding's two best logits where the reply first differs."""
    margins = []
    for prompt, ours, *others in zip(prompts, expected, *found, strict=True):
        same = [
            next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            for theirs in others
            if theirs != ours
        ]
        if same:  # once along the reply, for all that differ from it
            best = engine_logits(core, prompt, ours[: max(same)])[len(prompt) - 1 :].topk(2).values
            margins += [float(best[at, 0] - best[at, 1]) for at in same]
    return margins


def logit_noise(core: GenerationCore, prompts: Prompts) -> float:
    """Return the largest |logit of four-token passes - logit of one-token passes| along the prompts."""
    furthest = 0.0
    for prompt in prompts:
        singly = engine_logits(core, prompt[:1], prompt[1:])
        by_fours = []
        core.cache.reserve((1, len(prompt)), (0, 0))
        for start in range(0, len(prompt), 4):
            piece = prompt[start : start + 4]
            output = core.target.run(core.cache.own, [RowSpan(0, start, len(piece))], piece)
            by_fours.append(core.target.logits(output.hidden))
        furthest = max(furthest, float((torch.cat(by_fours) - singly).abs().max()))
    return furthest
