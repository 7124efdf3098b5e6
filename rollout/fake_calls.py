"""Fake calls run fake engines in this process: for tests and benchmarks of what coordinates engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from rollout.coordinator import Call, EngineProcessDied
from rollout.fake import FakeGeneration
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest


class MakeGeneration(Protocol):
    """Makes the samples of a request on an engine whose weights have a version."""

    def __call__(self, request: GroupRequest, engine: int, version: int) -> Iterable[GeneratedSample]: ...


@dataclass(eq=False)
class FakeStream:
    """Records a call of generate."""

    engine: int
    number: int
    generation: Iterable[GeneratedSample]
    samples: Iterator[GeneratedSample] = field(init=False)
    is_aborted: bool = False

    def __post_init__(self) -> None:
        self.samples = iter(self.generation)


@dataclass(eq=False)
class FakeStart:
    """Records a call of replace."""

    engine: int


@dataclass(eq=False)
class FakeWatch:
    """Records a call of watch."""

    engine: int
    known: bool


class FakeCalls:
    """Implements EngineCalls without processes or time: each ready stream has its next sample at once.

    At most ``num_at_once`` streams are ready at a time, in turn. Streams of an engine that does not serve have nothing
    to read until they are aborted or it serves again. A dead engine is replaced ``num_replacements`` times in all, each
    time at once. ``on_wait`` is called before every wait, and may call ``set_serving`` and ``kill``.
    """

    def __init__(
        self,
        num_engines: int,
        num_at_once: int = 1,
        on_wait: Callable[[], None] = lambda: None,
        make_generation: MakeGeneration = FakeGeneration,
        num_replacements: int = 0,
    ) -> None:
        self.sent: list[tuple[int, GroupRequest]] = []
        self.shared: list[tuple[int, Mapping[int, Sequence[EarlierReply]]]] = []
        self.num_waits = 0
        self._num_at_once, self._on_wait, self._make_generation = num_at_once, on_wait, make_generation
        self._serving = [True] * num_engines
        self._dead: set[int] = set()
        self._num_replacements = num_replacements
        self._ready: dict[Call, None] = {}  # in the order of their turns
        self._held: dict[int, list[FakeStream]] = {}
        self._open: dict[tuple[int, int], FakeStream] = {}
        self._watches: dict[int, FakeWatch] = {}

    def set_serving(self, engine: int, serves: bool) -> None:
        """Have an engine lose its server, or serve again."""
        self._serving[engine] = serves
        if (watch := self._watches.get(engine)) is not None and watch.known != serves:
            self._ready[watch] = None
        if serves:
            self._ready.update(dict.fromkeys(self._held.pop(engine, ())))
            return
        held = [s for s in self._open.values() if s.engine == engine and not s.is_aborted]
        self._held[engine] = held
        for stream in held:
            self._ready.pop(stream, None)

    def kill(self, engine: int) -> None:
        """End an engine's process: whatever is read from it from now on raises EngineProcessDied."""
        self._dead.add(engine)
        self._ready.update(dict.fromkeys(stream for stream in self._open.values() if stream.engine == engine))
        if (watch := self._watches.get(engine)) is not None:
            self._ready[watch] = None

    def generate(self, engine: int, request: GroupRequest, number: int) -> Call:
        self.sent.append((engine, request))
        stream = FakeStream(engine, number, self._make_generation(request, engine, 0))
        self._open[engine, number] = stream
        if self._serving[engine] or engine in self._dead:
            self._ready[stream] = None
        else:
            self._held[engine].append(stream)
        return stream

    def abort(self, engine: int, numbers: Sequence[int]) -> None:
        for number in numbers:
            stream = self._open.get((engine, number))
            if stream is not None:
                assert isinstance(stream.generation, FakeGeneration), "only fake generations can be aborted"
                stream.is_aborted = True
                stream.generation.abort()
                self._ready[stream] = None

    def share(self, engine: int, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        self.shared.append((engine, replies))
        for number, heard in replies.items():
            stream = self._open.get((engine, number))
            if stream is not None and isinstance(stream.generation, FakeGeneration):
                stream.generation.learn(heard)

    def watch(self, engine: int, known: bool) -> Call:
        watch = self._watches[engine] = FakeWatch(engine, known)
        if engine in self._dead or self._serving[engine] != known:
            self._ready[watch] = None
        return watch

    def ready(self, calls: list[Call], timeout_s: float) -> Sequence[Call]:
        self.num_waits += 1
        self._on_wait()
        asked = set(calls)
        return list(islice((call for call in self._ready if call in asked), self._num_at_once))

    def next_sample(self, stream: Call) -> GeneratedSample | None:
        assert isinstance(stream, FakeStream), "a sample comes out of a stream"
        del self._ready[stream]
        sample = None if stream.engine in self._dead else next(stream.samples, None)
        if sample is None:
            del self._open[stream.engine, stream.number]
            self._check_alive(stream.engine)
        else:
            self._ready[stream] = None
        return sample

    def serves(self, watch: Call) -> bool:
        assert isinstance(watch, FakeWatch), "a watch is asked for what it reports"
        del self._ready[watch]
        self._check_alive(watch.engine)
        return self._serving[watch.engine]

    def replace(self, engine: int) -> Call | None:
        assert engine in self._dead, "only the dead are replaced"
        if not self._num_replacements:
            return None
        self._num_replacements -= 1
        self._forget(engine)
        start = FakeStart(engine)
        self._ready[start] = None
        return start

    def join(self, engine: int, start: Call) -> bool:
        self._ready.pop(start, None)
        self._dead.discard(engine)
        self._serving[engine] = True
        return True

    def _forget(self, engine: int) -> None:
        """Drop what was asked of a process that is no more."""
        gone = [stream for stream in self._open.values() if stream.engine == engine]
        for stream in gone:
            del self._open[engine, stream.number]
            self._ready.pop(stream, None)
        if (watch := self._watches.pop(engine, None)) is not None:
            self._ready.pop(watch, None)
        self._held.pop(engine, None)

    def _check_alive(self, engine: int) -> None:
        if engine in self._dead:
            raise EngineProcessDied(f"engine {engine} was killed")
