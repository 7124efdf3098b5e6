"""Compare temperatures of sampled drafts under every rule that judges them: the draft's own, and the one chosen online.

Every side has an engine's core of its own in this process, generates the same prompts with the same seeds, and drafts
the same chain in every round. The chosen temperature is what the warm-up, which is left out, has led to.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import process_time

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.tempering import Tempering
from slime_spec.bench.drafts import Shape, eagle3_config
from slime_spec.bench.eagle3 import ON_CPU, SAMPLED_SHAPE, VERIFICATIONS
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.timing import Timed, interleaved
from slime_spec.speculation.counters import pooled
from slime_spec.speculation.draft_temperature import OWN, TEMPERATURES, DraftTemperature
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams, SpecCounters

NUM_PROMPTS = 48
LIKELIEST, CHOSEN = "likeliest", "chosen"
SAMPLED_RULES = (ON_CPU, "rejection", "block")
WORDS = {LIKELIEST: "the draft's likeliest tokens", "own": "the draft's own distribution", CHOSEN: "chosen online"}


@dataclass(frozen=True)
class TemperatureSizes:
    """Holds the sizes that are measured: rounds over all prompts, tokens of a reply at most, requests' temperatures."""

    num_rounds: int = 2
    longest: int = 40
    temperatures: tuple[float, ...] = (1.0, 0.3)
    batch_size: int = 8
    shape: Shape = SAMPLED_SHAPE
    dtype: str = "bfloat16"


def measure(options: BenchOptions) -> list[Row]:
    sizes = TemperatureSizes(options.num_rounds)
    if options.dtypes:
        sizes = TemperatureSizes(options.num_rounds, dtype=options.dtypes[0])
    count = min(NUM_PROMPTS, options.num_prompts)
    return measure_temperatures(options, in_domain(options.model, count, options.seeds[0]), sizes)


def measure_temperatures(options: BenchOptions, prompts: Prompts, sizes: TemperatureSizes) -> list[Row]:
    """Measure every rule at every temperature of the requests; what a core has learned at one it keeps at the next."""
    rows: list[Row] = []
    cores = {"target_only.likeliest": _core(options, sizes, "target_only", ())}
    for rule in SAMPLED_RULES:
        cores[f"{rule}.own"] = _core(options, sizes, rule, (OWN,))
        cores[f"{rule}.{CHOSEN}"] = _core(options, sizes, rule, TEMPERATURES)
    for temperature in sizes.temperatures:
        params = SamplingParams(sizes.longest, temperature=temperature)
        sides = {name: partial(_generate, core, prompts, params) for name, core in cores.items()}
        times = interleaved(f"draft temperatures, T = {temperature:g}", sizes.num_rounds, sides)
        for name, core in cores.items():
            rows += _rows(name, temperature, sizes, times[name], core.speculation.draft_temperature)
        rows += _gains(temperature, times)
    return rows


def _core(options: BenchOptions, sizes: TemperatureSizes, rule: str, choices: tuple[float, ...]) -> GenerationCore:
    config = eagle3_config(options, sizes.dtype, sizes.shape, **VERIFICATIONS[rule])
    config = replace(config, engine=replace(config.engine, max_running_requests=sizes.batch_size))
    core = Assembly(config).core(0, process_time)
    if choices:
        core.speculation.tempering = Tempering(DraftTemperature(choices))
    return core


def _generate(
    core: GenerationCore, prompts: Prompts, params: SamplingParams, round_number: int
) -> list[GeneratedSample]:
    samples: list[GeneratedSample] = []
    for number, prompt in enumerate(prompts):
        core.add(GroupRequest(str(number), prompt, (1000 * round_number + number,), params), samples.append)
    while core.has_work:
        core.step()
    return samples


def first_accepted(spec: SpecCounters) -> float:
    """Return the share of drafts whose first token stood."""
    return sum(spec.histogram[1:]) / max(1, spec.num_rounds - spec.num_empty_rounds)


def _rows(
    name: str,
    temperature: float,
    sizes: TemperatureSizes,
    times: Sequence[Timed[list[GeneratedSample]]],
    chosen: float | None,
) -> list[Row]:
    rule, drawn = name.split(".")
    spec = pooled(sample.spec for each in times for sample in each.result)
    prefix = f"draft_temperature.t{temperature:g}.{name}"
    what = f"{rule}, {WORDS[drawn]}, {SHORT[sizes.dtype]}, temperature {temperature:g}, {sizes.shape.name}"
    rows = [
        Row(f"{prefix}.first_accepted", f"first drafts that stood, {what}", first_accepted(spec), "share"),
        Row(f"{prefix}.tokens_a_round", what, 1.0 + spec.num_correct / max(1, spec.num_rounds), "tokens"),
        Row(f"{prefix}.tokens_per_cpu_s", f"{what}, prefill included", _per_cpu_s(times), "tokens/s"),
    ]
    if drawn == CHOSEN and chosen is not None:
        rows.append(Row(f"{prefix}.temperature", f"draft temperature at the end, {what}", chosen, "x"))
    return rows


def _gains(temperature: float, times: Mapping[str, Sequence[Timed[list[GeneratedSample]]]]) -> list[Row]:
    """Return each rule's speed with the chosen temperature over that with the draft's own."""
    return [
        Row(
            f"draft_temperature.t{temperature:g}.{rule}.gain",
            f"tokens per CPU second, {WORDS[CHOSEN]} over {WORDS['own']}, {rule}, temperature {temperature:g}",
            _per_cpu_s(times[f"{rule}.{CHOSEN}"]) / _per_cpu_s(times[f"{rule}.own"]),
            "x",
        )
        for rule in SAMPLED_RULES
    ]


def _per_cpu_s(times: Sequence[Timed[list[GeneratedSample]]]) -> float:
    return statistics.median(sum(len(each.token_ids) for each in one.result) / one.cpu_s for one in times)
