"""A configuration becomes the command line of one SGLang server, checked against the flags that its version knows.

In rising precedence: what the engine itself needs, the settings of the tree, --sglang-<flag> for all engines,
sglang_server.overrides for one. What an RL run must own (the model, the address, the weights' version) cannot be
overridden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from slime_spec.algorithms import NGRAM, names
from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.folder import CheckpointFolder
from slime_spec.config.addresses import address_of
from slime_spec.config.api_key import refuse_literal_keys
from slime_spec.config.build import from_dict, to_dict
from slime_spec.config.engine import DTYPES
from slime_spec.config.schema import SGLANG
from slime_spec.config.server_checks import check_servers
from slime_spec.config.sglang_server import size_of
from slime_spec.config.speculation import check_speculation, corpus_nodes
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.errors import ConfigError
from slime_spec.placement import num_engine_nodes
from slime_spec.sglang.flags import engine_settings
from slime_spec.sglang.interpreter import InstalledSglang
from slime_spec.sglang.labels import label_suffix
from slime_spec.suggest import did_you_mean

OVERRIDES = "sglang_server.overrides"
EXTRA = "sglang_server.extra_args"
LOOPBACK = "127.0.0.1"
PLANNED_PORT = 30000  # stands for "a free one" where no port is set
OWNED = ("model_path", "host", "port", "weight_version", "nnodes", "node_rank", "dist_init_addr")


@dataclass(frozen=True)
class Place:
    """Holds a server's address, and its node among the nodes of one engine.

    ``Place("127.0.0.1", 30000)``; the second of two nodes: ``Place(host, port, 2, 1, "10.0.0.1:25000")``
    """

    host: str
    port: int
    num_nodes: int = 1
    node_rank: int = 0
    init_address: str | None = None

    @property
    def url(self) -> str:
        """Return the URL by which the same node reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{address_of(host, self.port)}"


def planned_places(config: Config, engine_index: int) -> tuple[Place, ...]:
    """Return the places of an engine's servers, one per node, as far as they are known before the engine starts."""
    settings, num_nodes = config.sglang_server, num_engine_nodes(config)
    port = (settings.port or PLANNED_PORT) + engine_index
    if num_nodes == 1:
        return (Place(settings.host or LOOPBACK, port),)
    names = [f"ENGINE{engine_index}-NODE{node}" for node in range(num_nodes)]
    return tuple(
        Place(settings.host or name, port, num_nodes, node, f"{names[0]}:PORT") for node, name in enumerate(names)
    )


def server_flags(config: Config, engine_index: int, place: Place, speculate: bool = True) -> dict[str, object]:
    """Return every flag of one server by its dest; ``speculate=False`` leaves speculation out."""
    config = config_of_engine(config, engine_index)
    overrides = config.sglang
    for dest in OWNED:
        if dest in overrides:
            raise ConfigError(f"sglang.{dest}", "belongs to the engine", overrides[dest], "Leave it out.")
    flags: dict[str, object] = {
        "model_path": config.model.hf_checkpoint,
        "host": place.host,
        "port": place.port,
        "weight_version": f"0{label_suffix(config, engine_index)}",
        "dtype": config.engine.dtype,
        "context_length": config.engine.context_length,
        "max_running_requests": config.engine.max_running_requests,
        "max_total_tokens": config.engine.max_total_tokens,
        "disable_radix_cache": config.engine.disable_radix_cache or None,
        "skip_server_warmup": True,
        "incremental_streaming_output": True,
        "enable_return_routed_experts": config.rollout.routing_replay or None,
        **_device_flags(config),
    }
    if place.num_nodes > 1:
        flags |= {"nnodes": place.num_nodes, "node_rank": place.node_rank, "dist_init_addr": place.init_address}
    if speculate:
        flags |= speculative_flags(config.speculative, config.model.hf_checkpoint)
    # An override must not bring back what speculate=False took away.
    kept = {name: value for name, value in overrides.items() if speculate or not name.startswith("speculative_")}
    return {name: value for name, value in {**flags, **kept}.items() if value is not None}


def _device_flags(config: Config) -> dict[str, object]:
    num_gpus = config.rollout.num_gpus_per_engine
    if num_gpus == 0:
        return {"device": "cpu"}
    flags: dict[str, object] = {}
    # With data parallel attention all replicas share the tensor-parallel ranks; without, each replica has its own.
    shared = bool(config.sglang.get("enable_dp_attention"))
    flags["tp_size"] = num_gpus if shared else num_gpus // size_of(config.sglang, "dp_size")
    if config.engines_leave:
        flags["enable_memory_saver"] = True
        if config.speculative.record.has_weights:
            flags["enable_draft_weights_cpu_backup"] = True
        if config.push.interval > 1:  # engines generate with the restored weights before the next push
            flags["enable_weights_cpu_backup"] = True
    return flags


