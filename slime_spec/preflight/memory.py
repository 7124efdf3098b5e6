"""The memory plan says how many bytes engines, trainer and pushes will need; it is computed before any of them exists.

``gpu_memory`` adds them up, by GPU and phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.draft_spec import OWN_EMBEDDING
from slime_spec.checkpoints.families import FORMAT_OF, family_of
from slime_spec.checkpoints.families.eagle3 import TABLES
from slime_spec.checkpoints.families.experts import served_dtype
from slime_spec.checkpoints.folder import StoredTensor
from slime_spec.checkpoints.parameters import (
    Parameters,
    count_parameters,
    expanded_kv_elements,
    kv_elements_per_token,
    num_kv_heads,
)
from slime_spec.checkpoints.quantization import CODES, SCALE, coded_names, is_fp8
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.config.checks import check_ranks
from slime_spec.config.speculation import draft_quantization
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.preflight.activation_memory import ITEMSIZES
from slime_spec.preflight.draft_memory import FLOAT32_BYTES, DraftMemory, DraftSizes, draft_memory
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.trainer_memory import FLOAT32_LOGITS, TrainerMemory, trainer_memory

GB = 10**9
PASS_TOKENS = 16_384  # of the embedded engine's longest pass on a GPU, padding included


@dataclass(frozen=True)
class EngineMemory:
    """Holds the memory of one engine over all its GPUs.

    ``kv_bytes`` is the cache holding ``num_sequences`` of the longest length. ``kv_copies``: tensor-parallel ranks
    beyond the number of key-value heads keep what another rank has, and every rank keeps a latent (MLA) whole.
    ``num_gpus`` 0 is the CPU. The embedded engine's cache grows to ``bound_bytes``, a round of it has
    ``round_bytes`` at once, and a pass over prompts ``prefill_bytes``.
    """

    target_bytes: int
    draft_bytes: int
    kv_bytes_per_token: int
    num_sequences: int
    kv_bytes: int
    kv_copies: int
    num_gpus: int
    max_total_tokens: int | None
    bound_bytes: int
    round_bytes: int
    prefill_bytes: int

    @property
    def pool_bytes(self) -> int:
        """Return the bytes on each GPU of a cache of ``max_total_tokens``."""
        return (self.max_total_tokens or 0) * self.kv_bytes_per_token * self.kv_copies // max(1, self.num_gpus)

    @property
    def total_bytes(self) -> int:
        return self.target_bytes + self.draft_bytes + self.kv_copies * self.kv_bytes

    @property
    def gpu_bytes(self) -> int:
        """Return the bytes on each GPU; the tensors that ranks do not split (norms, routers) are small."""
        return self.total_bytes // max(1, self.num_gpus)


@dataclass(frozen=True)
class MemoryPlan:
    """Holds the memory of a whole run; a part is None where config.json does not give the sizes.

    ``stages`` is a trainer rank's memory in each pipeline stage. ``push_copies`` of a push's ``push_bytes`` are in
    shared memory where it goes through Ray's object store: a server that dies is started again with the one before
    while the next arrives. ``largest_tensor_bytes`` is its largest tensor's.
    """

    source: str
    engine: EngineMemory | None
    stages: tuple[TrainerMemory, ...]
    push_bytes: int | None
    push_copies: int
    largest_tensor_bytes: int

    @property
    def trainer(self) -> TrainerMemory | None:
        """Return a rank's memory in the stage whose step takes most; None where there is no trainer."""
        return max(self.stages, key=lambda stage: stage.peak_bytes, default=None)


def plan_memory(facts: Facts) -> MemoryPlan:
    config = facts.config
    target = facts.target.config
    counted = count_parameters(target)
    source = "config.json" if facts.target.tensors is None else "config.json and the weights' headers"
    runs_engines, trains = config.run.mode != "train_only", config.run.mode != "rollout_only"
    itemsize = _weight_itemsize(facts)
    return MemoryPlan(
        source,
        engine=_engine(facts, itemsize, counted) if runs_engines and counted is not None else None,
        stages=_stages(facts, counted) if trains and counted is not None else (),
        push_bytes=_target_bytes(facts, counted, itemsize) if runs_engines and trains and counted is not None else None,
        push_copies=kind_of(config).num_weight_copies,
        largest_tensor_bytes=0
        if counted is None
        else target["vocab_size"] * target["hidden_size"] * ITEMSIZES[config.engine.dtype],
    )


def _stages(facts: Facts, counted: Parameters) -> tuple[TrainerMemory, ...]:
    try:
        check_ranks(facts.config.trainer)
        return trainer_memory(facts.config, facts.target.config, counted, _trained_draft(facts, counted))
    except ConfigError:
        return ()  # the layout's check refuses these sizes, with the reason


