"""The benchmark makes a configuration for each algorithm that the target and the draft allow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slime_spec.algorithms import EAGLE3, NEXTN, STANDALONE, find_algorithm, names
from slime_spec.bench.prompts import Prompts
from slime_spec.bench.rows import BenchOptions
from slime_spec.checkpoints.draft_location import BUILTIN, builtin_folder
from slime_spec.config.tree import (
    ClusterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SglangServerConfig,
    SpeculativeConfig,
)
from slime_spec.errors import ConfigError

# SGLang's own choice for most models, and as many tokens for the algorithm without steps.
CHAIN: Mapping[str, Any] = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
# Both engines have these algorithms, and their replies are compared.
ALGORITHMS = names(lambda each: each.sglang is not None and each.drafter is not None)
# Only these of SGLang's attention backends verify drafts where nothing but torch and Triton is installed.
ATTENTION_ON_CPU, ATTENTION_ON_GPU = "intel_amx", "triton"
# Likewise of its other parts: a GPU machine may have nothing that compiles kernels.
BARE: Mapping[str, Any] = {"sampling_backend": "pytorch", "grammar_backend": "none"}
MEMORY_SHARE = 0.3  # of a GPU: part "speed" runs two servers on one
MARGIN = 64  # tokens of a request that SGLang keeps for drafts
CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"


def num_gpus(options: BenchOptions) -> int:
    """Return the number of GPUs of one server."""
    if options.num_gpus is not None:
        return options.num_gpus
    return int(torch.cuda.is_available() and os.environ.get(CPU_ENGINE) != "1")


def place(options: BenchOptions) -> str:
    """Return the place of measurement, as the rows name it."""
    count = num_gpus(options)
    return "a CPU" if count == 0 else f"{count} GPU{'s' if count > 1 else ''}"


def drafting(options: BenchOptions) -> str:
    """Return the algorithm whose draft is pushed, offloaded and raced: the last that has weights."""
    found = [name for name in options.algorithms if find_algorithm(name).has_weights]
    if not found:
        raise ConfigError(
            "--algorithms",
            "must have one that drafts with weights: parts push, restart, offload and speed are about its draft",
            options.algorithms,
            f"Add {EAGLE3.name}, or pass --only exactness counters.",
        )
    return found[-1]


def speculation(options: BenchOptions, algorithm: str) -> SpeculativeConfig:
    """Configure drafts: STANDALONE with the target itself, NEXTN with its MTP layer, EAGLE and EAGLE3 with --draft."""
    record = find_algorithm(algorithm)
    if not record.speculates:
        return SpeculativeConfig()
    if not record.has_weights:
        return SpeculativeConfig(algorithm=algorithm, num_draft_tokens=CHAIN["num_draft_tokens"])
    folders = {STANDALONE.name: str(options.model), NEXTN.name: None}
    return SpeculativeConfig(algorithm=algorithm, draft_model_path=folders.get(algorithm, _draft(options)), **CHAIN)


def _draft(options: BenchOptions) -> str:
    """Return the draft's folder, which SGLang needs."""
    return builtin_folder(options.draft) if options.draft.startswith(BUILTIN) else options.draft


def engine_settings(options: BenchOptions, algorithm: str, prompts: Prompts, at_once: int, log: Path) -> Config:
    """Configure a server for ``at_once`` of these prompts; the embedded engine reads the same configuration.

    ``log`` is the folder of the server's log.
    """
    gpus = num_gpus(options)
    attention = options.attention_backend or (ATTENTION_ON_GPU if gpus else ATTENTION_ON_CPU)
    room = max(map(len, prompts)) + options.num_new_tokens + MARGIN
    return Config(
        run=RunConfig(mode="rollout_only", output_dir=str(log)),
        model=ModelConfig(hf_checkpoint=str(options.model)),
        engine=EngineConfig(dtype=options.dtype, max_running_requests=at_once, max_total_tokens=at_once * room),
        rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=gpus),
        cluster=ClusterConfig(colocate=False),
        speculative=speculation(options, algorithm),
        # The benchmark checks drafts itself, and an idle server must not disturb the server that is timed.
        sglang_server=SglangServerConfig(python=options.sglang_python, host="127.0.0.1", canary_prompts=0),
        sglang={
            "attention_backend": attention,
            "mem_fraction_static": MEMORY_SHARE,
            "sleep_on_idle": True,
            **(BARE if gpus else {}),
        },
    )


def with_transport(config: Config, transport: str, server: str | None = None) -> Config:
    """Return the configuration that pushes by ``transport``, to ``server`` (host:port) if it is given."""
    addresses = () if server is None else (server,)
    config = replace(config, sglang_server=replace(config.sglang_server, transport=transport, external_addrs=addresses))
    return config if server is None else replace(config, run=replace(config.run, mode="train"))


def embedded(config: Config) -> Config:
    """Return the same configuration for the embedded engine."""
    return replace(config, rollout=replace(config.rollout, engine="embedded", num_gpus_per_engine=0), sglang={})
