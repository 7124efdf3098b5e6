"""Measure drafts without a network: lookup with advice on an edited text, prompt lookup and n-grams on any text.

The edit: the model is asked to repeat a text of about 200 tokens; the advice is an earlier version of that text, which
differs in one place. The model is not forced to copy: its reply sometimes departs from the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from slime_spec.algorithms import LOOKUP, NGRAM
from slime_spec.bench.drafts import with_draft_tokens
from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import EARLIER, LONG_TEXTS, REPEAT, Prompts, rotating, tokenized
from slime_spec.bench.race import Ask, EngineSide, ForgetfulSide, Side, race, ratio_rows, speed_rows
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.types import SamplingParams

REACH = 3.0
REPLIES_LONGER = 2  # a repeated text may be this much longer than other replies
# Tokens verified per round, the root included.
ADVICE_TOKENS = (8, 16)
Advice = Mapping[tuple[int, ...], tuple[int, ...]]  # prompt -> advice


@dataclass(frozen=True)
class LookupSizes:
    """Holds the numbers of prompts, tokens and rounds that are measured; with ``num_gpus`` 1 on the GPU."""

    num_new_tokens: int = 128
    num_rounds: int = 5
    batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    num_gpus: int = 0


def measure(options: BenchOptions) -> list[Row]:
    sizes = LookupSizes(
        options.num_new_tokens,
        options.num_rounds,
        options.batch_sizes or LookupSizes.batch_sizes,
        options.dtypes or LookupSizes.dtypes,
        options.num_gpus or 0,
    )
    rows = measure_advice(options.model, edits(options.model), sizes, REPLIES_LONGER * options.num_new_tokens)
    kinds = {"copy": tokenized(options.model, "copy"), "chat": tokenized(options.model, "ordinary")}
    return rows + measure_lookup(options.model, kinds, sizes)


def edits(model: Path) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return prompts that ask for a text, each with an earlier version of the text as advice."""
    tokenizer = Tokenizer.load(model)
    now, before = EARLIER
    return {tokenizer.chat(REPEAT + text): tokenizer.encode(text.replace(now, before)) for text in LONG_TEXTS}


def measure_advice(model: Path, advice: Advice, sizes: LookupSizes, longest: int) -> list[Row]:
    """Measure batch 1, greedy, to EOS: with advice in both of RTP-LLM's modes, without advice, and plain."""
    prompts, stops = tuple(advice), tuple(end_token_ids(model))
    rows: list[Row] = []
    for dtype in sizes.dtypes:
        with ExitStack() as started:
            sides: dict[str, Side] = {}
            first = None
            for count in ADVICE_TOKENS:
                config = with_draft_tokens(engine_config(model, dtype, LOOKUP.name, sizes.num_gpus), count)
                engine = started.enter_context(started_engine(config, first))
                first = first or engine
                sides.setdefault("plain", EngineSide(engine, False))
                sides[f"no_advice_n{count}"] = EngineSide(engine, True)
                for name, edit in (("advice", False), ("edit", True)):
                    sides[f"{name}_n{count}"] = EngineSide(engine, True, _advised(advice, edit))

            def ask(turn: int) -> Ask:
                return Ask(rotating(prompts, turn, 1), 1, longest, stops)

            where = f"{SHORT[dtype]}, a text edited in one place, batch 1"
            times = race(f"lookup, {where}", sizes.num_rounds, sides, ask)
        prefix = f"lookup.{SHORT[dtype]}.edited_text.b1"
        for name in sides:
            rows += speed_rows(f"{prefix}.{name}", f"{name}, {where}", times[name])
        for count in ADVICE_TOKENS:
            for name in ("advice", "edit", "no_advice"):
                side = f"{name}_n{count}"
                is_bounded = side == f"advice_n{max(ADVICE_TOKENS)}" and not sizes.num_gpus
                reach = REACH if is_bounded else None
                words = f"{side} over plain decoding, {where}"
                rows += ratio_rows(f"{prefix}.{side}", words, times["plain"], times[side], reach)
    return rows


def _advised(advice: Advice, edit: bool) -> Callable[[tuple[int, ...]], SamplingParams]:
    """Return greedy parameters that carry the prompt's own advice."""
    return lambda prompt: SamplingParams(temperature=0.0, advice_token_ids=advice[prompt], edit=edit)


def measure_lookup(model: Path, kinds: Mapping[str, Prompts], sizes: LookupSizes) -> list[Row]:
    """Measure LOOKUP and NGRAM by default settings, bf16, greedy; these rows have no bound.

    NGRAM learns from every request and rounds repeat their requests, so its state is dropped between rounds.
    """
    rows: list[Row] = []
    dtype = sizes.dtypes[0]
    with ExitStack() as started:
        engine = started.enter_context(started_engine(engine_config(model, dtype, LOOKUP.name, sizes.num_gpus)))
        ngram = started.enter_context(ForgetfulSide(engine_config(model, dtype, NGRAM.name, sizes.num_gpus), engine))
        sides: dict[str, Side] = {
            "plain": EngineSide(engine, False),
            "lookup": EngineSide(engine, True),
            "ngram": ngram,
        }
        for kind, prompts in kinds.items():
            for batch_size in sizes.batch_sizes:

                def ask(turn: int, prompts: Prompts = prompts, count: int = batch_size) -> Ask:
                    return Ask(rotating(prompts, turn, count), count, sizes.num_new_tokens)

                where = f"{SHORT[dtype]}, {kind} prompts, batch {batch_size}"
                times = race(f"lookup and n-grams, {where}", sizes.num_rounds, sides, ask, {"ngram": ngram.renew})
                prefix = f"lookup.{SHORT[dtype]}.{kind}.b{batch_size}"
                for name in sides:
                    rows += speed_rows(f"{prefix}.{name}", f"{name}, {where}", times[name])
                for name in ("lookup", "ngram"):
                    words = f"{name} over plain decoding, {where}"
                    rows += ratio_rows(f"{prefix}.{name}", words, times["plain"], times[name])
    return rows
