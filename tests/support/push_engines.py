"""An engine that only takes pushes, in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from slime_spec.errors import PushError
from slime_spec.interfaces import WeightTransport, load
from slime_spec.transports.choice import TRANSPORTS
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksum
from slime_spec.weights.messages import Manifest, PauseMode, PushMessage, PushReply, Side
from slime_spec.weights.receive import PushDesk, PushStage

SHAPES = {"a": (2, 3), "b": (4,)}
OLD = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
NEW = {name: torch.ones(shape) for name, shape in SHAPES.items()}
START_S, ANSWER_S = 60.0, 20.0


class DictStaging:
    """Keeps a tensor where the transport has it, as long as it may."""

    def __init__(self) -> None:
        self.expected = SHAPES
        self.tensors: dict[str, torch.Tensor] = {}
        self._added: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._added[name] = tensor

    def keep(self) -> None:
        self.tensors |= {name: tensor.clone() for name, tensor in self._added.items()}
        self._added.clear()

    def build(self) -> None:
        self.keep()


class Engine:
    """Takes pushes of both sides as every engine does, has two sides' weights, and knows whether it is paused."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, transport: WeightTransport | None = None, index: int = 0
    ) -> None:
        self.versions: dict[Side, int] = {"target": 0, "draft": 0}
        self.tensors: dict[Side, Mapping[str, torch.Tensor]] = {"target": OLD, "draft": OLD}
        self.paused = False
        self.heard: list[type] = []
        self._desk: PushDesk[DictStaging] = PushDesk(index, transport or InProcessTransport(), self, dtype)

    def update_weights(self, message: PushMessage) -> PushReply:
        self.heard.append(type(message))
        return self._desk.answer(message)

    def version(self, side: Side) -> int:
        return self.versions[side]

    def staging(self, manifest: Manifest) -> DictStaging:
        return DictStaging()

    def commit(self, stage: PushStage[DictStaging]) -> None:
        self.versions[stage.manifest.side] = stage.manifest.version
        self.tensors[stage.manifest.side] = stage.staging.tensors

    def checksum(self, side: Side) -> str:
        return combined_checksum((name, tensor_checksum(tensor)) for name, tensor in self.tensors[side].items())

    def pause(self, mode: PauseMode) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


def serve(connection: Connection, transport: str, index: int) -> None:
    """Run in the other process: answer every message with the reply or with what was raised."""
    torch.set_num_threads(1)
    engine = Engine(transport=load(TRANSPORTS[transport])(), index=index)
    connection.send(None)
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            connection.send(engine.update_weights(message))
        except (PushError, OSError) as error:
            connection.send(error)


class RemoteEngine:
    """An Engine in a process of its own."""

    def __init__(self, transport: str, index: int) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, transport, index), daemon=True)
        self._process.start()
        theirs.close()
        self._answer(START_S)

    def update_weights(self, message: PushMessage) -> PushReply:
        """Raises what the engine raises, and OSError or EOFError where its process is gone."""
        self._connection.send(message)
        answer = self._answer(ANSWER_S)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, PushReply)
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _answer(self, limit_s: float) -> object:
        assert self._connection.poll(limit_s), "the engine's process gave no answer"
        return self._connection.recv()


@contextmanager
def remote_engines(transport: str, count: int) -> Iterator[list[RemoteEngine]]:
    engines: list[RemoteEngine] = []
    try:
        engines.extend(RemoteEngine(transport, index) for index in range(count))
        yield engines
    finally:
        for engine in engines:
            engine.kill()


class TakesPushes(Protocol):
    """An engine in this process or in another."""

    def update_weights(self, message: PushMessage) -> PushReply: ...


# What an engine (by its index) raises at a message, if anything
Fault = Callable[[PushMessage, int], BaseException | None]


def quiet(message: PushMessage, index: int) -> None:
    return None


def to_all(
    engines: Sequence[TakesPushes], before: Fault = quiet, after: Fault = quiet
) -> Callable[[PushMessage], list[PushReply]]:
    """What a pool does: a message reaches every engine, side by side; then the first fault is raised, if there was one.

    A fault ``before`` keeps the message from its engine, a fault ``after`` only the reply from the pool.
    """

    def broadcast(message: PushMessage) -> list[PushReply]:
        faults = [before(message, index) for index in range(len(engines))]
        with ThreadPoolExecutor(len(engines)) as threads:
            calls = [
                threads.submit(engine.update_weights, message)
                for engine, fault in zip(engines, faults, strict=True)
                if fault is None
            ]
        faults = [fault or after(message, index) for index, fault in enumerate(faults)]
        for fault in filter(None, faults):
            raise fault
        return [call.result() for call in calls]

    return broadcast
