"""Show a plan as text: sections of facts, one fact per line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from slime_spec.agents.own import POSITIONAL
from slime_spec.columns import fitted
from slime_spec.config.draft_training import loss_for
from slime_spec.config.pipeline_stages import stage_layers
from slime_spec.config.tree import TaskConfig
from slime_spec.launch.dry_run.placement import counted, placement_lines
from slime_spec.launch.dry_run.plan import Plan, PlannedServer
from slime_spec.launch.preflight import ONLY_THE_START_KNOWS
from slime_spec.preflight.finding import Severity
from slime_spec.preflight.memory import EngineMemory
from slime_spec.preflight.memory_table import table_lines
from slime_spec.preflight.report import as_flags, brief, headline, width
from slime_spec.transports.choice import OBJECT_STORE, transport_name

FOLD_AT = 96  # columns
# The flags in which equal servers differ.
PLACE = ("--host", "--port", "--node-rank", "--dist-init-addr", "--weight-version")


def show_plan(plan: Plan) -> None:
    """Print the plan, the findings of preflight, and whether a launch would go on."""
    console = Console(width=width(), highlight=False)
    for heading, lines in sections(plan).items():
        console.print(heading, style="bold", markup=False)
        for line in lines:  # a server's command stays as a shell reads it
            text = f"  {line}"
            console.print(text if "\\\n" in text else fitted(text, width(), " " * 6), markup=False, soft_wrap=True)
    console.print("preflight", style="bold")
    skipped = plan.facts.config.run.skip_checks
    for finding in plan.findings:
        if finding.severity is not Severity.INFO:
            console.print(Text("  ") + headline(finding, skipped))
            remedy = "" if finding.id in skipped else f"\n    -> {finding.remedy}"
            read = finding.read.partition("\n")[0]  # a table of memory stands above
            console.print(fitted(f"    {read}", width(), " " * 6) + remedy, markup=False, soft_wrap=True)
    if infos := [each for each in plan.findings if each.severity is Severity.INFO]:
        console.print(brief(infos))
    if fix := as_flags(plan.findings):
        console.print(f"  to add: {fix}", markup=False, soft_wrap=True)
    console.print(f"  only the start knows {ONLY_THE_START_KNOWS}", markup=False)
    stopping = ", ".join(dict.fromkeys(each.id for each in plan.stopping))
    console.print(
        f"  a launch would stop here: {stopping}" if stopping else "  a launch would go on", style="bold", markup=False
    )


def sections(plan: Plan) -> dict[str, list[str]]:
    return {
        "run": list(_run(plan)),
        "placement": list(_placement(plan)),
        **({"engine": list(_engine(plan))} if plan.facts.config.run.mode != "train_only" else {}),
        "first prompt": [plan.first_prompt or "unknown: an input of the run is missing or refused"],
        "transport": [plan.transport],
        f"memory (from {plan.memory.source})": list(_memory(plan)),
    }


def _run(plan: Plan) -> Iterator[str]:
    config, target = plan.facts.config, plan.facts.target
    rollout = config.rollout
    yield (
        f"mode {config.run.mode}, {config.run.num_rollout} rollouts of {rollout.batch_size} prompts x "
        f"{rollout.n_samples_per_prompt} samples, at most {rollout.max_prompt_len} + {rollout.max_response_len} "
        f"tokens, temperature {rollout.temperature:g}"
    )
    own = [f"{name} {path}" for name in POSITIONAL if (path := getattr(config.custom, name)) is not None]
    if own:
        context = f", at most {rollout.longest} tokens over all turns" if config.custom.makes_samples else ""
        yield f"functions: {', '.join(own)}{context}"
    yield _source(config.task)
    yield from (f"evaluated every {counted(config.eval.interval or 0, 'step')}: {each}" for each in plan.evaluations)
    yield f"target {target.folder}: {target.architecture}, {target.dtype}, context {target.context_length}"
    if plan.facts.draft is not None:
        draft, kind = plan.facts.draft, plan.facts.draft_kind
        what = "its own MTP layer" if kind == "in_target" else f"{draft.folder}: {draft.architecture}, {draft.dtype}"
        yield f"draft {what}, context {draft.context_length}"
        if config.trains_draft and (draft_format := plan.facts.draft_format) is not None:
            yield f"draft in training: loss {loss_for(config.draft_training, draft_format.family)}"


def _source(task: TaskConfig) -> str:
    data = ", ".join(task.prompt_data_mix) or task.prompt_data
    if data is None:
        return f"prompts and rewards of the tasks {', '.join(task.names)}"
    return f"prompts of {data}, keys {task.input_key} and {task.label_key}, reward {task.reward}"


def _placement(plan: Plan) -> Iterator[str]:
    config, bundles = plan.facts.config, plan.bundles
    num_gpus = sum(bundle.num_gpus for bundle in bundles.bundles)
    shared = bundles.engine_bundles and set(bundles.engine_bundles) <= set(bundles.rank_bundles)
    gpus = f"{num_gpus:g} GPU{'s' * (num_gpus != 1)}"
    yield f"{counted(len(bundles.bundles), 'bundle')}: {bundles.num_cpus:g} cores and {gpus} in all" + (
        "; engines and trainer take turns on them" if shared else ""
    )
    yield from placement_lines(bundles)
    if bundles.rank_bundles:
        trainer = config.trainer
        if plan.host is not None and plan.host.num_nodes > 1:
            yield f"{plan.host.num_nodes} nodes of {plan.host.num_ranks} GPUs"
        tensor, pipeline = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
        spread = trainer.expert_model_parallel_size
        yield f"trainer: TP {tensor} x PP {pipeline} x DP {trainer.world_size // (tensor * pipeline)}" + (
            f", experts over {spread} ranks of a stage" if spread > 1 else ""
        )
        if len(plan.memory.stages) > 1:
            layers = stage_layers(plan.facts.target.config["num_hidden_layers"], trainer)
            yield f"  layers of the stages: {', '.join(str(len(each)) for each in layers)}"


def _engine(plan: Plan) -> Iterator[str]:
    config, spec = plan.facts.config, plan.facts.config.speculative
    release = plan.facts.release
    version = f", SGLang {release.text}{'' if release.is_installed else ' (pinned; none is installed)'}"
    yield (
        f"{config.rollout.num_engines} x {config.rollout.engine}, "
        f"{counted(config.rollout.num_gpus_per_engine, 'GPU')} each, "
        f"{config.engine.dtype}{version if plan.facts.on_sglang else ''}"
    )
    if plan.facts.speculates:
        shape = plan.facts.shape
        most = "at most " if spec.is_automatic and not plan.facts.on_sglang else ""
        yield (
            f"speculation {spec.algorithm}: {most}num_steps {shape.num_steps}, topk {shape.topk}, "
            f"{shape.num_draft_tokens} tokens verified a round{', as many as pay' if most else ''}"
        )
    else:
        yield "no speculation: nothing drafts (slime-spec tune with the same flags measures what would pay)"
    router = config.sglang_server
    if router.router or router.router_addr:
        yield f"requests go through an sglang-router{f' at {router.router_addr}' if router.router_addr else ''}"
    yield from _servers(plan)


def _servers(plan: Plan) -> Iterator[str]:
    """Return each command that differs from the earlier ones in more than its place, and the others' places."""
    if plan.facts.config.sglang_server.external_addrs:
        yield from (f"server of engine {each.engine}: {each.address}, started by someone else" for each in plan.servers)
        return
    alike: dict[tuple[str, ...], list[PlannedServer]] = {}
    for server in plan.servers:
        alike.setdefault(_without_place(server.command), []).append(server)
    for first, *others in alike.values():
        yield f"server of {_name(first)}: {_folded(first.command)}"
        if others:
            rank = ", each with its --node-rank" if any(each.node for each in others) else ""
            yield f"  the same for {', '.join(f'{_name(each)} at {each.address}' for each in others)}{rank}"


