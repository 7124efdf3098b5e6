"""Where an engine is in the cluster, and how it runs processes on its other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# A process whose owner has gone is reported as one that the system killed: 128 + SIGKILL.
LOST = 137


class NodeLost(RuntimeError):
    """A node of an engine does not answer."""


class Node(Protocol):
    """Another node of an engine, and the process there. Any call raises NodeLost where the node is gone."""

    def address(self) -> str:
        """Where this node's ports are reached."""

    def free_port(self, host: str) -> int: ...

    def launch(self, command: Sequence[str], log: Path) -> None:
        """Start the process, its output in a log of that node; one that still runs ends first."""

    def exit_code(self) -> int | None:
        """None while the process runs; LOST where its owner has been started anew without it."""

    def tail(self) -> str:
        """The last lines of the log."""

    def stop(self) -> None:
        """End the process; no error where it has ended, or the node has."""


@dataclass(frozen=True)
class Site:
    """Where an engine is: its first node's address, its other nodes, how many the cluster has.

    ``devices`` are the GPUs of the first node as CUDA_VISIBLE_DEVICES names them; empty: those this process sees.

    Example: ``Site("10.0.0.1", num_cluster_nodes=2, others=(node,))``
    """

    address: str = "127.0.0.1"
    num_cluster_nodes: int = 1
    others: Sequence[Node] = ()
    devices: tuple[str, ...] = ()


HERE = Site()  # one node that nobody else uses