def _trained_draft(facts: Facts, counted: Parameters) -> DraftMemory | None:
    """Return the memory of the draft that the trainer trains; None where there is none that can be trained."""
    draft, draft_format = facts.draft, facts.draft_format
    if not facts.config.trains_draft or draft is None or draft_format is None:
        return None
    if facts.draft_kind == "in_target":
        # The ranks of the last stage each have the layer, and spread its experts over all of them.
        trainer = facts.config.trainer
        per_stage = trainer.world_size // trainer.pipeline_model_parallel_size
        num_parameters = counted.mtp - counted.mtp_experts - (-counted.mtp_experts // per_stage)
    else:
        num_parameters = draft_parameters(draft)
    sizes = DraftSizes.of(draft_format, draft.config, facts.target.config, num_parameters)
    return draft_memory(facts.config, sizes)


def _weight_itemsize(facts: Facts) -> int:
    """Return the bytes of a weight in an engine: a server keeps fp8 as codes, all else becomes the engine's dtype."""
    is_kept = facts.on_sglang and is_fp8(facts.target.config)
    return 1 if is_kept else ITEMSIZES[facts.config.engine.dtype]


def _engine(facts: Facts, itemsize: int, counted: Parameters) -> EngineMemory:
    config = facts.config
    kv_itemsize = 1 if str(facts.flags.get("kv_cache_dtype", "")).startswith("fp8") else ITEMSIZES[config.engine.dtype]
    cached = expanded_kv_elements if kind_of(config).runs_built_decoders else kv_elements_per_token
    elements = cached(facts.target.config) or 0
    draft_bytes = 0
    if facts.draft_kind == "in_target":
        draft_bytes = _mtp_bytes(facts, counted, itemsize)
        elements += cached(facts.target.config, facts.target.num_mtp_layers) or 0
    elif facts.draft is not None:
        draft_bytes = _draft_bytes(facts, facts.draft)
        elements += cached(facts.draft.config) or 0
    num_sequences = min(config.engine.max_running_requests, facts.samples_per_engine)
    num_tokens = num_sequences * (facts.config.longest + (facts.shape.headroom if facts.speculates else 0))
    if config.engine.max_total_tokens is not None:
        num_tokens = min(num_tokens, config.engine.max_total_tokens)
    return EngineMemory(
        target_bytes=_target_bytes(facts, counted, itemsize) + _replicated_bytes(facts, counted, itemsize),
        draft_bytes=draft_bytes,
        kv_bytes_per_token=elements * kv_itemsize,
        num_sequences=num_sequences,
        kv_bytes=elements * kv_itemsize * num_tokens,
        kv_copies=_kv_copies(facts),
        num_gpus=config.rollout.num_gpus_per_engine,
        max_total_tokens=config.engine.max_total_tokens,
        bound_bytes=_bound_bytes(config, elements * kv_itemsize),
        round_bytes=_round_bytes(facts, num_sequences),
        prefill_bytes=_prefill_bytes(facts, num_sequences),
    )


def _bound_bytes(config: Config, bytes_per_token: int) -> int:
    if config.engine.max_total_tokens is not None:
        return config.engine.max_total_tokens * bytes_per_token
    return int(config.engine.kv_cache_gb * GB)


def _round_bytes(facts: Facts, num_sequences: int) -> int:
    """Return what a round of the embedded engine has at once: a layer's states, and the logits of what it verifies."""
    target, itemsize = facts.target.config, ITEMSIZES[facts.config.engine.dtype]
    rows = num_sequences * (facts.shape.num_draft_tokens if facts.speculates else 1)
    return _states_bytes(facts, rows) + rows * target["vocab_size"] * (itemsize + FLOAT32_LOGITS * FLOAT32_BYTES)


def _prefill_bytes(facts: Facts, num_sequences: int) -> int:
    """Return what a pass of the embedded engine over prompts has at once, each padded to the longest of them."""
    return _states_bytes(facts, min(num_sequences * facts.config.rollout.max_prompt_len, PASS_TOKENS))


def _states_bytes(facts: Facts, num_tokens: int) -> int:
    target, itemsize = facts.target.config, ITEMSIZES[facts.config.engine.dtype]
    return num_tokens * (4 * target["hidden_size"] + _width(target)) * itemsize


def _width(target: Mapping[str, Any]) -> int:
    """Return the numbers that a layer has at once between its projections."""
    return 3 * int(target.get("intermediate_size") or target["moe_intermediate_size"])


def _target_bytes(facts: Facts, counted: Parameters, itemsize: int) -> int:
    """Return the target's bytes in an engine, once."""
    if (stored := _coded_bytes(facts)) is not None:
        return stored[0]
    # A checkpoint quantised to 8 bits leaves its embedding and head as they are.
    return counted.decoder * itemsize + counted.tables * (ITEMSIZES[facts.config.engine.dtype] - itemsize)


def _mtp_bytes(facts: Facts, counted: Parameters, itemsize: int) -> int:
    """Return the bytes of the target's MTP layers in an engine that drafts with them."""
    if (stored := _coded_bytes(facts)) is not None:
        return stored[1]
    return counted.mtp * (1 if _is_rounded(facts) else itemsize)


def _coded_bytes(facts: Facts) -> tuple[int, int] | None:
    """Return the bytes of target and MTP layers in a server of fp8, as the headers say; None for all other engines."""
    tensors, dtype = facts.target.tensors, facts.config.engine.dtype
    if not facts.on_sglang or tensors is None or not coded_names(tensors):
        return None
    layer = family_of(facts.target.architecture).mtp
    prefix = layer.prefix_in(facts.target.config["num_hidden_layers"]) if layer is not None else "-"
    sizes = {True: 0, False: 0}
    for name, each in tensors.items():
        if layer is not None and name.removeprefix(prefix) in layer.copies:
            continue  # the target's own, which servers have once
        sizes[name.startswith(prefix)] += _served_bytes(name, each, dtype)
    return sizes[False], sizes[True]


def _served_bytes(name: str, stored: StoredTensor, dtype: str) -> int:
    """Return the bytes of a tensor in a server of ``dtype``, which keeps fp8 as it is stored."""
    is_kept = stored.dtype == CODES or name.endswith(SCALE)
    return stored.num_bytes if is_kept else stored.num_elements * ITEMSIZES[served_dtype(name, dtype)]


def _replicated_bytes(facts: Facts, counted: Parameters, itemsize: int) -> int:
    """Return what more replicas of data parallel attention have: their own attention and embedding."""
    replicas = _integer(facts, "dp_size") if facts.flags.get("enable_dp_attention") else 1
    tables = counted.tables // 2 * ITEMSIZES[facts.config.engine.dtype]
    return (replicas - 1) * (counted.attention * itemsize + tables)


def _integer(facts: Facts, flag: str) -> int:
    value = facts.flags.get(flag, 1)
    assert isinstance(value, int), "typed by the table of flags"
    return value


def _kv_copies(facts: Facts) -> int:
    tensor_parallel = _integer(facts, "tp_size")
    if facts.flags.get("enable_dp_attention"):
        tensor_parallel //= _integer(facts, "dp_size")  # each replica's ranks keep its own sequences
    if facts.target.config.get("kv_lora_rank"):
        return max(1, tensor_parallel)
    return max(1, tensor_parallel // num_kv_heads(facts.target.config))


def _is_rounded(facts: Facts) -> bool:
    """Return whether the embedded engine keeps the draft's matrices in 8 bits; their scales are small."""
    return not facts.on_sglang and draft_quantization(facts.config) is not None


def _draft_bytes(facts: Facts, draft: Checkpoint) -> int:
    """Return the bytes of a draft outside the target's checkpoint.

    Rounding leaves a head's embedding and a whole model's tables as they are.
    """
    dtype = facts.config.engine.dtype
    if facts.on_sglang and draft.tensors is not None and coded_names(draft.tensors):
        return sum(_served_bytes(name, each, dtype) for name, each in draft.tensors.items())
    total, itemsize = draft_parameters(draft), ITEMSIZES[dtype]
    if not _is_rounded(facts):
        return total * itemsize
    if facts.draft_kind == "whole":
        counted = count_parameters(draft.config)
        kept = 0 if counted is None else counted.tables
    else:
        tensors = draft.tensors or {}
        kept = sum(each.num_elements for name, each in tensors.items() if name.endswith(OWN_EMBEDDING))
    return total - kept + kept * itemsize


def draft_parameters(draft: Checkpoint) -> int:
    """Count parameters by the headers, without tables and scales; without a file, by SpecForge's export format."""
    if draft.tensors is not None:
        parameters = (each for name, each in draft.tensors.items() if name not in TABLES and not name.endswith(SCALE))
        return sum(each.num_elements for each in parameters)
    counted, config = count_parameters(draft.config), draft.config
    if counted is None:
        return 0
    draft_format = FORMAT_OF.get(draft.architecture)
    if draft_format is None or draft_format.num_own_parameters is None:
        return counted.decoder
    # The embedding is the target's; the projection reads features of the target beside or below the token's.
    return counted.decoder - counted.tables + draft_format.num_own_parameters(config)
