"""These checks test that this machine's GPUs have the memory that the run needs; a cluster's GPUs are not judged."""

from __future__ import annotations

from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, always, on_sglang, trap
from slime_spec.preflight.memory import plan_memory

GB = 1e9


@trap(
    "engine-memory",
    "A server whose weights do not fit ends while loading. What they leave of --sglang-mem-fraction-static is the KV "
    "cache; where that does not hold every sequence at its longest, some wait or are computed again.",
    "https://github.com/THUDM/slime/issues/693",
    "https://github.com/THUDM/slime/issues/1022",
    applies=on_sglang,
)
def engine_memory(facts: Facts) -> Sighting | None:
    plan = plan_memory(facts)
    if not facts.gpu_bytes or plan.engine is None or not plan.engine.num_gpus:
        return None
    engine, gpu_bytes = plan.engine, min(facts.gpu_bytes)
    room = gpu_bytes * (plan.mem_fraction_static or 1.0)
    weights = (engine.target_bytes + engine.draft_bytes) / engine.num_gpus
    read = (
        f"of each GPU's {gpu_bytes / GB:.3g} GB a server has {room / GB:.3g} GB, its weights take {weights / GB:.3g} GB"
    )
    if weights >= room:
        return Sighting(
            Severity.ERROR, read, "Pass a larger --rollout-num-gpus-per-engine, or --sglang-mem-fraction-static 0.9."
        )
    if engine.gpu_bytes <= room:
        return None
    cache = engine.gpu_bytes - weights
    num_fitting = int((room - weights) / cache * engine.num_sequences)
    return Sighting(
        Severity.INFO,
        f"{read}; the rest holds {num_fitting} of {engine.num_sequences} sequences at their longest",
        "Lower --sglang-max-running-requests where samples are often that long.",
    )


@trap(
    "trainer-memory",
    "A rank's parameters, gradients and optimizer states are split by tensor and pipeline parallelism alone; data "
    "parallel ranks each have all of them.",
    "https://github.com/NVIDIA/Megatron-LM",
    applies=always,
)
def trainer_memory(facts: Facts) -> Sighting | None:
    trainer = plan_memory(facts).trainer
    if not facts.gpu_bytes or trainer is None or not facts.config.trainer.num_gpus:
        return None
    if trainer.total_bytes < min(facts.gpu_bytes):
        return None
    return Sighting(
        Severity.ERROR,
        f"a trainer rank takes {trainer.total_bytes / GB:.3g} GB without activations, a GPU has "
        f"{min(facts.gpu_bytes) / GB:.3g} GB",
        "Raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or pass --train-dtype bfloat16.",
    )
