"""All routes of one server share this state: the engine, its control thread, version names and totals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.http.generations import Generations
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.metrics.alarm import AcceptanceAlarm
from slime_spec.preflight.requests import RequestLimits
from slime_spec.types import GeneratedSample

T = TypeVar("T")
FIRST = "default"  # SGLang's name of the weights a server starts with


class OneThread:
    """Runs commands in the order in which they came; a command that has started ends, also when its client leaves."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, command: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, command)

    def close(self) -> None:
        self._executor.shutdown()


class VersionNames:
    """Names every version of the weights that this server has served; a push made past the server goes by its number.

    ``version_in_use`` asks the engine.
    """

    def __init__(self, version_in_use: Callable[[], int]) -> None:
        self._version_in_use = version_in_use
        self._names = {0: FIRST}

    def current(self) -> str:
        return self.name(self._version_in_use())

    def name(self, version: int) -> str:
        return self._names.get(version, str(version))

    def give(self, version: int, name: str) -> None:
        self._names[version] = name

    def spans(self, sample: GeneratedSample) -> list[dict[str, object]]:
        """Return SGLang's ``weight_versions``: [{"version", "start", "end"}] over the response's tokens."""
        starts = sample.version_spans or ((0, sample.weight_version),)
        ends = [*(start for start, _ in starts[1:]), len(sample.token_ids)]
        return [
            {"version": self.name(version), "start": start, "end": end}
            for (start, version), end in zip(starts, ends, strict=True)
        ]


class Totals:
    """Sums the counters of every answered sample since the server started; ``alarm`` and watchers see every sample."""

    def __init__(self, alarm: AcceptanceAlarm | None = None) -> None:
        self._alarm = alarm
        self.watchers: list[Callable[[GeneratedSample], None]] = []
        self.num_samples = self.num_tokens = self.num_rounds = self.num_correct = self.num_proposed = 0
        self.num_prompt_tokens = self.num_cached_tokens = self.num_aborted = 0

    def count(self, sample: GeneratedSample) -> None:
        self.num_samples += 1
        self.num_tokens += len(sample.token_ids)
        self.num_rounds += sample.spec.num_rounds
        self.num_correct += sample.spec.num_correct
        self.num_proposed += sample.spec.num_proposed
        self.num_prompt_tokens += sample.num_prompt_tokens
        self.num_cached_tokens += sample.cached_tokens
        self.num_aborted += sample.finish_reason == "abort"
        for watch in self.watchers:
            watch(sample)
        if self._alarm is not None:
            spec, when = sample.spec, f"samples={self.num_samples}"
            num_rounds = spec.num_rounds - spec.num_empty_rounds
            self._alarm.see(num_rounds, spec.num_correct, when, spec.num_nonfinite_rounds)

    @property
    def mean_accept_length(self) -> float | None:
        """Return the mean number of tokens that a round emits, bonus token included; None before the first round."""
        return 1 + self.num_correct / self.num_rounds if self.num_rounds else None

    @property
    def accept_rate(self) -> float | None:
        """Return the share of proposed drafts that were accepted; None before the first round."""
        return self.num_correct / self.num_proposed if self.num_proposed else None


@dataclass(frozen=True)
class Serving:
    """Holds one started engine, its settings and its helpers.

    ``model_name`` is what clients see. ``control`` is the one thread from which the engine takes all but generate;
    ``reading`` tokenises large texts.
    """

    config: Config
    model_name: str
    spec: ModelSpec
    limits: RequestLimits
    tokenizer: Tokenizer
    engine: EmbeddedEngine
    generations: Generations
    control: OneThread
    reading: OneThread
    names: VersionNames
    totals: Totals
