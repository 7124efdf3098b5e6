"""Measure tokens per second of a server with and a server without speculation, in turn on the same prompts.

Prompts are held-out questions of the shipped draft's task; replies end where the model ends them. Cached prefixes
are dropped before every turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from slime_spec.algorithms import NONE
from slime_spec.bench.prompts import Prompts, in_domain, rotating
from slime_spec.bench.race import (
    Ask,
    PrefillSide,
    Side,
    Times,
    decode_speed_up,
    race,
    ratio_rows,
    speed_rows,
)
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.sglang.servers import Server, ServerSide, started
from slime_spec.bench.sglang.settings import drafting, engine_settings, num_gpus, place
from slime_spec.bench.timing import Time
from slime_spec.checkpoints.end_of_text import end_token_ids

LEAST_PROMPTS = 4  # a round of fewer prompts is too noisy
STAND_IN = " with a stand-in's kernels: no speed of SGLang's"


def measure(options: BenchOptions) -> list[Row]:
    most = max(*options.batch_sizes, LEAST_PROMPTS)
    prompts = in_domain(options.model, most + options.num_rounds * LEAST_PROMPTS, options.seeds[0])
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        plain = engine_settings(options, NONE.name, prompts, most, Path(log) / "plain")
        speculating = engine_settings(options, drafting(options), prompts, most, Path(log) / "speculating")
        with started(plain) as one, started(speculating) as other:
            return [
                row
                for batch_size in options.batch_sizes
                for row in _rows(options, prompts, batch_size, {"plain": one, "speculating": other})
            ]


def _rows(options: BenchOptions, prompts: Prompts, batch_size: int, servers: Mapping[str, Server]) -> list[Row]:
    stops = tuple(end_token_ids(options.model))
    count = max(batch_size, LEAST_PROMPTS)

    def ask(turn: int) -> Ask:
        return Ask(rotating(prompts, turn * LEAST_PROMPTS, count), batch_size, options.num_new_tokens, stops)

    sides: dict[str, Side] = {name: ServerSide(server, name != "plain") for name, server in servers.items()}
    before = {name: server.forget for name, server in servers.items()}
    everyone = {**sides, "prefill": PrefillSide(sides["plain"])}
    times = race(
        f"SGLang, batch {batch_size}", options.num_rounds, everyone, ask, {**before, "prefill": before["plain"]}
    )
    return speed_comparison(options, batch_size, times)


def speed_comparison(options: BenchOptions, batch_size: int, times: Times) -> list[Row]:
    """Return both speeds, and their ratio with and without the prompts' pass; on a CPU per CPU second too."""
    prefix, algorithm = f"speed.b{batch_size}", drafting(options)
    where = f"{options.dtype}, batch {batch_size}, on {place(options)}" + ("" if num_gpus(options) else STAND_IN)
    rows: list[Row] = []
    for name, words in (("plain", "SGLang without speculation"), ("speculating", f"SGLang with {algorithm}")):
        rows += speed_rows(f"{prefix}.{name}", f"{words}, {where}", times[name])
    words = f"{algorithm} over none, batch {batch_size}, prefill"
    rows += ratio_rows(prefix, f"{words} included", times["plain"], times["speculating"])
    clocks: list[tuple[str, Time, str]] = [("decode_ratio", "seconds", "by the clock")]
    if num_gpus(options):
        rows = [row for row in rows if "cpu" not in row.id]  # a CPU thread that waits for a GPU is busy
    else:
        clocks.append(("decode_cpu_ratio", "cpu_s", "per CPU second"))
    for id, time, by in clocks:
        what = f"{words} apart, {by}, median of {options.num_rounds} interleaved rounds"
        ratio = decode_speed_up(times["plain"], times["speculating"], times["prefill"], time)
        rows.append(Row(f"{prefix}.{id}", what, ratio, "x"))
    return rows
