"""These checks are about the needs of a run's start: GPUs, flags that the installed SGLang knows, live servers."""

from __future__ import annotations

from slime_spec.errors import ConfigError
from slime_spec.placement import plan_bundles
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, always, on_sglang, trap
from slime_spec.sglang.arguments import command_line


@trap(
    "gpus",
    "A run that starts its own Ray has this machine and no other; one that joins a cluster (--ray-address) has the "
    "cluster's GPUs, which are not counted here.",
    "https://docs.ray.io/en/latest/ray-core/scheduling/accelerators.html",
    applies=always,
)
def gpus(facts: Facts) -> Sighting | None:
    wanted = plan_bundles(facts.config).num_gpus
    if facts.gpu_bytes is None or len(facts.gpu_bytes) >= wanted:
        return None
    return Sighting(
        Severity.ERROR,
        f"the run wants {wanted:g} GPU{'s' * (wanted != 1)} and this machine has {len(facts.gpu_bytes)}",
        "Pass --ray-address of a cluster that has them, fewer engines and ranks, or --rollout-num-gpus-per-engine 0 "
        "--actor-num-gpus 0 to run on the CPU.",
    )


@trap(
    "server-flags",
    "A server ends at once on a flag that its version does not know; flags come and go between versions.",
    "https://docs.sglang.ai/advanced_features/server_arguments.html",
    applies=on_sglang,
)
def server_flags(facts: Facts) -> Sighting | None:
    if facts.known_flags is None:
        return None
    try:
        command_line("python", facts.flags, facts.config.sglang_server.extra_args, facts.known_flags)
    except ConfigError as error:
        return Sighting(Severity.ERROR, f"{error.setting} {error.rule}", error.remedy)
    return None


@trap(
    "external-servers",
    "Servers that someone else started run with flags of their own; these checks judge what they report.",
    "https://docs.sglang.ai/advanced_features/sglang_for_rl.html",
    applies=lambda facts: facts.on_sglang,
)
def external_servers(facts: Facts) -> Sighting | None:
    if not facts.silent_servers:
        return None
    return Sighting(
        Severity.WARNING,
        f"no answer from {', '.join(facts.silent_servers)}: nothing is known of their flags",
        "Start them, or correct --rollout-external-engine-addrs and --sglang-api-key.",
    )


@trap(
    "external-flags",
    "Flags that bend no sample are the server's own business; this run's values for them have no effect.",
    "https://docs.sglang.ai/advanced_features/sglang_for_rl.html",
    applies=on_sglang,
)
def external_flags(facts: Facts) -> Sighting | None:
    told = [each.told(facts.external_url) for each in facts.differing if not each.is_decisive]
    if not told:
        return None
    return Sighting(Severity.WARNING, "; ".join(told), "Start that server with these flags, or leave them out here.")
