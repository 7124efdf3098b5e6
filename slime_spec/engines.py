"""An EngineKind says what a run must know of its engines before it makes an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slime_spec.interfaces import choose

if TYPE_CHECKING:
    from slime_spec.config.tree import Config


@dataclass(frozen=True)
class EngineKind:
    """Describes a kind of engine: where its parts are (``package.module:name``), and what the engine needs of the run.

    ``engine`` is the RolloutEngine's class, called with (config, engine_index, transport, site=site).
    ``shared_part``, where there is one, is called with (config, site) and makes the SharedPart of all engines, or None.
    ``node`` is the class of a Node, called with (address, environment); an engine without a Node class fits one node.

    ``has_servers`` says that the engine generates in server processes, which the settings of sglang_server describe.
    ``runs_built_decoders`` says that the engine computes itself, with the decoders that this project builds
    (``Family.is_built``). ``max_gpus`` bounds the GPUs of one engine. ``num_weight_copies`` is how many copies of the
    weights the engine keeps in Ray's object store while a push arrives. ``maps_weights`` says that the engine computes
    in the process that receives a push, which may then map the trainer's memory.

    Example: ``EngineKind("rollout.fake:FakeEngine")``
    """

    engine: str
    shared_part: str | None = None
    node: str | None = None
    has_servers: bool = False
    runs_built_decoders: bool = False
    max_gpus: int | None = None
    num_weight_copies: int = 1
    maps_weights: bool = True

    def uses_external_servers(self, config: Config) -> bool:
        """Return whether someone else starts the servers, on GPUs that this run does not reserve."""
        return self.has_servers and bool(config.sglang_server.external_addrs)

    def start_timeout_s(self, config: Config) -> float:
        """Return how long an engine may take to start: longer than its server, whose own timeout error says more."""
        return config.cluster.actor_start_timeout_s + (config.sglang_server.start_timeout_s if self.has_servers else 0)


ENGINES = {
    "embedded": EngineKind("rollout.embedded.engine:EmbeddedEngine", runs_built_decoders=True, max_gpus=1),
    "sglang": EngineKind(
        "rollout.sglang_engine.engine:SglangEngine",
        shared_part="rollout.sglang_engine.router_process:own_router",
        node="rollout.sglang_engine.nodes:NodeProcess",
        has_servers=True,
        num_weight_copies=2,  # the last push is kept for a server that must be restarted
        maps_weights=False,
    ),
    "fake": EngineKind("rollout.fake:FakeEngine"),
}


def kind_of(config: Config) -> EngineKind:
    """Return the kind of this run's engines; raises ConfigError for an unknown name."""
    return choose("rollout.engine", ENGINES, config.rollout.engine)
