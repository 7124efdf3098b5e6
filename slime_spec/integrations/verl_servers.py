"""verl's servers on SGLang, each with a tally of what passes through its tokenizer manager.

verl from v0.8.0 on makes them of the class that its registry has; ``register`` puts one there that counts.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.integrations.answers import Answer
from slime_spec.integrations.tally import Tally

SETTING = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
SERVERS = "verl.workers.rollout.sglang_rollout.async_sglang_server"
REGISTRY = "verl.workers.rollout.replica"
SGLANG = "sglang"
SERVED = "verl from f104dfafb (2026-01-19) to 1dda039b9 (2026-08-22), releases 0.7.1, 0.8.0 and 0.9.0"
REMEDY = (
    "Leave the setting out: verl runs as it is, and the acceptance that newer ones log of MTP drafts is right with "
    "SGLang's plug-in (docs/plug-in.md)."
)
REPLICAS: list[Any] = []  # of this process that count, as they are made


def register() -> None:
    """Have verl's registry make servers that count."""
    module: Any = importlib.import_module(REGISTRY)
    own = getattr(module, "_load_sglang", None)  # it prepares the import of verl's module for SGLang
    if own is None:
        raise ConfigError("VERL_USE_EXTERNAL_MODULES", f"serves {SERVED}", REGISTRY, "Leave the variable out.")
    module.RolloutReplicaRegistry.register(SGLANG, lambda: counting_replica(own()))


@cache
def counting_replica(base: Any) -> type:
    """Return a class of replicas whose servers count; a reward model's and a teacher's stay as they are."""
    module: Any = importlib.import_module(SERVERS)
    if not inspect.isclass(module.SGLangHttpServer):  # an actor's, of which Ray lets nobody make a subclass
        rule = f"serves {SERVED}, which make an actor of their servers' class; this verl's is one already"
        raise ConfigError(SETTING, rule, SERVERS, REMEDY)

    class CountingServer(module.SGLangHttpServer):
        """Is verl's server, with a tally."""

        async def launch_server(self, *args: Any, **kwargs: Any) -> None:
            self.tally = Tally()
            await super().launch_server(*args, **kwargs)
            if self.node_rank == 0:  # others launch a part of it
                self.tally.watch(self.tokenizer_manager)

        async def take_answers(self) -> list[Answer]:
            return self.tally.take()

    class CountingReplica(base):
        """Is verl's replica, of such servers."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if not (getattr(self, "is_reward_model", False) or getattr(self, "is_teacher_model", False)):
                self.server_class = module.ray.remote(CountingServer)
                REPLICAS.append(self)

    return CountingReplica
