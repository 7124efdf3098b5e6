"""Plan a launch: the place and the resources of every process, and the findings of preflight."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from slime_spec.config.addresses import address_of
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.launch.preflight import Preflight
from slime_spec.placement import BundlePlan, plan_bundles
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Finding
from slime_spec.preflight.gate import not_skipped, refused
from slime_spec.preflight.gpu_memory import GpuMemory, plan_gpus
from slime_spec.preflight.host_memory import HostMemory, plan_host
from slime_spec.preflight.memory import MemoryPlan, plan_memory
from slime_spec.sglang.arguments import command_line, planned_places, server_flags
from slime_spec.sglang.interpreter import checked_in
from slime_spec.transports.choice import COLLECTIVE, IPC, OBJECT_STORE, transport_name


@dataclass(frozen=True)
class PlannedServer:
    """Describes one server process, on one node of its engine; no command if someone else started the server.

    ``PlannedServer(0, 0, "127.0.0.1:30000", ("python", "-m", "sglang.launch_server", "--model-path", ...))``
    """

    engine: int
    node: int
    address: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Holds the plan of a launch.

    ``servers`` is empty for engines without servers, and where a finding refuses their flags. There is no
    ``first_prompt`` where an input of the run is refused. ``evaluations`` says each set in words.
    """

    facts: Facts
    first_prompt: str | None
    evaluations: tuple[str, ...]
    bundles: BundlePlan
    servers: tuple[PlannedServer, ...]
    transport: str
    memory: MemoryPlan
    gpus: tuple[GpuMemory, ...]
    host: HostMemory | None
    findings: tuple[Finding, ...]

    @property
    def stopping(self) -> tuple[Finding, ...]:
        """Return the errors that would stop this launch."""
        return tuple(not_skipped(self.findings, self.facts.config.run.skip_checks))


def make_plan(looked: Preflight) -> Plan:
    """Make the plan; raises ConfigError without config.json."""
    if not looked.engines:
        looked.checked()  # raises, for there is no plan without a checkpoint's config.json
    config, facts = looked.config, looked.engines[0]
    findings = looked.findings
    servers: tuple[PlannedServer, ...] = ()
    if facts.on_sglang:
        try:
            servers = tuple(_servers(config, facts))
        except ConfigError as error:
            # An SGLang that was asked for its flags has its finding; without one the table's version has the word.
            findings = findings if facts.known_flags else (refused(error), *findings)
    memory = plan_memory(facts)
    prompts = None if looked.inputs is None else looked.inputs.prompts
    sets = () if looked.inputs is None else looked.inputs.eval_prompts
    return Plan(
        facts=facts,
        first_prompt=None if prompts is None else prompts.first_shown(),
        evaluations=tuple(each.text for each in sets),
        bundles=plan_bundles(config),
        servers=servers,
        transport=transport_text(config),
        memory=memory,
        gpus=plan_gpus(facts, memory),
        host=plan_host(config, memory, facts.target.config),
        findings=findings,
    )


def _servers(config: Config, facts: Facts) -> Iterator[PlannedServer]:
    server = config.sglang_server
    python = server.python or sys.executable
    for engine in range(config.rollout.num_engines):
        if server.external_addrs:
            yield PlannedServer(engine, 0, server.external_addrs[engine], ())
            continue
        for place in planned_places(config, engine):
            flags = server_flags(config, engine, place)
            command = command_line(python, flags, server.extra_args, facts.known_flags or checked_in())
            yield PlannedServer(engine, place.node_rank, address_of(place.host, place.port), tuple(command))


def transport_text(config: Config) -> str:
    """Describe how weights travel."""
    if config.run.mode != "train":
        return f"none: {config.run.mode} pushes no weights"
    push, to_servers = config.push, config.sglang_server.transport
    verified = "read back and compared" if push.verify else "not verified"
    text = (
        f"every {push.interval} step(s) in buckets of {push.bucket_bytes / 2**20:.0f} MiB by {_way(config)}, "
        f"{verified}; running requests: {push.pause_mode}"
    )
    if not kind_of(config).has_servers:
        return text
    ways = {
        "tensor": "tensor (CUDA IPC)" if config.rollout.num_gpus_per_engine else "tensor (shared memory)",
        "distributed": f"distributed ({'nccl' if config.rollout.num_gpus_per_engine else 'gloo'})",
        "disk": "disk",
    }
    if transport_name(config) != OBJECT_STORE:
        return f"{text}; straight to the servers, and to a server that is replaced by {ways[to_servers]}"
    return f"{text}; engine to server: {ways[to_servers]}"


def _way(config: Config) -> str:
    """Name what carries weights from the trainer to the engines."""
    on_gpu = bool(config.trainer.num_gpus)
    ways = {
        IPC: "ipc (CUDA memory)" if on_gpu else "ipc (shared memory)",
        COLLECTIVE: f"broadcast ({'nccl' if on_gpu else 'gloo'})",
        OBJECT_STORE: "Ray's object store",
    }
    return ways[transport_name(config)]
