"""A Site says where an engine is in the cluster; a Node runs processes on another node of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# A process whose owner is gone is reported as killed by the system: 128 + SIGKILL.
LOST = 137


class NodeLost(RuntimeError):
    """A node of an engine does not answer."""


class Node(Protocol):
    """Runs a process on another node of an engine. Any call raises NodeLost where the node is gone."""

    def address(self) -> str:
        """Return the address at which this node's ports are reached."""

    def free_port(self, host: str) -> int: ...

    def launch(self, command: Sequence[str], log: Path) -> None:
        """Start the process, its output in a log of that node; a process that still runs is ended first."""

    def exit_code(self) -> int | None:
        """Return None while the process runs; LOST where its owner has been restarted without it."""

    def tail(self) -> str:
        """Return the last lines of the log."""

    def stop(self) -> None:
        """End the process; no error where the process or the node has ended."""


@dataclass(frozen=True)
class Site:
    """Says where an engine is: its first node's address, its other nodes, how many nodes the cluster has.

    ``devices`` are the GPUs of the first node as CUDA_VISIBLE_DEVICES names them; empty: all that this process sees.
    ``run`` names the run among all runs, those before it too; empty where the engine is all there is of the run.

    Example: ``Site("10.0.0.1", num_cluster_nodes=2, others=(node,))``
    """

    address: str = "127.0.0.1"
    num_cluster_nodes: int = 1
    others: Sequence[Node] = ()
    devices: tuple[str, ...] = ()
    run: str = ""


HERE = Site()  # one node that nobody else uses
