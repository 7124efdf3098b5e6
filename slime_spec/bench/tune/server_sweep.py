"""The sweep of servers starts a server for each setting, once, and measures it at every batch size.

    two fit the memory     off runs all along; off and the setting take turns in every repetition
    only one fits          off, setting, setting, ..., off: the second time shows how far the machine drifted

Speeds are tokens per second of whole requests, their prompts' passes included, as a rollout has them. Nobody here can
time a server's passes; what a round cost follows from the rest:

    break-even length = tokens of a round * seconds of a token with drafts / without, the prompts' passes apart

A server that dies leaves its setting out; without the server that does not speculate there is nothing to compare with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import psutil

from rollout.sglang_engine.client import ServerGone
from slime_spec.algorithms import CONTROLLED_CHAIN
from slime_spec.bench.pays.sides import drawn_order
from slime_spec.bench.sglang.servers import Server, started
from slime_spec.bench.timing import Clock, Time, tell
from slime_spec.bench.tune.results import LEAST_REPETITIONS, BatchResult, Choice, Rounds, SpeedUp, Swept
from slime_spec.bench.tune.server_settings import OFF, Judged, Setting, server_config
from slime_spec.bench.tune.server_turns import Pair, Turn, Turns, acceptance_of_server, rounds_of, take_turn, warm
from slime_spec.bench.tune.verdict import verdict_of
from slime_spec.bench.tune.workload import Workload
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.sglang.metadata import UnknownMetadataError
from slime_spec.speculation.draft_length import rate_of_length, tokens_of

HALF = 0.45  # of the memory: two servers that each take no more fit beside each other
# What an engine raises whose server did not start, died, or answered with something that is no answer.
LOST = (ConfigError, RuntimeError, ServerGone, UnknownMetadataError, psutil.NoSuchProcess)
LOG = "The end of "
Start = Callable[[Config], AbstractContextManager[Server]]


@dataclass(frozen=True)
class ServerPlan:
    """Says what is measured, and for how long: ``seconds`` are of one setting at one batch, as in Plan."""

    batch_sizes: tuple[int, ...]
    num_repetitions: int
    seconds: float
    time: Time
    assumed_lengths: tuple[float, ...] = ()


class OffLost(Exception):
    """The server without speculation was lost while it was measured."""


@dataclass(frozen=True)
class Measured:
    """Holds one setting's turns, and the pairs with those of no speculation; ``most`` as in Rounds."""

    setting: Setting
    turns: Turns
    pairs: Mapping[int, list[Pair]]
    most: int


def fit_together(config: Config) -> bool:
    """Return whether two servers fit the memory at once: each must have been told to take less than half."""
    share = config.sglang.get("mem_fraction_static")
    return isinstance(share, int | float) and share <= HALF


def sweep_servers(
    config: Config,
    judged: Judged,
    plan: ServerPlan,
    workload: Workload,
    folder: Path,
    start: Start = started,
    clock: Clock = perf_counter,
) -> Swept:
    """Measure every setting; logs go below ``folder``. Raises ConfigError where no speculation cannot be measured."""
    sweep = _Sweep(config, plan, workload, folder, start, clock)
    try:
        sweep.run(judged.settings, fit_together(config))
    except OffLost as error:
        raise ConfigError(
            "rollout.engine",
            f"the server without speculation must keep serving: {error}",
            config.rollout.engine,
            "Correct what its log names.",
        ) from error
    return _swept(sweep, judged, plan)


