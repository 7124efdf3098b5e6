"""A plan as text: sections of facts, one a line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console

from slime_spec.launch.doctor.report import STYLES, as_flags, width
from slime_spec.launch.dry_run.memory import MemoryPlan
from slime_spec.launch.dry_run.plan import Plan

GB = 1e9
PORT = re.compile(r" --port \d+")


def show_plan(plan: Plan) -> None:
    """Print the plan; ends with what preflight says and whether a launch would go on."""
    console = Console(width=width(), highlight=False)
    for heading, lines in sections(plan).items():
        console.print(heading, style="bold", markup=False)
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("preflight", style="bold")
    for finding in plan.findings:
        console.print(f"  {finding.severity.value} {finding.id}", style=STYLES[finding.severity], markup=False)
        console.print(f"    {finding.read}\n    -> {finding.remedy}", markup=False, soft_wrap=True)
    if fix := as_flags(plan.findings):
        console.print(f"  flags that mend this: {fix}", markup=False, soft_wrap=True)
    stopping = ", ".join(each.id for each in plan.stopping)
    console.print(
        f"  a launch would stop here: {stopping}" if stopping else "  a launch would go on", style="bold", markup=False
    )


def sections(plan: Plan) -> dict[str, list[str]]:
    return {
        "run": list(_run(plan)),
        "placement": list(_placement(plan)),
        "engine": list(_engine(plan)),
        "transport": [plan.transport],
        f"memory (from {plan.memory.source}; activations and CUDA graphs come on top)": list(_memory(plan.memory)),
    }


def _run(plan: Plan) -> Iterator[str]:
    config, target = plan.facts.config, plan.facts.target
    rollout = config.rollout
    yield (
        f"mode {config.run.mode}, {config.run.num_rollout} rollouts of {rollout.batch_size} prompts x "
        f"{rollout.n_samples_per_prompt} samples, at most {rollout.max_prompt_len} + {rollout.max_response_len} "
        f"tokens, temperature {rollout.temperature:g}"
    )
    yield f"target {target.folder}: {target.architecture}, {target.dtype}, context {target.context_length}"
    if plan.facts.draft is not None:
        draft, kind = plan.facts.draft, plan.facts.draft_kind
        what = "its own MTP layer" if kind == "in_target" else f"{draft.folder}: {draft.architecture}, {draft.dtype}"
        yield f"draft {what}, context {draft.context_length}"


def _placement(plan: Plan) -> Iterator[str]:
    config, bundles = plan.facts.config, plan.bundles
    num_gpus = sum(bundle.num_gpus for bundle in bundles.bundles)
    shared = set(bundles.engine_bundles) & set(bundles.rank_bundles)
    yield f"{len(bundles.bundles)} bundles, {bundles.num_cpus:g} cores and {num_gpus:g} GPUs in all" + (
        f"; {len(shared)} shared by engines and trainer, which take turns" if shared else ""
    )
    for index, bundle in enumerate(bundles.bundles):
        held = [f"engine {i}" for i, at in enumerate(bundles.engine_bundles) if at == index]
        held += [f"trainer rank {i}" for i, at in enumerate(bundles.rank_bundles) if at == index]
        yield f"bundle {index}: {bundle.num_cpus:g} cores, {bundle.num_gpus:g} GPUs: {', '.join(held)}"
    if bundles.rank_bundles:
        trainer = config.trainer
        tensor, pipeline = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
        yield f"trainer {trainer.backend}: TP {tensor} x PP {pipeline} x DP {trainer.world_size // (tensor * pipeline)}"


def _engine(plan: Plan) -> Iterator[str]:
    config, spec = plan.facts.config, plan.facts.config.speculative
    release = plan.facts.release
    version = f", SGLang {release.text}{'' if release.is_installed else ' (pinned; none is installed)'}"
    yield (
        f"{config.rollout.num_engines} x {config.rollout.engine}, {config.rollout.num_gpus_per_engine} GPUs each, "
        f"{config.engine.dtype}{version if plan.facts.on_sglang else ''}"
    )
    if plan.facts.speculates:
        shape = plan.facts.shape
        yield (
            f"speculation {spec.algorithm}: num_steps {shape.num_steps}, topk {shape.topk}, "
            f"{shape.num_draft_tokens} tokens verified a round"
        )
    shown: dict[str, int] = {}
    for index, command in enumerate(plan.servers):
        first = shown.setdefault(PORT.sub("", command), index)
        yield f"server {index}: " + (command if first == index else f"as server {first} with{PORT.findall(command)[0]}")


def _memory(memory: MemoryPlan) -> Iterator[str]:
    if memory.engine is None and memory.trainer is None:
        yield "unknown: config.json does not give the sizes of a decoder"
    if memory.engine is not None:
        engine = memory.engine
        yield (
            f"one engine: {engine.total_bytes / GB:.3g} GB = target {engine.target_bytes / GB:.3g} + draft "
            f"{engine.draft_bytes / GB:.3g} + KV {engine.kv_bytes / GB:.3g} ({engine.num_sequences} longest sequences, "
            f"{engine.kv_bytes_per_token} bytes a token)"
        )
    if memory.trainer is not None:
        trainer = memory.trainer
        yield (
            f"one trainer rank: {trainer.total_bytes / GB:.3g} GB = {trainer.num_parameters / GB:.3g} billion "
            f"parameters {trainer.weights_bytes / GB:.3g} + gradients {trainer.gradient_bytes / GB:.3g} + optimizer "
            f"{trainer.optimizer_bytes / GB:.3g}"
        )
    if memory.push_bytes is not None:
        yield f"one push: {memory.push_bytes / GB:.3g} GB in shared memory"
