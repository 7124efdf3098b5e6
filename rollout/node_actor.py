"""The Ray actors on the other nodes of an engine that is larger than one node: each owns the engine's process there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from slime_spec.interfaces import load
from slime_spec.ray_errors import result_of
from slime_spec.site import Node, NodeLost

# Longer than a process takes to end.
CALL_TIMEOUT_S = 60.0


class NodeWorker:
    """Holds the Node of the node that it runs on: ``node_class`` as in EngineKind, ``devices`` as in Site."""

    def __init__(self, node_class: str, devices: tuple[str, ...]) -> None:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        self._node: Node = load(node_class)(ray.util.get_node_ip_address(), visible)

    def ask(self, method: str, *arguments: object) -> Any:
        """The answer of one of the Node's methods."""
        return getattr(self._node, method)(*arguments)


class RayNode:
    """A Node whose process belongs to a NodeWorker.

    An actor that has died is started anew by Ray and asked again; its exit code says whether the process went with it.
    """

    def __init__(self, actor: ray.actor.ActorHandle) -> None:
        self._actor = actor

    def address(self) -> str:
        return str(self._ask("address"))

    def free_port(self, host: str) -> int:
        return int(self._ask("free_port", host))

    def launch(self, command: Sequence[str], log: Path) -> None:
        self._ask("launch", command, log)

    def exit_code(self) -> int | None:
        code: int | None = self._ask("exit_code")
        return code

    def tail(self) -> str:
        return str(self._ask("tail"))

    def stop(self) -> None:
        try:
            self._ask("stop")
        except NodeLost:
            return  # and its process with it

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            return result_of(self._actor.ask.remote(method, *arguments), CALL_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            raise NodeLost(f"a node of this engine does not answer: {error}") from error
