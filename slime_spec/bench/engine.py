"""Compare the embedded engine with Hugging Face ``generate``: plain speed, logits, greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.plan import RowSpan
from slime_spec.bench.hf_generate import HfGenerate
from slime_spec.bench.local_engine import engine_config
from slime_spec.bench.plain import SHORT, PlainSizes, hf_and_engine, hf_race
from slime_spec.bench.prompts import Prompts, tokenized
from slime_spec.bench.race import Times, per_s, speed_up
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most

NUM_LOGIT_PROMPTS = 3


def measure(options: BenchOptions) -> list[Row]:
    sizes = PlainSizes(options.num_new_tokens, options.num_rounds)
    return measure_engine(options.model, tokenized(options.model, "ordinary"), sizes)


def measure_engine(model: Path, prompts: Prompts, sizes: PlainSizes) -> list[Row]:
    """Measure speeds per dtype and batch size, then the agreement with Hugging Face in fp32."""
    rows: list[Row] = []
    same: list[bool] = []
    for dtype in sizes.dtypes:
        with hf_and_engine(model, dtype, sizes.num_new_tokens) as sides:
            for batch_size in sizes.batch_sizes:
                times = hf_race(sides, prompts, batch_size, sizes, f"{dtype}, batch {batch_size}")
                rows += _speed_rows(dtype, batch_size, sizes, times)
                if dtype == "float32":
                    same += identical_replies(times)
    reference = HfGenerate(model, "float32", sizes.num_new_tokens)
    return rows + _agreement_rows(model, reference, prompts, same)


def identical_replies(times: Times) -> list[bool]:
    """Say for every timed reply whether the engine and Hugging Face gave the same tokens."""
    return [
        ours == theirs
        for mine, other in zip(times["engine"], times["hf"], strict=True)
        for ours, theirs in zip(mine.result.token_ids, other.result.token_ids, strict=True)
    ]


def _speed_rows(dtype: str, batch_size: int, sizes: PlainSizes, times: Times) -> list[Row]:
    prefix = f"engine.{SHORT[dtype]}.b{batch_size}"
    where = f"{SHORT[dtype]}, batch {batch_size}, {sizes.num_new_tokens} greedy tokens a prompt, prefill included"
    ours, theirs = times["engine"], times["hf"]
    rounds = f"median of {sizes.num_rounds} interleaved rounds"
    return [
        Row(
            f"{prefix}.tokens_per_s",
            f"embedded engine without speculation, {where}",
            per_s(ours, "seconds"),
            "tokens/s",
        ),
        Row(f"{prefix}.hf_tokens_per_s", f"Hugging Face generate, {where}", per_s(theirs, "seconds"), "tokens/s"),
        at_least(f"{prefix}.ratio", f"engine over Hugging Face, {rounds}", speed_up(theirs, ours, "seconds"), "x", 1.5),
    ]


def _agreement_rows(model: Path, reference: HfGenerate, prompts: Prompts, same: Sequence[bool]) -> list[Row]:
    core = Assembly(engine_config(model, "float32")).core(0, perf_counter)
    chosen = prompts[:NUM_LOGIT_PROMPTS]
    furthest = 0.0
    for prompt, reply in zip(chosen, reference.replies(chosen), strict=True):
        expected = reference.logits(prompt + reply)
        furthest = max(furthest, float((engine_logits(core, prompt, reply) - expected).abs().max()))
    num_positions = sum(len(prompt) for prompt in chosen) + len(chosen) * reference.num_new_tokens
    return [
        at_most(
            "engine.fp32.logit_diff_max",
            f"largest |logit - Hugging Face's| over {num_positions} positions and the whole vocabulary, the prompts "
            "in one pass and the replies token by token",
            furthest,
            "logits",
            2e-4,
        ),
        at_least(
            "engine.fp32.greedy_identical",
            f"replies identical to Hugging Face's, token for token, of {len(same)} timed",
            sum(same) / len(same),
            "share",
            1.0,
        ),
    ]


def engine_logits(core: GenerationCore, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """Return the engine's logits [tokens, vocab] along prompt and reply: prompt in one pass, then token by token."""
    core.cache.reserve((1, len(prompt) + len(reply)), (0, 0))
    pieces = []
    start = 0
    for piece in (prompt, *([token] for token in reply)):
        output = core.target.run(core.cache.own, [RowSpan(0, start, len(piece))], piece)
        pieces.append(core.target.logits(output.hidden))
        start += len(piece)
    return torch.cat(pieces)
