"""Write the help of the command line from the configuration tree."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from slime_spec.algorithms import LOOKUP, NEXTN, STANDALONE
from slime_spec.config.schema import Setting, nodes, settings
from slime_spec.launch.flags import SP_TYPES
from slime_spec.launch.groups import GROUPS, choices
from slime_spec.launch.slime.megatron import num_values_of_megatron
from slime_spec.launch.slime.model_shape import NAMES
from slime_spec.launch.slime.together import MEANINGS, TEXTS
from slime_spec.launch.slime.without_effect import WITHOUT_EFFECT
from slime_spec.sglang.flags import sglang_flags, sglang_version

WIDTH = 116
DRY_RUN = "--dry-run"  # flag of train and rollout: print the plan and start nothing
COMMANDS = """\
slime-spec: speculative decoding that pays in RL rollouts

  slime-spec train [flags]                          rollout, policy step, weight push, every step
  slime-spec rollout [flags]                        rollouts only, samples to samples.jsonl
  slime-spec eval CHECKPOINT [flags] [--json FILE]  evaluate a checkpoint: accuracy, pass@k, acceptance
  slime-spec config [flags]                         print the resolved configuration and exit
  slime-spec doctor [flags] [--json] [--fix]        check a configuration against every known trap, starting nothing
  slime-spec tune [flags] [--draft DIR] [--quick]   measure what speculation pays with your model, drafts and prompts
  slime-spec report RUN [RUN ...] [--out FILE] [--watch]   write one HTML page of runs: charts, samples, settings
  slime-spec serve [flags]                          answer SGLang's HTTP API with one embedded engine
  slime-spec port SCRIPT [--run] [-- flags]         print what a launch script of slime's is here, or run it
  slime-spec models fetch NAME [--output DIR]       make a model's Hugging Face checkpoint folder (smollm2-135m)
  slime-spec draft train --target DIR --out DIR     train a draft on the target's own replies
  slime-spec draft eval --target DIR --draft DIR    measure its acceptance by position, on replies of the target
  slime-spec draft convert --draft DIR --target DIR --out DIR --to LAYOUT    write a draft in another layout
  slime-spec bench NAME [--json FILE]   main-job, engine, device, sglang, pays, drafts, coordinator or robustness
  slime-spec completion bash|zsh                    print a script that completes commands and flags

`slime-spec train --help` explains every flag; `slime-spec --version` says which release this is."""

CONFIG = """\
slime-spec config [--config NAME|PATH.yaml] [group=NAME | --flag VALUE | path=value] ...

Prints every setting as train would have it, as a file that --config PATH.yaml reads again, and says in notes which
settings have no effect. It takes the flags of train (`slime-spec train --help` explains them), reads no checkpoint,
starts nothing, and refuses what train would refuse of the flags alone. `slime-spec train --dry-run` looks at files and
machines, too.

  slime-spec config --config smollm2-135m --lr 1e-6 > mine.yaml
  slime-spec train --config mine.yaml --num-rollout 5
  slime-spec config --config slime --actor-num-nodes 2 --colocate --n-samples-per-prompt 8 --prompt-data FILE.jsonl"""

BENCH = """\
slime-spec bench NAME [flags]