def _name(server: PlannedServer) -> str:
    return f"engine {server.engine}" + (f" node {server.node}" if server.node else "")


def _without_place(command: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for before, word in pairwise(("", *command)) if before not in PLACE and word not in PLACE)


def _folded(command: tuple[str, ...]) -> str:
    """Fold the literal command line so that a shell still reads one command."""
    lines = [""]
    for word in map(shlex.quote, command):
        is_flag = word.startswith("--")
        if is_flag and len(lines[-1]) > FOLD_AT:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return " \\\n      ".join(lines)


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    if memory.engine is None and memory.trainer is None:
        yield "unknown: config.json does not give the sizes of a decoder"
    if memory.engine is not None:
        yield from _engine_memory(memory.engine)
    if memory.trainer is not None:
        trainer = memory.trainer
        reference = f" + reference {_size(trainer.reference_bytes)}" if trainer.reference_bytes else ""
        draft = f" + draft in training {_size(trainer.draft_bytes)}" if trainer.draft_bytes else ""
        yield (
            f"one trainer rank: {_size(trainer.kept_bytes)} = {trainer.num_parameters:,} parameters "
            f"{_size(trainer.weights_bytes)} + gradients {_size(trainer.gradient_bytes)} + optimizer "
            f"{_size(trainer.optimizer_bytes)}{reference}{draft}; a microbatch adds activations "
            f"{_size(trainer.activation_bytes)} + logits {_size(trainer.logits_bytes)}"
        )
        if trainer.draft is not None:
            yield (
                f"  of the draft in training a step adds the states of {counted(trainer.draft.num_replies, 'sample')}, "
                f"{_size(trainer.draft.replies_bytes)}, and an update {_size(trainer.draft.update_bytes)}"
            )
        if plan.facts.config.trainer_leaves and plan.facts.config.trainer.num_gpus:
            yield f"  in host memory while engines generate: {_size(trainer.host_bytes)} of each rank, pinned"
    if memory.push_bytes is not None:
        copies = f", {memory.push_copies} of them at a time" if memory.push_copies > 1 else ""
        shared = f" in shared memory{copies}" if transport_name(plan.facts.config) == OBJECT_STORE else ""
        yield f"one push: {_size(memory.push_bytes)}{shared}"
    if plan.host is not None:
        replayed = f" + replayed experts {_size(plan.host.replay_bytes)}" if plan.host.replay_bytes else ""
        yield (
            f"host memory of a node: {_size(plan.host.total_bytes)} = {counted(plan.host.num_ranks, 'rank')} "
            f"{_size(plan.host.trainer_bytes)} + pushes {_size(plan.host.push_bytes)}{replayed}"
        )
    yield from table_lines(plan.gpus)
    if plan.facts.gpu_bytes:
        yield f"this machine: {counted(len(plan.facts.gpu_bytes), 'GPU')} of {_size(min(plan.facts.gpu_bytes))}"


def _engine_memory(engine: EngineMemory) -> Iterator[str]:
    copies = f" x {engine.kv_copies} copies" if engine.kv_copies > 1 else ""
    yield (
        f"one engine: {_size(engine.total_bytes)} = target {_size(engine.target_bytes)} + draft "
        f"{_size(engine.draft_bytes)} + KV {_size(engine.kv_bytes)}{copies} (for {engine.num_sequences} of the longest "
        f"sequences, {engine.kv_bytes_per_token} bytes a token)"
    )
    if engine.num_gpus:
        where = "its GPU" if engine.num_gpus == 1 else f"each of its {engine.num_gpus} GPUs"
        yield f"  on {where}: {_size(engine.gpu_bytes)}"


def _size(num_bytes: int) -> str:
    """Format a size in the unit that gives a number from 1 to 999; a GB is 10^9 bytes."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes"