def speculative_flags(config: SpeculativeConfig, target: str) -> dict[str, object]:
    """Return settings that differ from defaults, under SGLang's names; raises ConfigError for what SGLang lacks."""
    if config.record.sglang is None:
        raise ConfigError(
            "speculative.algorithm",
            f"SGLang has {', '.join(names(lambda each: each.speculates and each.sglang is not None))}",
            config.algorithm,
            f"Pass --speculative-algorithm {NGRAM.name}, which looks suffixes up too, or --rollout-engine embedded.",
        )
    if not config.record.speculates:
        return {}
    default = SpeculativeConfig()
    flags: dict[str, object] = {
        f"speculative_{field.name}": getattr(config, field.name)
        for field in fields(config)
        if f"speculative_{field.name}" in engine_settings()
        and getattr(config, field.name) != getattr(default, field.name)
    }
    if config.history and config.record.takes_corpus:  # without nodes of its own a corpus that is fed is never read
        flags["speculative_ngram_external_sam_budget"] = corpus_nodes(config)
    draft, named = locate_draft(config, target), config.draft_model_path
    # For some families (MiMo) SGLang does not default to the target's own folder.
    if draft is not None and (named is not None or _has_mtp_layer(target)):
        flags["speculative_draft_model_path"] = draft.folder
    return flags


def _has_mtp_layer(folder: str) -> bool:
    return family_of(CheckpointFolder(Path(folder)).architecture).mtp is not None


def config_of_engine(config: Config, engine_index: int) -> Config:
    """Return the configuration with the flags that ``sglang_server.overrides`` has for this engine in their places."""
    path = config.sglang_server.overrides
    if path is None:
        return config
    changed = with_flags(config, _engine_overrides(path, engine_index, config.rollout.num_engines))
    changed = replace(changed, sglang_server=replace(changed.sglang_server, overrides=None))
    refuse_literal_keys(changed)
    check_speculation(changed)
    check_servers(changed)
    return changed


def with_flags(config: Config, flags: Mapping[str, object]) -> Config:
    """Return the configuration with SGLang's flags (by their dests) in their places.

    Raises ConfigError for a bad value.
    """
    data = to_dict(config)
    if "speculative_algorithm" in flags:  # steps and draft of another algorithm do not apply
        data["speculative"] = to_dict(Config())["speculative"]
    for dest, value in flags.items():
        _place(data, dest, value)
    return from_dict(data)


def config_as_served(config: Config, flags: Mapping[str, object]) -> Config:
    """Return the settings with the numbers and switches that a running server reports in their places.

    Folders and names stay those of the configuration; the server's dtype is taken where this project has it.
    """
    data = to_dict(config)
    for dest, value in flags.items():
        setting = engine_settings().get(dest)
        if setting is not None and (setting.type is not str or (dest == "dtype" and value in DTYPES)):
            _place(data, dest, value)
    return from_dict(data)


def _place(data: dict[str, Any], dest: str, value: object) -> None:
    """Put the value of one SGLang flag where the tree has its setting."""
    setting = engine_settings().get(dest)
    node, _, name = (setting.path if setting else f"{SGLANG}.{dest}").partition(".")
    data[node][name] = value


def _engine_overrides(path: str, engine_index: int, num_engines: int) -> dict[str, object]:
    data = read_yaml_file(Path(path), "Correct the file of --sglang-config.")
    strangers = [key for key in data if not isinstance(key, int)]
    if strangers or not all(isinstance(flags, dict) for flags in data.values()):
        raise ConfigError(
            OVERRIDES, "maps engine numbers to flags", strangers, "Write {0: {mem_fraction_static: 0.7}}."
        )
    if absent := [key for key in data if not 0 <= key < num_engines]:
        raise ConfigError(
            OVERRIDES, f"numbers the engines from 0 to {num_engines - 1}", absent, "Correct the number, or drop it."
        )
    found: dict[str, object] = data.get(engine_index, {})
    return found


def command_line(python: str, flags: Mapping[str, object], extra: Sequence[str], sglang: InstalledSglang) -> list[str]:
    """Return the server's command; raises ConfigError for a flag that this version does not know."""
    words = [python, "-m", "sglang.launch_server"]
    for dest, value in flags.items():
        flag = sglang.flag(dest)
        if flag is None:
            if dest in NICE_TO_HAVE:
                continue
            hint = did_you_mean(dest, sglang.flags)
            raise ConfigError(
                f"sglang.{dest}",
                f"is no flag of SGLang {sglang.version}",
                value,
                f"{hint}Leave it out, or pass --sglang-python with another version.",
            )
        if not flag.takes_value:
            words += [_switch(flag.spellings, bool(value))] if value or _negation(flag.spellings) else []
        else:
            words += [flag.spellings[0], *_values(value)]
    return [*words, *_checked_extra(extra, sglang)]


# Flags that older versions lack and the engine can do without.
NICE_TO_HAVE = ("incremental_streaming_output", "enable_draft_weights_cpu_backup", "weight_version")


def _negation(spellings: Sequence[str]) -> str | None:
    return next((name for name in spellings if name.startswith("--no-")), None)


def _switch(spellings: Sequence[str], value: bool) -> str:
    positive = next(name for name in spellings if not name.startswith("--no-"))
    return positive if value else str(_negation(spellings))


def _values(value: object) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _checked_extra(extra: Sequence[str], sglang: InstalledSglang) -> list[str]:
    known = sglang.by_spelling()
    for word in extra:
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            raise ConfigError(
                EXTRA, f"{name} is no flag of SGLang {sglang.version}", word, f"{did_you_mean(name, known)}Correct it."
            )
    return list(extra)
