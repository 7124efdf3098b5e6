"""The memory of each GPU in each phase: what engines and trainer have on it, with the arithmetic, and whether it fits.

    load     the trainer loads, before there are engines        train    a policy step
    start    the engines start beside what the trainer left     push     weights go from the trainer to the engines
    rollout  the engines generate

Not counted: what allocators lose to fragmentation, and memory of other programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from slime_spec.placement import num_reserved_gpus
from slime_spec.preflight.draft_memory import FLOAT32_BYTES
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.memory import EngineMemory, MemoryPlan
from slime_spec.preflight.trainer_memory import FLOAT32_LOGITS, TrainerMemory
from slime_spec.sglang import memory as sglang

GB = 10**9
CACHE = "engine: KV cache"
CONTEXT_BYTES = GB  # of one process: CUDA's context, cuBLAS, NCCL's buffers


class Phase(StrEnum):
    """Names a phase of a run in which memory is used otherwise than in the others."""

    LOAD = "load"
    START = "start"
    ROLLOUT = "rollout"
    TRAIN = "train"
    PUSH = "push"


ENGINE_PHASES = frozenset({Phase.START, Phase.ROLLOUT, Phase.PUSH})
TRAINER_PHASES = frozenset({Phase.LOAD, Phase.TRAIN})


@dataclass(frozen=True)
class MemoryRow:
    """Holds one thing in a GPU's memory. ``MemoryRow("trainer weights", 3_803_000_000, "1.9e9 x 2 B", phases)``."""

    name: str
    num_bytes: int
    arithmetic: str
    phases: frozenset[Phase]


@dataclass(frozen=True)
class GpuMemory:
    """Holds what is on each of ``num_gpus`` GPUs that are used alike, each with ``capacity_bytes``."""

    num_gpus: int
    holders: str
    capacity_bytes: int
    phases: tuple[Phase, ...]
    rows: tuple[MemoryRow, ...]

    def total(self, phase: Phase) -> int:
        return sum(row.num_bytes for row in self.rows if phase in row.phases)

    def bytes_of(self, name: str) -> int | None:
        """Return the bytes of a row; None where there is none of this name."""
        return next((row.num_bytes for row in self.rows if row.name == name), None)

    @property
    def peak(self) -> int:
        """Return the most that a GPU has in any phase."""
        return max(map(self.total, self.phases))

    @property
    def overfull(self) -> tuple[Phase, ...]:
        """Return the phases for which a GPU is too small."""
        return tuple(phase for phase in self.phases if self.total(phase) > self.capacity_bytes)


def gpu_capacity(facts: Facts) -> int | None:
    """Return the memory of a GPU: the smallest of this machine's, or as set for a cluster's; None where unknown."""
    if facts.gpu_bytes:
        return min(facts.gpu_bytes)
    given = facts.config.cluster.gpu_memory_gb
    return None if given is None else int(given * GB)


def plan_gpus(facts: Facts, plan: MemoryPlan) -> tuple[GpuMemory, ...]:
    """Return the memory of the GPUs that are used alike; none where sizes are unknown, or where there are no GPUs."""
    capacity = gpu_capacity(facts)
    if capacity is None:
        return ()
    # Of several pipeline stages the one that takes most of a GPU, in whichever phase: where it fits, all do.
    each = [_gpus_of_stage(facts, plan, stage, capacity) for stage in plan.stages or (None,)]
    return max(each, key=lambda gpus: max((gpu.peak for gpu in gpus), default=0))


