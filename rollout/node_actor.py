"""The Ray actors on the other nodes of an engine that is larger than one: each owns the server process there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from rollout.sglang_engine.launcher import SERVER_ENVIRONMENT
from rollout.sglang_engine.nodes import NodeLost, NodeProcess

# Longer than a server takes to end.
CALL_TIMEOUT_S = 60.0


class NodeWorker(NodeProcess):
    """A NodeProcess of the node that it runs on; ``devices`` as in Site."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        super().__init__(ray.util.get_node_ip_address(), {**SERVER_ENVIRONMENT, **visible})


class RayNode:
    """A Node whose process belongs to a NodeWorker.

    An actor that has died is started anew by Ray and asked again; whether its process went with it, it tells.
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
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=CALL_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            raise NodeLost(f"a node of this engine does not answer: {error}") from error
