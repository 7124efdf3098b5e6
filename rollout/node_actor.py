"""NodeWorker is a Ray actor on a further node of an engine, and owns the engine's process there; RayNode calls it."""

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
    """Holds a Node for the machine that the actor runs on: ``node_class`` as in EngineKind, ``devices`` as in Site."""

    def __init__(self, node_class: str, devices: tuple[str, ...]) -> None:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        self._node: Node = load(node_class)(ray.util.get_node_ip_address(), visible)

    def ask(self, method: str, *arguments: object) -> Any:
        """Call one of the Node's methods and return its answer."""
        return getattr(self._node, method)(*arguments)


class RayNode:
    """Implements Node by calls to a NodeWorker.

    Ray restarts a NodeWorker that has died and repeats the call; ``exit_code`` says whether the process died with it.
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
            return  # the process is lost with its node

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            return result_of(self._actor.ask.remote(method, *arguments), CALL_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            raise NodeLost(f"a node of this engine does not answer: {error}") from error