def _gpus_of_stage(
    facts: Facts, plan: MemoryPlan, trainer: TrainerMemory | None, capacity: int
) -> tuple[GpuMemory, ...]:
    config = facts.config
    num_engine_gpus = config.rollout.num_engines * num_reserved_gpus(config) if plan.engine is not None else 0
    num_trainer_gpus = config.trainer.num_gpus if trainer is not None else 0
    trainer_rows: tuple[MemoryRow, ...] = ()
    if trainer is not None and num_trainer_gpus:
        trainer_rows = tuple(_trainer_rows(facts, trainer, plan.largest_tensor_bytes))
    phases = {
        "train": tuple(Phase),
        "rollout_only": (Phase.START, Phase.ROLLOUT),
        "train_only": (Phase.LOAD, Phase.TRAIN),
    }[config.run.mode]
    is_shared = config.cluster.colocate and num_engine_gpus > 0 and num_trainer_gpus > 0
    beside = sum(row.num_bytes for row in trainer_rows if Phase.START in row.phases) if is_shared else 0
    engine_rows: tuple[MemoryRow, ...] = ()
    if num_engine_gpus:
        assert plan.engine is not None, "there are GPUs of engines"
        engine_rows = tuple(_engine_rows(facts, plan.engine, capacity, beside))
    if is_shared:
        holders = "an engine's and a trainer rank's"
        return (GpuMemory(num_engine_gpus, holders, capacity, phases, trainer_rows + engine_rows),)
    if engine_rows and facts.trains_with_pushes:
        engine_rows += (_buckets(facts, plan.largest_tensor_bytes),)
    parts = ((num_engine_gpus, "an engine's", engine_rows), (num_trainer_gpus, "a trainer rank's", trainer_rows))
    return tuple(GpuMemory(count, holder, capacity, phases, rows) for count, holder, rows in parts if count)


def _trainer_rows(facts: Facts, trainer: TrainerMemory, largest_tensor_bytes: int) -> Iterator[MemoryRow]:
    config, always = facts.config, frozenset(Phase)
    kept = TRAINER_PHASES if config.trainer_leaves else always
    settings = config.trainer
    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    where = f"TP {tensor}, PP {pipeline}" + (
        f", EP {spread}" if (spread := settings.expert_model_parallel_size) > 1 else ""
    )
    stage = f" of stage {trainer.stage}" if trainer.num_stages > 1 else ""
    count = f"{trainer.num_parameters:,} parameters{stage} ({where})"
    yield MemoryRow("trainer: context", CONTEXT_BYTES, "CUDA and its libraries", always)
    yield MemoryRow("trainer: weights", trainer.weights_bytes, f"{count} x {trainer.itemsize}", kept | {Phase.PUSH})
    yield MemoryRow("trainer: gradients", trainer.gradient_bytes, f"x {FLOAT32_BYTES}", kept)
    per_parameter = trainer.optimizer_bytes // trainer.num_updated
    updated = f"{trainer.num_updated:,} of them x {per_parameter}"
    yield MemoryRow("trainer: optimizer", trainer.optimizer_bytes, updated, kept)
    if trainer.reference_bytes:
        yield MemoryRow("trainer: reference", trainer.reference_bytes, f"x {trainer.itemsize}", kept)
    if (draft := trainer.draft) is not None:
        what = f"{draft.num_parameters:,} parameters x {draft.state_bytes // draft.num_parameters}"
        yield MemoryRow("trainer: draft", draft.state_bytes, what, kept)
        if config.trainer_leaves:
            weights = draft.num_parameters * FLOAT32_BYTES
            yield MemoryRow("trainer: draft's weights", weights, f"x {FLOAT32_BYTES}", frozenset({Phase.PUSH}))
    yield from _step_rows(trainer)
    if facts.trains_with_pushes:
        gathered = f"2 x {_gb(largest_tensor_bytes)} gathered"
        yield _buckets(facts, largest_tensor_bytes, 2 * largest_tensor_bytes, gathered)


def _buckets(facts: Facts, largest_tensor_bytes: int, beside: int = 0, what: str = "") -> MemoryRow:
    """Return the row of a push's buckets: the one that the engines take and the next.

    The trainer has ``beside`` them a tensor that is gathered from its ranks and joined.
    """
    bucket = max(facts.config.push.bucket_bytes, largest_tensor_bytes)
    arithmetic = " + ".join(filter(None, (what, f"2 x {_gb(bucket)}")))
    return MemoryRow("push: buckets", beside + 2 * bucket, arithmetic, frozenset({Phase.PUSH}))