NAME is main-job (the whole RL loop), engine (generation, with and without speculation, against other engines), device
(copy, matmul, passes of models of known shapes with random weights, bytes between processes), sglang (the SGLang engine
on real servers: exact output, true counters, pushes, stale drafts, restart, offload, speed), pays (what speculation
gains at 64, 8, 4 and 1 sequences at once: the depth that the engine decides, against off and fixed depths), drafts
(whole runs: a draft that stays, one that learns, one that begins with nothing, tasks that change), coordinator (the
driver's Python a sample, for 16 to 1,024 engines) or robustness (hostile checkpoints, command lines, HTTP bodies and
data: no traceback, no hang, no NaN).
`slime-spec bench NAME --help` explains its flags."""


def draft_help() -> str:
    """Return the help of ``slime-spec draft``: its actions, each of which has a help of its own."""
    actions = [line for line in COMMANDS.splitlines() if line.startswith("  slime-spec draft ")]
    return "\n".join(
        ["slime-spec draft ACTION [flags]", "", *actions, "", "`slime-spec draft train --help` explains its flags."]
    )


def train_help(command: str = "train") -> str:
    """Return the help on every flag of train and rollout, by node, with defaults and meanings."""
    return "\n".join(_lines(command))


def _lines(command: str) -> Iterator[str]:
    yield f"slime-spec {command} [--config NAME|PATH.yaml] [group=NAME | --flag VALUE | path=value] ..."
    yield ""
    yield "Groups (--config NAME is experiment=NAME; a choice here replaces the experiment's)"
    for group in GROUPS:
        yield from _wrapped(f"{group}={', '.join(choices(group))}", indent="  ")
    yield ""
    yield from _wrapped(
        "A flag and a path=value are two spellings of one setting (--lr 1e-6, trainer.lr=1e-6); hyphens and "
        "underscores are the same, --flag=VALUE works too, a switch is --flag, --no-flag or --flag=false, and the "
        "last spelling of a setting wins."
    )
    for node, cls in nodes().items():
        yield ""
        yield from _wrapped(f"{node}: {cls.__doc__}")
        for setting in settings().values():
            if setting.node == node:
                yield from _setting(setting)
    yield ""
    yield "Modes"
    yield "  --debug-rollout-only    run.mode=rollout_only"
    yield "  --debug-train-only      run.mode=train_only"
    yield "  --dry-run               print placement, servers, transport, memory and preflight; start nothing"
    yield "slime's flags that set something together"
    for name, meaning in MEANINGS.items():
        yield f"  {name} {'TEXT' if name in TEXTS else 'N'}"
        yield from _wrapped(meaning, indent=" " * 6)
    yield "slime's flags that are accepted without effect (docs/coming-from-slime.md says why)"
    yield from _wrapped(" ".join((*WITHOUT_EFFECT, *sorted(NAMES))), indent="  ")
    yield from _wrapped(
        f"Megatron-LM's {len(num_values_of_megatron())} flags are known: what has no effect is told in a note, what "
        "would change the run is refused with a remedy (docs/megatron-flags.md).",
        indent="  ",
    )
    yield "RTP-LLM's names"
    yield f"  --sp-type {'|'.join(SP_TYPES)}    speculative.algorithm"
    yield from _wrapped(
        f"{LOOKUP.rtp_llm} is {LOOKUP.name}, {STANDALONE.rtp_llm} {STANDALONE.name}, {NEXTN.rtp_llm} {NEXTN.name}. "
        f"{NEXTN.name} drafts with the MTP layer of the target itself; "
        f"SGLang's spelling of it, {NEXTN.sglang} with the target's folder as the draft's, means the same.",
        indent=" " * 6,
    )
    yield "  --gen-num-per-cycle K    speculative.num_steps=K: a chain of K drafts"
    yield "  --sp-quantization INT8|FP8    speculative.draft_model_quantization"
    yield ""
    yield from _wrapped(
        f"sglang: each of the {len(sglang_flags())} ServerArgs flags of SGLang {sglang_version()} is accepted as "
        "--sglang-<flag> (or sglang.<flag>=value), typed and checked; --speculative-<flag> means "
        "--sglang-speculative-<flag>. Lists take several values: --sglang-cuda-graph-bs $(seq 1 32) $(seq 40 8 64)."
    )


def _setting(setting: Setting) -> Iterator[str]:
    flags, default = ", ".join(setting.flags), f"{setting.path}={_shown(setting.default)}"
    value = "" if setting.type is bool else f" {_placeholder(setting)}"
    listed = bool(setting.choices) and len(flags) + len(value) + len(default) > WIDTH - 6  # in lines of their own
    yield f"  {flags}{' CHOICE' if listed else value}    {default}"
    if listed:
        yield from _wrapped(f"CHOICE is {', '.join(setting.choices)}.", indent=" " * 6)
    yield from _wrapped(setting.help, indent=" " * 6)


def _placeholder(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {str: "TEXT", int: "N", float: "X"}[setting.type] + (" ..." if setting.is_tuple else "")


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return f"[{','.join(str(item) for item in default)}]"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
