"""The whole plan of a launch: who runs where with what, and what preflight says of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.sglang_engine.arguments import Place, command_line, server_flags
from rollout.sglang_engine.installed import checked_in, installed_in
from slime_spec.config.tree import Config
from slime_spec.launch.doctor.facts import Facts, gather
from slime_spec.launch.doctor.finding import Finding, Severity
from slime_spec.launch.doctor.preflight import check_skipped, examine
from slime_spec.launch.dry_run.memory import MemoryPlan, plan_memory
from slime_spec.placement import BundlePlan, plan_bundles

FIRST_PORT = 30000  # stands for "a free one" where no port is set


@dataclass(frozen=True)
class Plan:
    """``servers`` are command lines (or addresses), one an engine; none for engines that are no servers."""

    facts: Facts
    bundles: BundlePlan
    servers: tuple[str, ...]
    transport: str
    memory: MemoryPlan
    findings: tuple[Finding, ...]

    @property
    def stopping(self) -> tuple[Finding, ...]:
        """The errors that would stop this launch: preflight's gate is before servers only."""
        skipped = self.facts.config.run.skip_checks
        return tuple(each for each in self.findings if each.severity is Severity.ERROR and each.id not in skipped)


def make_plan(config: Config, argv: Sequence[str]) -> Plan:
    """Raises ConfigError for a checkpoint without config.json, or a server flag that the version does not know."""
    check_skipped(config.run.skip_checks)
    facts = gather(config, argv)
    return Plan(
        facts=facts,
        bundles=plan_bundles(config),
        servers=tuple(_servers(facts)) if facts.on_sglang else (),
        transport=transport_text(config),
        memory=plan_memory(facts),
        findings=tuple(examine(facts)),
    )


def _servers(facts: Facts) -> list[str]:
    config = facts.config
    server = config.sglang_server
    if server.external_addrs:
        return [f"(started by someone else) {address}" for address in server.external_addrs]
    python = server.python or sys.executable
    sglang = installed_in(python) if facts.release.is_installed else checked_in()
    commands = []
    for engine in range(config.rollout.num_engines):
        place = Place(server.host, (server.port or FIRST_PORT) + engine)
        commands.append(
            shlex.join(command_line(python, server_flags(config, engine, place), server.extra_args, sglang))
        )
    return commands


def transport_text(config: Config) -> str:
    """How weights travel, in words."""
    if config.run.mode != "train":
        return f"none: {config.run.mode} pushes no weights"
    push, to_servers = config.push, config.sglang_server.transport
    verified = "read back and compared" if push.verify else "not verified"
    text = (
        f"every {push.interval} step(s) in buckets of {push.bucket_bytes / 2**20:.0f} MiB by {push.transport}, "
        f"{verified}; running requests: {push.pause_mode}"
    )
    if config.rollout.engine != "sglang":
        return text
    ways = {
        "tensor": "tensor (CUDA IPC)" if config.rollout.num_gpus_per_engine else "tensor (shared memory)",
        "distributed": f"distributed ({'nccl' if config.rollout.num_gpus_per_engine else 'gloo'})",
        "disk": "disk",
    }
    return f"{text}; engine to server: {ways[to_servers]}"
