"""The memory plan says how many bytes engines and trainer will need; it is computed before either exists.

Counted: weights, KV cache, gradients, optimizer state, and the copy of the weights that a push keeps in shared memory.
Not counted: activations, CUDA graphs and contexts, which depend on kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.checkpoints.families import FORMAT_OF
from slime_spec.checkpoints.families.eagle3 import TABLES
from slime_spec.checkpoints.parameters import Parameters, count_parameters, kv_elements_per_token, num_kv_heads
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.preflight.facts import Facts

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
FLOAT32_BYTES = 4
ADAM_STATES = 2


@dataclass(frozen=True)
class EngineMemory:
    """Holds the memory of one engine over all its GPUs.

    ``kv_bytes`` is the cache holding ``num_sequences`` of the longest length. ``kv_copies``: tensor-parallel ranks
    beyond the number of key-value heads keep what another rank has, and every rank keeps a latent (MLA) whole.
    ``num_gpus`` 0 is the CPU.
    """

    target_bytes: int
    draft_bytes: int
    kv_bytes_per_token: int
    num_sequences: int
    kv_bytes: int
    kv_copies: int
    num_gpus: int

    @property
    def total_bytes(self) -> int:
        return self.target_bytes + self.draft_bytes + self.kv_copies * self.kv_bytes

    @property
    def gpu_bytes(self) -> int:
        """Return the bytes on each GPU; the tensors that ranks do not split (norms, routers) are small."""
        return self.total_bytes // max(1, self.num_gpus)


@dataclass(frozen=True)
class TrainerMemory:
    """Holds one rank's memory: parameters, float32 gradients, Adam's moments, float32 masters of bfloat16 parameters.

    ``reference_bytes`` is the initial checkpoint, kept where the loss has a KL term.
    """

    num_parameters: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    reference_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.reference_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Holds the memory of a whole run; a part is None where config.json does not give the sizes.

    ``push_copies`` of a push's ``push_bytes`` are in shared memory: a server that dies is started again with the one
    before while the next arrives. ``mem_fraction_static`` is the servers'.
    """

    source: str
    engine: EngineMemory | None
    trainer: TrainerMemory | None
    push_bytes: int | None
    push_copies: int
    mem_fraction_static: float | None


def plan_memory(facts: Facts) -> MemoryPlan:
    config = facts.config
    num_parameters = decoder_parameters(facts.target)
    source = "config.json" if facts.target.tensors is None else "config.json and the weights' headers"
    runs_engines, trains = config.run.mode != "train_only", config.run.mode != "rollout_only"
    is_known, itemsize = num_parameters is not None, weight_itemsize(facts.target, config.engine.dtype)
    fraction = facts.flags.get("mem_fraction_static")
    return MemoryPlan(
        source,
        engine=_engine(facts, itemsize) if runs_engines and is_known else None,
        trainer=_trainer(config, num_parameters) if trains and num_parameters is not None else None,
        push_bytes=num_parameters * itemsize if runs_engines and trains and num_parameters is not None else None,
        push_copies=kind_of(config).num_weight_copies,
        mem_fraction_static=fraction if isinstance(fraction, float) else None,
    )


def decoder_parameters(target: Checkpoint) -> int | None:
    """Return the number of parameters of the target without its MTP layers."""
    counted = count_parameters(target.config)
    return None if counted is None else counted.decoder


def weight_itemsize(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of a weight in a server: a checkpoint quantised to 8 bits stays so, others become ``dtype``."""
    quantization = checkpoint.config.get("quantization_config") or {}
    return 1 if quantization.get("quant_method") == "fp8" else ITEMSIZES[dtype]


def _engine(facts: Facts, itemsize: int) -> EngineMemory:
    config = facts.config
    counted = count_parameters(facts.target.config)
    assert counted is not None, "plan_memory stops where nothing can be counted"
    kv_itemsize = 1 if str(facts.flags.get("kv_cache_dtype", "")).startswith("fp8") else ITEMSIZES[config.engine.dtype]
    elements = kv_elements_per_token(facts.target.config) or 0
    draft_bytes = 0
    if facts.draft_kind == "in_target":
        draft_bytes = counted.mtp * itemsize
        elements += kv_elements_per_token(facts.target.config, facts.target.num_mtp_layers) or 0
    elif facts.draft is not None:
        draft_bytes = draft_parameters(facts.draft) * ITEMSIZES[config.engine.dtype]
        elements += kv_elements_per_token(facts.draft.config) or 0
    num_sequences = min(config.engine.max_running_requests, facts.samples_per_engine)
    num_tokens = num_sequences * (facts.config.rollout.longest + (facts.shape.headroom if facts.speculates else 0))
    if config.engine.max_total_tokens is not None:
        num_tokens = min(num_tokens, config.engine.max_total_tokens)
    return EngineMemory(
        target_bytes=_target_bytes(facts, counted, itemsize),
        draft_bytes=draft_bytes,
        kv_bytes_per_token=elements * kv_itemsize,
        num_sequences=num_sequences,
        kv_bytes=elements * kv_itemsize * num_tokens,
        kv_copies=_kv_copies(facts),
        num_gpus=config.rollout.num_gpus_per_engine,
    )


def _target_bytes(facts: Facts, counted: Parameters, itemsize: int) -> int:
    """Return the target's bytes over all GPUs.

    Each replica of data parallel attention has its own attention and embedding.
    """
    # A checkpoint quantised to 8 bits leaves its embedding and head as they are.
    wider = counted.tables * (max(itemsize, ITEMSIZES[facts.config.engine.dtype]) - itemsize)
    replicas = _integer(facts, "dp_size") if facts.flags.get("enable_dp_attention") else 1
    return counted.decoder * itemsize + wider + (replicas - 1) * (counted.attention + counted.tables // 2) * itemsize


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


def draft_parameters(draft: Checkpoint) -> int:
    """Count parameters by the file's headers, without tables of ids; without a file, by SpecForge's export format."""
    if draft.tensors is not None:
        return sum(each.num_elements for name, each in draft.tensors.items() if name not in TABLES)
    counted, config = count_parameters(draft.config), draft.config
    if counted is None:
        return 0
    draft_format = FORMAT_OF.get(draft.architecture)
    if draft_format is None or draft_format.num_own_parameters is None:
        return counted.decoder
    # The embedding is the target's; the projection reads features of the target beside or below the token's.
    return counted.decoder - counted.tables + draft_format.num_own_parameters(config)


def _trainer(config: Config, num_parameters: int) -> TrainerMemory:
    trainer = config.trainer
    held = num_parameters // (trainer.tensor_model_parallel_size * trainer.pipeline_model_parallel_size)
    itemsize = ITEMSIZES[trainer.dtype]
    masters = FLOAT32_BYTES if trainer.dtype != "float32" else 0
    return TrainerMemory(
        num_parameters=held,
        weights_bytes=held * itemsize,
        gradient_bytes=held * FLOAT32_BYTES,
        optimizer_bytes=held * (ADAM_STATES * FLOAT32_BYTES + masters),
        reference_bytes=held * itemsize if config.algorithm.kl_loss_coef > 0 else 0,
    )