class _Sweep:
    """Starts servers and collects their turns; ``off`` are all turns without speculation."""

    def __init__(
        self, config: Config, plan: ServerPlan, workload: Workload, folder: Path, start: Start, clock: Clock
    ) -> None:
        self._config, self._plan, self._workload = config, plan, workload
        self._folder, self._start, self._clock = folder, start, clock
        self._num_started = 0
        self.measured: list[Measured] = []
        self.off: dict[int, list[float]] = {batch: [] for batch in plan.batch_sizes}  # tokens per second
        self.lost: dict[str, str] = {}
        self.notes: list[str] = []

    def run(self, settings: Sequence[Setting], together: bool) -> None:
        if together:
            with self._server(Setting(OFF)) as off:
                with _off_must_serve():
                    warm(off, self._workload, self._plan.batch_sizes, self._plan.num_repetitions)
                self._measure(settings, lambda setting: self._beside(setting, off))
                if not self.measured:
                    with _off_must_serve():
                        self._note_off(self._alone(off))
            return
        with self._server(Setting(OFF)) as off, _off_must_serve():
            before = self._alone(off)
        self._note_off(before)
        self._measure(settings, lambda setting: self._after(setting, before))
        if self.measured:
            self._again(before)

    def _measure(self, settings: Sequence[Setting], measure: Callable[[Setting], Measured]) -> None:
        for number, setting in enumerate(settings, start=1):
            tell(f"setting {number} of {len(settings)}: {setting.name}")
            try:
                self.measured.append(measure(setting))
            except LOST as error:
                tell(f"{setting.name} is left out: {error}")
                self.lost[setting.name] = reason_of(error)

    def _beside(self, setting: Setting, off: Server) -> Measured:
        """Let a setting's server and the running one without speculation take turns."""
        with self._server(setting) as server:
            warm(server, self._workload, self._plan.batch_sizes, self._plan.num_repetitions)
            pairs: dict[int, list[Pair]] = {}
            for batch, repetition in self._repetitions():
                turns = {}
                for name in drawn_order([setting.name, OFF.name], self._workload.seed, repetition):
                    turns[name] = (
                        self._off_turn(off, batch, repetition)
                        if name == OFF.name
                        else self._turn(server, batch, repetition)
                    )
                pairs.setdefault(batch, []).append((turns[setting.name], turns[OFF.name]))
            self._note_off({batch: [plain for _, plain in each] for batch, each in pairs.items()})
            turns_of = {batch: [drafted for drafted, _ in each] for batch, each in pairs.items()}
            return Measured(setting, turns_of, pairs, 1 + server.engine.server.info.num_steps)

    def _after(self, setting: Setting, before: Turns) -> Measured:
        with self._server(setting) as server:
            turns = self._alone(server)
            return Measured(setting, turns, _paired(turns, before), 1 + server.engine.server.info.num_steps)

    def _again(self, before: Turns) -> None:
        """Measure no speculation a second time, and count every setting against both times."""
        try:
            with self._server(Setting(OFF)) as off:
                after = self._alone(off)
        except LOST as error:
            self.notes.append(f"no speculation was measured before the settings alone: {reason_of(error)}")
            return
        self._note_off(after)
        self.measured = [
            replace(
                each, pairs={batch: [*each.pairs[batch], *more] for batch, more in _paired(each.turns, after).items()}
            )
            for each in self.measured
        ]
        drifts = {batch: _speed(after[batch]) / _speed(before[batch]) for batch in before}
        told = ", ".join(f"{ratio:.2f}x at {batch} at once" for batch, ratio in drifts.items())
        self.notes.append(
            "one server ran at a time, so settings were compared with no speculation before and after all of them; "
            f"its speed was {told} the second time. --sglang-mem-fraction-static {HALF:g} lets two take turns."
        )

    def _alone(self, server: Server) -> dict[int, list[Turn]]:
        warm(server, self._workload, self._plan.batch_sizes, self._plan.num_repetitions)
        turns: dict[int, list[Turn]] = {}
        for batch, repetition in self._repetitions():
            turns.setdefault(batch, []).append(self._turn(server, batch, repetition))
        return turns

    def _repetitions(self) -> Iterator[tuple[int, int]]:
        """Yield batch and repetition until all are done, or a batch's time is over."""
        for batch in self._plan.batch_sizes:
            start = self._clock()
            for repetition in range(self._plan.num_repetitions):
                if repetition >= LEAST_REPETITIONS and self._clock() - start >= self._plan.seconds:
                    break
                tell(f"{batch} at once: repetition {repetition + 1} of {self._plan.num_repetitions}")
                yield batch, repetition

    def _turn(self, server: Server, batch: int, repetition: int) -> Turn:
        return take_turn(server, self._workload, batch, repetition, self._plan.time, self._clock)

    def _off_turn(self, off: Server, batch: int, repetition: int) -> Turn:
        with _off_must_serve():
            return self._turn(off, batch, repetition)

    def _note_off(self, turns: Turns) -> None:
        for batch, each in turns.items():
            self.off[batch] += [turn.tokens_per_s for turn in each]

    def _server(self, setting: Setting) -> AbstractContextManager[Server]:
        self._num_started += 1
        config = replace(self._config, speculative=setting.candidate.settings)
        return self._start(server_config(config, self._folder / str(self._num_started), max(self._plan.batch_sizes)))


