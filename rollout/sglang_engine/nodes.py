"""SpannedServer runs an engine larger than one node: a server process on each node, all replaced together.

first node     SglangEngine ─ SpannedServer ─┬─ its own process, rank 0, which answers HTTP
other nodes                                  └─ Node ─ (the network) ─ NodeProcess ─ ranks 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rollout.sglang_engine.server import SERVER_ENVIRONMENT, ServerProcess
from slime_spec.ports import free_port
from slime_spec.site import LOST, Node, NodeLost


class NodeProcess:
    """Implements Node for a server that this process starts; an actor on another node holds one, and so do tests."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        self._address, self._environment = address, {**SERVER_ENVIRONMENT, **environment}
        self._process: ServerProcess | None = None

    def address(self) -> str:
        return self._address

    def free_port(self, host: str) -> int:
        return free_port(host)

    def launch(self, command: Sequence[str], log: Path) -> None:
        self.stop()
        self._process = ServerProcess(command, self._environment, log)
        self._process.start()

    def exit_code(self) -> int | None:
        return LOST if self._process is None else self._process.exit_code

    def tail(self) -> str:
        return "" if self._process is None else self._process.tail()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


@dataclass(frozen=True)
class Part:
    """Says what one of the other nodes runs."""

    node: Node
    command: Sequence[str]
    log: Path


class SpannedServer(ServerProcess):
    """Runs the first node's process and the other nodes' processes, which serve only together."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, others: Sequence[Part]
    ) -> None:
        super().__init__(command, environment, log)
        self._others = others
        self._ended: Part | None = None

    def start(self) -> None:
        try:
            super().start()
            for part in self._others:
                part.node.launch(part.command, part.log)
        except NodeLost:
            self.stop()
            raise

    @property
    def is_alive(self) -> bool:
        return super().is_alive and self._first_ended() is None

    @property
    def exit_code(self) -> int | None:
        own = super().exit_code
        ended = self._first_ended() if own is None else None
        return own if ended is None else _exit_code(ended.node)

    def stop(self) -> None:
        ends: list[Callable[[], None]] = [super().stop, *(part.node.stop for part in self._others)]
        with ThreadPoolExecutor(len(ends)) as pool:  # each may take a while, and none waits for another
            for ended in [pool.submit(end) for end in ends]:
                ended.result()

    def tail(self) -> str:
        """Return the log's end of the node whose process ended first, or of the first node where none has."""
        if self._ended is None:
            return super().tail()
        try:
            told = self._ended.node.tail()
        except NodeLost as error:
            told = str(error)
        return f"on {self._ended.log.name}:\n{told}\non {self.log.name}:\n{super().tail()}"

    def _first_ended(self) -> Part | None:
        if self._ended is None and super().is_alive:
            self._ended = next((part for part in self._others if _exit_code(part.node) is not None), None)
        return self._ended


def _exit_code(node: Node) -> int | None:
    try:
        return node.exit_code()
    except NodeLost:
        return LOST
