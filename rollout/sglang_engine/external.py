"""These checks show whether an external server serves the model and the speculation of this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.sglang_engine.client import ServerRefused, SglangClient
from slime_spec.algorithms import NONE, reported_as
from slime_spec.checkpoints.folder import CONFIG, CheckpointFolder
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.config.server_checks import ADDRESSES
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.sglang.labels import label_suffix, version_number


async def use_server(client: SglangClient, config: Config, engine_index: int, target: TargetFiles) -> None:
    """Check the external server, and label its weights where a router needs labels; raises ConfigError."""
    if not await client.is_healthy(config.sglang_server.start_timeout_s):
        raise ConfigError(ADDRESSES, "must answer", client.url, "Start it, or correct the address.")
    try:
        model_info, server_info = await client.get("/model_info"), await client.get("/server_info")
    except ServerRefused as error:
        raise ConfigError(
            ADDRESSES,
            f"must say what it serves: {error}",
            client.url,
            "Give its --api-key in the file of --sglang-api-key-file.",
        ) from None
    check_served(client.url, config, target, model_info, server_info)
    suffix = label_suffix(config, engine_index)
    if not suffix:
        return
    label = f"{version_number(model_info.get('weight_version'))}{suffix}"
    try:
        await client.post("/update_weight_version", {"new_version": label, "abort_all_requests": False})
    except ServerRefused as error:
        raise ConfigError(
            "sglang_server.router",
            f"needs servers that can be told what to call their weights: {error}",
            client.url,
            "Drop the router, or use a newer SGLang.",
        ) from None


def check_served(
    url: str, config: Config, target: TargetFiles, model_info: Mapping[str, Any], server_info: Mapping[str, Any]
) -> None:
    """Raise ConfigError where the server reports another model, or another speculative algorithm.

    The server's answers name the architecture (newer versions) and the model's folder; the vocabulary and the number of
    layers are read in that folder, where this machine has it.
    """
    ours: dict[str, object] = {
        "architecture": target.architecture,
        "vocab_size": target.vocab_size,
        "num_hidden_layers": target.num_layers,
    }
    theirs = _told(model_info)
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            raise ConfigError(
                ADDRESSES,
                f"must serve the model of --hf-checkpoint, and {url} has {name} {theirs[name]} where that has {value}",
                model_info.get("model_path"),
                f"Start that server with --model-path {config.model.hf_checkpoint}, or name another.",
            )
    if "speculative_algorithm" in server_info:
        algorithm = config.speculative.algorithm
        told = server_info["speculative_algorithm"] or NONE.name
        if reported_as(told) != reported_as(algorithm):
            raise ConfigError(
                "speculative.algorithm",
                f"must be what the server speculates with: {url} was started with {told}",
                algorithm,
                f"Pass --speculative-algorithm {told}, or start that server with {algorithm}.",
            )


def _told(model_info: Mapping[str, Any]) -> dict[str, object]:
    told: dict[str, object] = {}
    folder = Path(str(model_info.get("model_path") or ""))
    if (folder / CONFIG).is_file():
        config = CheckpointFolder(folder).config
        told = {name: config[name] for name in ("vocab_size", "num_hidden_layers") if name in config}
        told |= _architecture(config)
    return told | _architecture(model_info)


def _architecture(config: Mapping[str, Any]) -> dict[str, object]:
    names = config.get("architectures")
    return {"architecture": names[0]} if names else {}
