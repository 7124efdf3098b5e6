"""``gather`` reads the facts from files, the servers' interpreter and this machine; it starts and loads nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.embedding_rows import embeds_otherwise
from slime_spec.checkpoints.end_of_text import ReplyEnds
from slime_spec.checkpoints.folder import DRAFT_PATH
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.config.api_key import api_key_of
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError, raise_all, refused_by
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.gpus import visible_gpu_bytes
from slime_spec.sglang.arguments import config_as_served, config_of_engine, planned_places, server_flags, with_flags
from slime_spec.sglang.flags import read_server_words, sglang_version
from slime_spec.sglang.interpreter import InstalledSglang, checked_in, find_release, installed_in
from slime_spec.sglang.releases import Release, pinned_release, release_of
from slime_spec.sglang.served import differences
from slime_spec.sglang.server_info import ask_server

GIVEN_BY_A_SERVER = frozenset({"engine.dtype", "engine.max_running_requests"})


def gather(config: Config, given: frozenset[str], acceptance: tuple[float, ...] = ()) -> tuple[Facts, ...]:
    """Return the facts of each engine whose configuration differs from that of every engine before it.

    ``given`` are the paths of the settings that somebody has set; the others have their defaults.
    Raises ConfigError for a checkpoint that cannot be read, together with what is wrong of the other files. Of the
    checkpoints only JSON files and the headers of the weights are read; SGLang's interpreter is asked for its version,
    and for its flags where the version is not the pinned one; a server that someone else started is asked for both.
    """
    try:
        target = Checkpoint.read(config.model.hf_checkpoint)
    except ConfigError as error:
        raise_all((error, *refused_by(*_besides_target(config))))
        raise
    base = Facts(
        config=config,
        given=given,
        target=target,
        draft=_draft(config, target),
        release=pinned_release(),
        flags={},
        environ=os.environ,
        gpu_bytes=visible_gpu_bytes(os.environ) if config.cluster.ray_address is None else None,
        acceptance=acceptance,
        reply_ends=None if config.run.mode == "train_only" else ReplyEnds.read(target.folder),
    )
    if not base.on_sglang:
        return (base,)
    if base.draft is not None and base.draft_kind == "head":
        base = replace(base, draft_embeds_otherwise=embeds_otherwise(base.draft.folder, target.folder))
    return tuple(_external(base) if kind_of(config).uses_external_servers(config) else _started(base))


def _besides_target(config: Config) -> Iterator[Callable[[], object]]:
    """Yield what reads the files that are given beside the target's checkpoint."""
    if config.run.mode != "train_only":
        yield partial(_read_draft, config)
        if kind_of(config).has_servers and not kind_of(config).uses_external_servers(config):
            yield partial(find_release, config.sglang_server.python)
            yield partial(api_key_of, config)
            yield lambda: list(_engines(config))


def _read_draft(config: Config) -> None:
    draft = locate_draft(config.speculative, config.model.hf_checkpoint)
    if draft is not None and draft.kind != "in_target":
        Checkpoint.read(draft.folder, DRAFT_PATH)


def _started(base: Facts) -> Iterator[Facts]:
    """Yield the facts of servers that this run starts, with the flags that it will start them with."""
    release = find_release(base.config.sglang_server.python)
    api_key_of(base.config)  # for its errors
    base = replace(base, release=release, known_flags=_known_flags(base.config, release))
    for engine, own in _engines(base.config):
        flags = server_flags(own, engine, planned_places(own, engine)[0])
        yield replace(base, config=own, draft=_draft(own, base.target), flags=flags, engine=engine)


def _external(base: Facts) -> Iterator[Facts]:
    """Yield the facts of servers that run already, with the flags that they report.

    A silent server's flags are unknown.
    """
    addresses = base.config.sglang_server.external_addrs
    key = api_key_of(base.config)
    asked = [ask_server(address, key) for address in addresses]
    silent = tuple(address for address, answer in zip(addresses, asked, strict=True) if answer is None)
    # Settings that are not given here were given to the server.
    base = replace(base, given=base.given | GIVEN_BY_A_SERVER, silent_servers=silent)
    answers = [(engine, answer) for engine, answer in enumerate(asked) if answer is not None]
    if not answers:
        yield base
    for engine, answer in answers:
        release = release_of(answer.version, is_installed=True)
        differing = tuple(differences(base.config, engine, answer.flags))
        flags = {dest: value for dest, value in answer.flags.items() if value is not None}
        served = config_as_served(base.config, flags)
        yield replace(base, config=served, release=release, flags=flags, engine=engine, differing=differing)


def _engines(config: Config) -> Iterator[tuple[int, Config]]:
    """Yield the engines that differ, each with its overrides and extra arguments laid over the configuration."""
    seen: list[Config] = []
    for engine in range(config.rollout.num_engines if config.sglang_server.overrides else 1):
        own = _with_extra_args(config_of_engine(config, engine))
        if own not in seen:
            seen.append(own)
            yield engine, own


def _with_extra_args(config: Config) -> Config:
    try:
        flags = read_server_words(config.sglang_server.extra_args)
    except ConfigError:
        return config  # flags of another version than the table's: the check of server flags judges them
    return with_flags(config, flags)


def _known_flags(config: Config, release: Release) -> InstalledSglang | None:
    if not release.is_installed:
        return None
    # Asking takes an import of sglang, and the table is what the pinned version answers.
    is_pinned = release.text == sglang_version()
    return checked_in() if is_pinned else installed_in(config.sglang_server.python or sys.executable)


def _draft(config: Config, target: Checkpoint) -> Checkpoint | None:
    draft = locate_draft(config.speculative, target.folder)
    if draft is None or config.run.mode == "train_only":
        return None
    if os.path.realpath(draft.folder) == os.path.realpath(target.folder):
        return target
    checkpoint = Checkpoint.read(draft.folder, DRAFT_PATH)
    return checkpoint if draft.kind == "whole" else checkpoint.as_draft()
