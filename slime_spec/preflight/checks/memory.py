"""These checks test that GPUs have the memory that the run needs: this machine's, or as --gpu-memory-gb says."""

from __future__ import annotations

from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, always, on_sglang, trap
from slime_spec.preflight.gpu_memory import CACHE, GB, Phase, plan_gpus
from slime_spec.preflight.memory import plan_memory
from slime_spec.preflight.memory_table import table_lines


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
    caches = [cache for each in plan_gpus(facts, plan) if (cache := each.bytes_of(CACHE)) is not None]
    if plan.engine is None or not caches:
        return None
    engine, cache = plan.engine, caches[0]
    weights = (engine.target_bytes + engine.draft_bytes) / engine.num_gpus
    read = f"on each GPU a server's weights take {weights / GB:.3g} GB and leave {cache / GB:.3g} GB to its KV cache"
    if not cache:
        return Sighting(
            Severity.ERROR, read, "Pass a larger --rollout-num-gpus-per-engine, or --sglang-mem-fraction-static 0.9."
        )
    wanted = engine.gpu_bytes - weights
    if wanted <= cache:
        return None
    return Sighting(
        Severity.INFO,
        f"{read}, which holds {int(cache / wanted * engine.num_sequences)} of {engine.num_sequences} sequences at "
        "their longest",
        "Lower --sglang-max-running-requests where samples are often that long.",
    )


@trap(
    "gpu-memory",
    "Engines and trainer share GPUs by turns, or have their own; a phase that needs more than a GPU has ends in the "
    "middle of a run. Counted are weights, KV cache, gradients, optimizer states, activations, logits, CUDA graphs, "
    "contexts and a push's buckets, by phase; a dry run shows the table.",
    "https://github.com/THUDM/slime/issues/693",
    "https://github.com/NVIDIA/Megatron-LM",
    applies=always,
)
def gpu_memory(facts: Facts) -> Sighting | None:
    plan = plan_memory(facts)
    overfull = [each for each in plan_gpus(facts, plan) if each.overfull]
    if not overfull:
        return None
    worst = {phase: each.total(phase) for each in overfull for phase in each.overfull}
    needs = ", ".join(f"{phase} {num_bytes / GB:.1f} GB" for phase, num_bytes in worst.items())
    table = "\n".join(table_lines(overfull))
    return Sighting(Severity.ERROR, f"more than a GPU has: {needs}\n{table}", _remedy(facts, tuple(worst)))


def _remedy(facts: Facts, overfull: tuple[Phase, ...]) -> str:
    """Return what lowers the phases that do not fit."""
    config, ways = facts.config, []
    if config.run.mode == "train" and config.cluster.colocate:
        if not config.cluster.offload_train:
            ways.append("pass --offload-train")
        if not config.cluster.offload:
            ways.append("pass --offload")
    if {Phase.LOAD, Phase.TRAIN} & set(overfull):
        ways.append("raise --tensor-model-parallel-size or --pipeline-model-parallel-size")
        if config.trainer.dtype == "float32":
            ways.append("pass --train-dtype bfloat16")
        if Phase.TRAIN in overfull:
            ways.append("lower --max-tokens-per-gpu" if config.trainer.recompute else "pass --recompute-activations")
    if {Phase.START, Phase.ROLLOUT, Phase.PUSH} & set(overfull):
        ways.append(
            "lower --sglang-mem-fraction-static or raise --rollout-num-gpus-per-engine"
            if facts.on_sglang
            else "lower --kv-cache-gb"
        )
    text = "; or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."
