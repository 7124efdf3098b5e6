"""Each side is an engine's core in this process; all sides do a repetition's work in an order drawn by seed.

Nothing but the core computes, so this process's CPU time is the core's, and the core's own clock is the same one. An
engine starts and times its passes before the first repetition, off the clock, as it does before a run's first request.

One side knows what will be said: its drafts are the replies of the side without speculation. They cost nothing and are
right but where replies of a group part, so that what it gains over none is more than drafts as deep bring.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import process_time
from typing import Any

from rollout.embedded.assemble import Assembly, share_target
from rollout.embedded.calibrate import calibrate
from rollout.embedded.core import GenerationCore
from slime_spec.algorithms import EAGLE3, HISTORY, NONE
from slime_spec.bench.eagle3 import ON_CPU, VERIFICATIONS
from slime_spec.bench.local_engine import engine_config
from slime_spec.bench.pays.scenarios import Scenario, Waves, requests
from slime_spec.bench.prompts import Prompts
from slime_spec.bench.rows import BenchOptions
from slime_spec.bench.timing import Clock, Timed, tell, timed
from slime_spec.config.tree import Config, EngineConfig
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest

OFF, AUTO, FROM_HISTORY, PERFECT = "off", "auto", "history", "perfect"
AUTOMATIC = (AUTO, FROM_HISTORY)
KV_CACHE_GB = 2.0  # the long tail's 64 sequences


@dataclass(frozen=True)
class Result:
    """Holds a side's samples of one repetition, and what its engine says that speculation gained in it."""

    samples: tuple[GeneratedSample, ...]
    benefit: NetBenefit

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def replies(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """Return each sample's tokens by its group and index."""
        return {(sample.group_id, sample.sample_index): sample.token_ids for sample in self.samples}


Times = Mapping[str, Sequence[Timed[Result]]]


def fixed_name(depth: int) -> str:
    return f"depth{depth}"


def side_configs(options: BenchOptions, model_path: str, depths: Sequence[int]) -> dict[str, Config]:
    """Return the configurations of all sides, by name: a user's, without the numbers of a draft where automatic."""
    plain = engine_config(options.model, options.dtype)
    shipped = EngineConfig(dtype=options.dtype)  # what its probes cost counts, and what prompts have in common does not
    engine = replace(shipped, kv_cache_gb=KV_CACHE_GB)
    # Of every side: races draw other tokens for a seed than inverse CDFs.
    plain = replace(plain, speculative=replace(plain.speculative, use_gumbel_coupling=options.rule == ON_CPU))
    plain = replace(plain, model=replace(plain.model, hf_checkpoint=model_path), engine=engine)

    def speculating(algorithm: str, **settings: Any) -> Config:
        return replace(plain, speculative=replace(plain.speculative, algorithm=algorithm, **settings))

    eagle3 = partial(speculating, EAGLE3.name, draft_model_path=options.draft, **VERIFICATIONS[options.rule])
    return {
        OFF: speculating(NONE.name),
        AUTO: eagle3(),
        **{fixed_name(each): eagle3(num_steps=each, eagle_topk=1, num_draft_tokens=each + 1) for each in depths},
        FROM_HISTORY: speculating(HISTORY.name),
        PERFECT: speculating(HISTORY.name),
    }


def started_cores(configs: Mapping[str, Config], clock: Clock = process_time) -> dict[str, GenerationCore]:
    """Load the cores of engines with one target, and let them time their passes."""
    cores: dict[str, GenerationCore] = {}
    for name, config in configs.items():
        core = Assembly(config).core(0, clock)
        share_target(core, next(iter(cores.values()), core))
        calibrate(core)
        cores[name] = core
    return cores


def generate(core: GenerationCore, waves: Waves) -> Result:
    """Generate the waves one after another."""
    samples: list[GeneratedSample] = []
    before = core.speculation.benefit
    for wave in waves:
        for request in wave:
            core.add(request, samples.append)
        while core.has_work:
            core.step()
    return Result(tuple(samples), core.speculation.benefit.since(before))


def repeat(
    scenario: Scenario, cores: Mapping[str, GenerationCore], prompts: Prompts, seed: int, num_repetitions: int
) -> Times:
    """Time every side once a repetition, prefill included; repetition 0 warms up and is left out of the result."""
    times: dict[str, list[Timed[Result]]] = {name: [] for name in cores}
    for repetition in range(num_repetitions + 1):
        tell(f"{scenario.name} at once: {f'repetition {repetition} of {num_repetitions}' if repetition else 'warm-up'}")
        gc.collect()  # not while a side is timed
        plain: Result | None = None
        for name in drawn_order(list(cores), seed, repetition):
            waves = requests(scenario, prompts, seed, repetition)
            if name == PERFECT:
                assert plain is not None, "it comes last"
                waves = knowing(waves, plain)
            one = timed(partial(generate, cores[name], waves))
            plain = one.result if name == OFF else plain
            if repetition:
                times[name].append(one)
    return times


def knowing(waves: Waves, plain: Result) -> Waves:
    """Return the requests with their own replies, as if a sample of each group had ended with it before."""
    replies = plain.replies

    def told(request: GroupRequest) -> GroupRequest:
        numbers = range(len(request.seeds))
        own = (EarlierReply(replies[request.group_id, number], 0, number) for number in numbers)
        return replace(request, earlier=tuple(own))

    return [[told(request) for request in wave] for wave in waves]


def drawn_order(names: Sequence[str], seed: int, repetition: int) -> list[str]:
    """Return the order in which the sides take their turns in a repetition; what knows the replies comes last."""
    drawn = random.Random(f"{seed} order {repetition}").sample(names, len(names))
    return sorted(drawn, key=PERFECT.__eq__)