@contextmanager
def _off_must_serve() -> Iterator[None]:
    try:
        yield
    except LOST as error:
        raise OffLost(reason_of(error)) from error


def _paired(turns: Turns, off: Turns) -> dict[int, list[Pair]]:
    """Return each repetition with the same one without speculation; a time that was over may have cut either short."""
    return {batch: list(zip(each, off[batch], strict=False)) for batch, each in turns.items()}


def _speed(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.tokens_per_s for turn in turns)


def _swept(sweep: _Sweep, judged: Judged, plan: ServerPlan) -> Swept:
    acceptance = tuple(acceptance_of_server(each.setting.candidate, each.turns) for each in sweep.measured)
    batches = tuple(_batch_result(sweep, plan, batch) for batch in plan.batch_sizes)
    networks = [each for each in sweep.measured if each.setting.candidate.has_network]
    first = batches[0].speed_ups
    best = max(networks, key=lambda each: first[each.setting.name].median, default=None)
    notes = [*judged.warnings, *sweep.notes]
    sides = [verdict_of(each).side for each in batches]
    if None in sides:  # and where it pays at others, who could keep a server from drafting
        notes += dict.fromkeys(judged.by_batch[name] for name in filter(None, sides) if name in judged.by_batch)
    if plan.assumed_lengths and not any(each.assumed for each in batches):
        notes.append("what an assumed accept length would bring is not known: no server counted its rounds")
    return Swept(
        acceptance=acceptance,
        batches=batches,
        assumed_at=f"the measured cost of rounds of {'these drafts' if networks else 'n-grams'}",
        notes=tuple(notes),
        left_out={**judged.left_out, **sweep.lost},
        best=None if best is None else best.setting.candidate,
    )


def _batch_result(sweep: _Sweep, plan: ServerPlan, batch: int) -> BatchResult:
    pairs = {each.setting.name: each.pairs[batch] for each in sweep.measured}
    ratios = {
        name: SpeedUp(tuple(drafted.tokens_per_s / plain.tokens_per_s for drafted, plain in each))
        for name, each in pairs.items()
    }
    rounds = {each.setting.name: rounds_of(each.pairs[batch], each.most) for each in sweep.measured}
    settings = {each.setting.name: each.setting for each in sweep.measured}
    assumed = tuple(assumed_of(length, settings, rounds) for length in plan.assumed_lengths)
    return BatchResult(
        batch,
        statistics.median(sweep.off[batch]),
        {name: Choice(setting.candidate.flags()) for name, setting in settings.items()},
        ratios,
        {},
        None,
        tuple(each for each in assumed if each is not None),
        rounds,
    )


def assumed_of(
    length: float, settings: Mapping[str, Setting], rounds: Mapping[str, Rounds]
) -> tuple[float, int, float] | None:
    """Return (length, best measured draft length, speed-up) of a draft whose chains of seven bring ``length`` tokens.

    The rate is the same at every position. Costs are those of the chains of networks, of n-grams where no network was
    measured; None where none is known. 0 drafts stand for none.
    """
    costs: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for name, each in rounds.items():
        setting = settings[name]
        if each.break_even is not None and setting.is_chain:
            of_kind = costs[setting.candidate.has_network]
            of_kind[each.most - 1] = min(each.break_even, of_kind.get(each.most - 1, each.break_even))
    known = costs[True] or costs[False]
    if not known:
        return None
    deepest = CONTROLLED_CHAIN[0]
    rate = rate_of_length(length, deepest)
    gains = {depth: tokens_of([rate] * depth, depth) / cost for depth, cost in known.items()}
    depth, gain = max([(0, 1.0), *gains.items()], key=lambda each: each[1])
    return length, depth, gain


def reason_of(error: Exception) -> str:
    """Return in one line why a server was lost; of its log the last line stays."""
    text = error.rule if isinstance(error, ConfigError) else str(error)
    told, _, log = text.partition(LOG)
    last = [f"Its log ends: {line.strip()}" for line in log.splitlines()[-1:]]
    return " ".join([*told.split(), *last])
