"""verl's registry of replicas (verl/workers/rollout/replica.py, 1dda039b9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class RolloutReplicaRegistry:
    _registry: ClassVar[dict[str, Callable[[], Any]]] = {}

    @classmethod
    def register(cls, name: str, loader: Callable[[], Any]) -> None:
        cls._registry[name] = loader

    @classmethod
    def get(cls, name: str) -> Any:
        return cls._registry[name]()


def _load_sglang() -> Any:
    from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangReplica

    return SGLangReplica


RolloutReplicaRegistry.register("sglang", _load_sglang)
