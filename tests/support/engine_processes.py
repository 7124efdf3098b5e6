"""Which processes the engines of a pool are."""

from __future__ import annotations

import os

import ray

from rollout.pool import EnginePool


def process_of(pool: EnginePool, engine: int) -> int:
    """The process id of an engine's actor."""
    actor = pool._members.engine(engine)
    return int(ray.get(actor.__ray_call__.remote(lambda worker: os.getpid())))