def _step_rows(trainer: TrainerMemory) -> Iterator[MemoryRow]:
    """Yield what a step adds at its peak: a microbatch's passes, or later the draft's updates, or the policy's."""
    train, draft = frozenset({Phase.TRAIN}), trainer.draft
    replies = 0 if draft is None else draft.replies_bytes
    passes = trainer.activation_bytes + trainer.logits_bytes
    of_draft = 0 if draft is None else draft.update_bytes
    if trainer.update_bytes > replies + max(passes, of_draft):
        yield MemoryRow("trainer: update", trainer.update_bytes, "AdamW's float32 copy of what it updates", train)
        return
    if draft is not None:
        yield MemoryRow("trainer: draft's replies", replies, f"states of {draft.num_replies:,} replies", train)
        if of_draft > passes:
            parts = (
                f"{_gb(draft.inputs_bytes)} inputs + {_gb(draft.head_bytes)} head + {_gb(draft.logits_bytes)} logits"
            )
            yield MemoryRow("trainer: draft's update", of_draft, parts, train)
            return
    how = "recomputed: a layer's inputs, all of one layer" if trainer.recomputes else "all layers"
    yield MemoryRow("trainer: activations", trainer.activation_bytes, f"{trainer.num_tokens:,} tokens, {how}", train)
    copies = f"1 x {trainer.itemsize} + {FLOAT32_LOGITS} x {FLOAT32_BYTES} bytes each"
    if trainer.logits_bytes:
        yield MemoryRow("trainer: logits", trainer.logits_bytes, copies, train)


def _engine_rows(facts: Facts, engine: EngineMemory, capacity: int, beside: int) -> Iterator[MemoryRow]:
    always = frozenset(Phase)
    held = ENGINE_PHASES if facts.config.engines_leave else always - {Phase.LOAD}
    at_work = held - {Phase.PUSH}  # a prefill's activations, which a push does not need
    yield MemoryRow("engine: context", CONTEXT_BYTES, "CUDA and its libraries", always - {Phase.LOAD})
    weights = (engine.target_bytes + engine.draft_bytes) // engine.num_gpus
    what = f"({_gb(engine.target_bytes)} target + {_gb(engine.draft_bytes)} draft) / {engine.num_gpus}"
    yield MemoryRow("engine: weights", weights, what, held)
    if not facts.on_sglang:
        if facts.trains_with_pushes:
            arriving = engine.target_bytes // engine.num_gpus
            yield MemoryRow("engine: new weights", arriving, "beside those that serve", frozenset({Phase.PUSH}))
        yield MemoryRow(CACHE, engine.bound_bytes, "as bounded by the settings", held)
        at_once = max(engine.round_bytes, engine.prefill_bytes)
        yield MemoryRow("engine: activations", at_once, "hidden states and logits of a round, or of prompts", at_work)
        yield MemoryRow("engine: graphs", engine.round_bytes, "those of a round once more", held)
        return
    num_sequences, flags = facts.config.engine.max_running_requests, facts.flags
    free = capacity - beside - CONTEXT_BYTES
    fraction = sglang.static_fraction(flags, capacity, num_sequences, facts.speculates)
    cache = max(0, int(fraction * free) - weights)
    how = f"{fraction:.3g} of the {_gb(free)} free at the start, less the weights"
    if facts.config.engine.max_total_tokens is not None and engine.pool_bytes < cache:
        cache, how = engine.pool_bytes, f"{facts.config.engine.max_total_tokens:,} tokens"
    yield MemoryRow(CACHE, cache, how, held)
    tokens = sglang.prefill_tokens(flags, capacity)
    yield MemoryRow(
        "engine: activations", sglang.activation_bytes(flags, capacity), f"SGLang's for {tokens:,} tokens", at_work
    )
    if facts.uses_graphs:
        graphs = sglang.graph_bytes(flags, num_sequences, facts.speculates)
        yield MemoryRow("engine: graphs", graphs, f"SGLang's for {num_sequences} sequences", held)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.3g} GB"
