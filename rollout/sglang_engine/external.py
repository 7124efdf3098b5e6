"""These checks show whether an external server serves the model and the speculation of this run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.sglang_engine.client import ServerRefused, SglangClient
from slime_spec.checkpoints.folder import CONFIG, CheckpointFolder
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.checkpoints.quantization import KEY
from slime_spec.config.server_checks import ADDRESSES
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.sglang.served import differences

logger = logging.getLogger(__name__)


async def use_server(client: SglangClient, config: Config, engine_index: int, target: TargetFiles) -> None:
    """Check what the external server says of itself; its weights are the business of Adoption. Raises ConfigError."""
    timeout_s = config.sglang_server.start_timeout_s
    is_healthy = await client.is_healthy(timeout_s)
    if not is_healthy and not await client.answers(timeout_s):
        raise ConfigError(ADDRESSES, "must answer", client.url, "Start it, or correct the address.")
    try:
        if not is_healthy:
            await client.post("/continue_generation")  # a run that ended within a push has left it paused
        model_info, server_info = await client.get("/model_info"), await client.get("/server_info")
    except ServerRefused as error:
        raise ConfigError(
            ADDRESSES,
            f"must say what it serves: {error}",
            client.url,
            "Give its --api-key in the file of --sglang-api-key-file.",
        ) from None
    if not isinstance(model_info, Mapping) or not isinstance(server_info, Mapping):
        rule = f"must be an SGLang server, and answers {str(model_info)[:80]}"
        raise ConfigError(ADDRESSES, rule, client.url, "Correct the address.")
    check_served(client.url, config, target, model_info)
    check_flags(client.url, config, engine_index, server_info)


def check_served(url: str, config: Config, target: TargetFiles, model_info: Mapping[str, Any]) -> None:
    """Raise ConfigError where the server reports another model.

    The server's answers name the architecture (newer versions) and the model's folder; the vocabulary and the number of
    layers are read in that folder, where this machine has it.
    """
    ours: dict[str, object] = {
        "architecture": target.architecture,
        "vocab_size": target.vocab_size,
        "num_hidden_layers": target.num_layers,
    }
    theirs = _told(model_info)
    if config.run.mode != "rollout_only":
        _check_form(url, config, model_info, theirs)
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            raise ConfigError(
                ADDRESSES,
                f"must serve the model of --hf-checkpoint, and {url} has {name} {theirs[name]} where that has {value}",
                model_info.get("model_path"),
                f"Start that server with --model-path {config.model.hf_checkpoint}, or name another.",
            )


def _check_form(url: str, config: Config, model_info: Mapping[str, Any], theirs: Mapping[str, object]) -> None:
    """Raise ConfigError where a push would not send weights in the form in which the server has them.

    That is the form of the folder that the server has loaded: codes where its config.json describes them.
    """
    ours = CheckpointFolder(Path(config.model.hf_checkpoint)).config.get(KEY) or None
    if theirs.get(KEY, ours) == ours and (KEY in theirs or ours is None):
        return
    told = (
        f"has loaded {KEY} {theirs[KEY]}" if KEY in theirs else f"has loaded a folder that is not here, with any {KEY}"
    )
    raise ConfigError(
        ADDRESSES,
        f"must have loaded weights in the form of --hf-checkpoint ({KEY} {ours}), and {url} {told}",
        model_info.get("model_path"),
        f"Start that server with --model-path {config.model.hf_checkpoint}, a folder that this machine has too.",
    )


def check_flags(url: str, config: Config, engine_index: int, server_info: Mapping[str, Any]) -> None:
    """Raise ConfigError for a flag that would give other samples than the run asks for; log the others that differ."""
    for each in differences(config, engine_index, server_info):
        if each.is_decisive:
            raise each.refusal(url)
        logger.warning("%s", each.told(url))


def _told(model_info: Mapping[str, Any]) -> dict[str, object]:
    told: dict[str, object] = {}
    folder = Path(str(model_info.get("model_path") or ""))
    if (folder / CONFIG).is_file():
        config = CheckpointFolder(folder).config
        told = {name: config[name] for name in ("vocab_size", "num_hidden_layers") if name in config}
        told[KEY] = config.get(KEY) or None
        told |= _architecture(config)
    return told | _architecture(model_info)


def _architecture(config: Mapping[str, Any]) -> dict[str, object]:
    names = config.get("architectures")
    return {"architecture": names[0]} if names else {}
