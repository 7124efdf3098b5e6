"""A scenario says how many sequences are generated at once and how long they get; its requests are drawn by seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from slime_spec.bench.prompts import Prompts, rotating
from slime_spec.types import GroupRequest, SamplingParams

LONGEST_IN_JOB = 40  # tokens of the main job's replies; a draft trained on those does worse beyond
LONGEST = 512
MEDIAN_TOKENS, SIGMA = 60, 1.0  # of a long tail's lengths, which are lognormal
Waves = list[list[GroupRequest]]  # the requests of a wave come at once, when those of the wave before have ended
Lengths = Callable[[random.Random], int]


@dataclass(frozen=True)
class Scenario:
    """Describes a repetition: ``num_waves`` times ``num_groups`` prompts at once, ``num_samples`` replies to each.

    A reply has as many tokens as ``length`` draws, or, where ``ends_itself``, at most as many. Prompts are of the tasks
    of ``suite``. ``depths`` are the fixed ones beside the automatic depth. ``untrained`` and ``trained`` are the bounds
    of the speed-up over no speculation, for a policy before and after training.
    Example: ``Scenario("8", num_groups=1, num_samples=8, length=fixed(40))`` is one group of eight.
    """

    name: str
    num_groups: int
    num_samples: int
    length: Lengths
    num_waves: int = 1
    ends_itself: bool = False
    suite: str = "arithmetic_sentences"
    depths: tuple[int, ...] = (1, 3)
    untrained: float | None = None
    trained: float | None = None

    @property
    def num_at_once(self) -> int:
        return self.num_groups * self.num_samples


def fixed(num_tokens: int) -> Lengths:
    return lambda _: num_tokens


def long_tail(uniforms: random.Random) -> int:
    """Draw a lognormal length whose median is MEDIAN_TOKENS, from 2 to LONGEST."""
    return min(LONGEST, max(2, round(uniforms.lognormvariate(math.log(MEDIAN_TOKENS), SIGMA))))


def scenarios(num_new_tokens: int) -> dict[str, Scenario]:
    """Return the scenarios by name; ``num_new_tokens`` is the most that a reply of the job's prompts may have.

    Those replies end where they end, as in the job: what a trained policy would say after its answer is no text that it
    or its draft was trained on.
    """
    most = fixed(num_new_tokens)
    found = (
        Scenario("64", 8, 8, most, ends_itself=True, untrained=0.99, trained=1.02),
        Scenario("64_tail", 64, 1, long_tail, untrained=1.08, trained=1.15),
        Scenario(
            "longtail", 8, 8, fixed(LONGEST), ends_itself=True, suite="count", depths=(), untrained=1.1, trained=1.1
        ),
        Scenario("8", 1, 8, most, num_waves=4, ends_itself=True, untrained=0.99, trained=1.05),
        Scenario("4", 1, 4, most, num_waves=4, ends_itself=True, untrained=1.3, trained=1.7),
        Scenario("1", 1, 1, most, num_waves=8, ends_itself=True, depths=(1, 3, 7), untrained=1.8, trained=3.0),
    )
    return {each.name: each for each in found}


def requests(scenario: Scenario, prompts: Prompts, seed: int, repetition: int) -> Waves:
    """Draw a repetition's requests, the same for every side; prompts go on where the repetition before ended."""
    uniforms = random.Random(f"{seed} {scenario.name} {repetition}")
    count = scenario.num_waves * scenario.num_groups
    chosen = rotating(prompts, repetition * count, count)
    made = [
        GroupRequest(
            group_id=f"{repetition}.{number}",
            prompt_token_ids=prompt,
            seeds=tuple(uniforms.randrange(1 << 31) for _ in range(scenario.num_samples)),
            params=SamplingParams(scenario.length(uniforms), temperature=1.0, ignore_eos=not scenario.ends_itself),
        )
        for number, prompt in enumerate(chosen)
    ]
    return [made[first : first + scenario.num_groups] for first in range(0, count, scenario.num_groups)]
