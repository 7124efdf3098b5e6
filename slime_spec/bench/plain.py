"""Compare plain decoding, without speculation, with Hugging Face ``generate`` in the same dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from slime_spec.bench.hf_generate import HfGenerate, HfSide
from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.prompts import Prompts, rotating, tokenized
from slime_spec.bench.race import Ask, EngineSide, Side, Times, race, ratio_rows, speed_rows
from slime_spec.bench.rows import BenchOptions, Row, left_out_rows
from slime_spec.bench.timing import Budget

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# Bounds of the speed over Hugging Face's on a CPU, by batch size.
REACH = {1: 1.8, 8: 2.0}


@dataclass(frozen=True)
class PlainSizes:
    """Holds the sizes that are measured."""

    num_new_tokens: int = 128
    num_rounds: int = 5
    batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def measure(options: BenchOptions) -> list[Row]:
    chat, copy = tokenized(options.model, "ordinary"), tokenized(options.model, "copy")
    mixed = tuple(prompt for pair in zip(chat, copy, strict=True) for prompt in pair)
    num_gpus = options.num_gpus or 0
    sizes = PlainSizes(
        options.num_new_tokens,
        options.num_rounds,
        options.batch_sizes or PlainSizes.batch_sizes,
        options.dtypes or PlainSizes.dtypes,
    )
    reach = {} if num_gpus else REACH
    return measure_plain(options.model, mixed, sizes, reach, num_gpus, options.seconds)


def measure_plain(
    model: Path,
    prompts: Prompts,
    sizes: PlainSizes,
    reach: Mapping[int, float],
    num_gpus: int = 0,
    seconds: float | None = None,
) -> list[Row]:
    """Measure speeds and ratios per dtype and batch size."""
    rows: list[Row] = []
    left_out: list[str] = []
    budget = Budget(seconds)
    for dtype in sizes.dtypes:
        late: list[int] = []
        sides: dict[str, Side] = {}
        with ExitStack() as started:
            for batch_size in budget.within(sizes.batch_sizes, late):
                sides = sides or started.enter_context(hf_and_engine(model, dtype, sizes.num_new_tokens, num_gpus))
                where = f"{SHORT[dtype]}, batch {batch_size}"
                times = hf_race(sides, prompts, batch_size, sizes, where)
                prefix = f"plain.{SHORT[dtype]}.b{batch_size}"
                text = f"{where}, {sizes.num_new_tokens} greedy tokens, chat and copy prompts, prefill included"
                rows += speed_rows(prefix, f"embedded engine, {text}", times["engine"])
                rows += speed_rows(f"{prefix}.hf", f"Hugging Face generate, {text}", times["hf"])
                words = f"engine over Hugging Face, {where}"
                rows += ratio_rows(prefix, words, times["hf"], times["engine"], reach.get(batch_size))
        left_out += [f"{SHORT[dtype]} batch {batch_size}" for batch_size in late]
    return [*rows, *left_out_rows("plain", left_out)]


@contextmanager
def hf_and_engine(model: Path, dtype: str, num_new_tokens: int, num_gpus: int = 0) -> Iterator[dict[str, Side]]:
    reference = HfGenerate(model, dtype, num_new_tokens, num_gpus)
    with started_engine(engine_config(model, dtype, num_gpus=num_gpus)) as engine:
        yield {"engine": EngineSide(engine, speculative=False), "hf": HfSide(reference)}


def hf_race(sides: Mapping[str, Side], prompts: Prompts, batch_size: int, sizes: PlainSizes, where: str) -> Times:
    """Race both sides on batches that begin one prompt further on every round."""

    def ask(turn: int) -> Ask:
        return Ask(rotating(prompts, turn, batch_size), batch_size, sizes.num_new_tokens)

    return race(f"engine and Hugging Face, {where}", sizes.num_rounds, sides, ask)
