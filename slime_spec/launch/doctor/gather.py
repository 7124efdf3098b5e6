"""Reading the facts: files, the interpreter of the servers, this machine. Nothing is started, no weight is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollout.sglang_engine.arguments import config_of_engine, planned_places, server_flags
from rollout.sglang_engine.installed import InstalledSglang, checked_in, installed_in
from slime_spec.config.build import from_dict, read_yaml, to_dict
from slime_spec.config.tree import Config
from slime_spec.draft.shipped import BUILTIN, builtin_folder
from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.compose import conf_dir, experiments
from slime_spec.launch.doctor.checkpoint import Checkpoint
from slime_spec.launch.doctor.external import ask_server, config_as_served
from slime_spec.launch.doctor.facts import Facts
from slime_spec.launch.doctor.gpus import visible_gpu_bytes
from slime_spec.launch.doctor.release import Release, find_release, pinned_release, release_of
from slime_spec.launch.sglang_table import sglang_version
from slime_spec.speculation.shape import MODEL_DRAFTS

GIVEN_BY_A_SERVER = frozenset({"engine.dtype", "engine.max_running_requests"})


def gather(config: Config, argv: Sequence[str], acceptance: tuple[float, ...] = ()) -> tuple[Facts, ...]:
    """The facts of the first engine, and of each further one that is configured as none before it.

    Raises ConfigError for a checkpoint that cannot be read. Of the checkpoints only config.json and the headers of the
    weights are read; SGLang's interpreter is asked for its version, and for its flags where the version is not the
    pinned one; a server that someone else started is asked for both.
    """
    on_sglang = config.rollout.engine == "sglang" and config.run.mode != "train_only"
    target = Checkpoint.read(config.model.hf_checkpoint)
    base = Facts(
        config=config,
        given=given_settings(argv),
        target=target,
        draft=_draft(config, target),
        release=pinned_release(),
        flags={},
        environ=os.environ,
        gpu_bytes=visible_gpu_bytes(os.environ) if config.cluster.ray_address is None else None,
        acceptance=acceptance,
    )
    if not on_sglang:
        return (base,)
    return tuple(_external(base) if config.sglang_server.external_addrs else _started(base))


def _started(base: Facts) -> Iterator[Facts]:
    """Servers of our own, with the flags that they will be started with."""
    release = find_release(base.config.sglang_server.python)
    base = replace(base, release=release, known_flags=_known_flags(base.config, release))
    for engine, own in _engines(base.config):
        flags = server_flags(own, engine, planned_places(own, engine)[0])
        yield replace(base, config=own, draft=_draft(own, base.target), flags=flags, engine=engine)


def _external(base: Facts) -> Iterator[Facts]:
    """Servers that run already, with the flags that they tell; of one that does not answer nothing is known."""
    addresses = base.config.sglang_server.external_addrs
    asked = [ask_server(address, base.config.sglang.get("api_key")) for address in addresses]
    silent = tuple(address for address, answer in zip(addresses, asked, strict=True) if answer is None)
    # What is not given here is given there.
    base = replace(base, given=base.given | GIVEN_BY_A_SERVER, silent_servers=silent)
    answers = [(engine, answer) for engine, answer in enumerate(asked) if answer is not None]
    if not answers:
        yield base
    for engine, answer in answers:
        release = release_of(answer.version, is_installed=True)
        served = config_as_served(base.config, answer)
        yield replace(base, config=served, release=release, flags=answer.flags, engine=engine)


def _engines(config: Config) -> Iterator[tuple[int, Config]]:
    """Engines that differ, each with what is set for it alone, and added to its command line, in its places."""
    seen: list[Config] = []
    for engine in range(config.rollout.num_engines if config.sglang_server.overrides else 1):
        own = _with_extra_args(config_of_engine(config, engine))
        if own not in seen:
            seen.append(own)
            yield engine, own


def _with_extra_args(config: Config) -> Config:
    words = config.sglang_server.extra_args
    if not words:
        return config
    try:
        settings = read_arguments(
            [f"--sglang-{word[2:]}" if word.startswith("--") else word for word in words]
        ).settings
    except ConfigError:
        return config  # flags of another version than the table's: the check of server flags has a say
    data: dict[str, Any] = to_dict(config)
    for path, value in settings.items():
        node, _, leaf = path.partition(".")
        data[node][leaf] = value
    return replace(from_dict(data), sglang_server=config.sglang_server)


def _known_flags(config: Config, release: Release) -> InstalledSglang | None:
    if not release.is_installed:
        return None
    # Asking takes an import of sglang, and the table is what the pinned version answers.
    is_pinned = release.text == sglang_version()
    return checked_in() if is_pinned else installed_in(config.sglang_server.python or sys.executable)


def _draft(config: Config, target: Checkpoint) -> Checkpoint | None:
    algorithm, path = config.speculative.algorithm, config.speculative.draft_model_path
    if algorithm not in MODEL_DRAFTS or config.run.mode == "train_only":
        return None
    if path is None or os.path.realpath(path) == os.path.realpath(target.folder):
        return target
    folder = str(builtin_folder(path)) if path.startswith(BUILTIN) else path
    return Checkpoint.read(folder, "speculative.draft_model_path")


def given_settings(argv: Sequence[str]) -> frozenset[str]:
    """Paths of the settings that the command line or its experiment sets; those that only have defaults are not."""
    arguments = read_arguments(argv)
    name = arguments.experiment
    if name is None:
        return frozenset(arguments.settings)
    path = conf_dir() / "experiment" / f"{name}.yaml" if name in experiments() else Path(name)
    data: dict[str, Any] = read_yaml(path.read_text())
    return frozenset(arguments.settings) | {f"{node}.{leaf}" for node, leaves in data.items() for leaf in leaves}
