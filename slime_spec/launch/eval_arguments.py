"""The command line of ``slime-spec eval`` becomes a run's configuration that evaluates and trains nothing.

CHECKPOINT                   its weights            configuration that the flags are laid over
a Hugging Face folder        the engines load it    conf/'s defaults
a run's folder               its export in hf/      the run's config.yaml
a run's checkpoints, or a    a trainer loads it,    the run's config.yaml, where the folder is in a run's
folder step-NNNNNN           and pushes it
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from slime_spec.config.eval_sets import eval_sets
from slime_spec.config.task_checks import OF_DATA
from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError, each_of, raise_all, refused_by
from slime_spec.launch.arguments import Arguments, read_arguments
from slime_spec.launch.compose import Composed, composed
from slime_spec.tasks.eval_prompts import check_set
from trainer_bridge.checkpoint_folder import has_checkpoint, resolve_checkpoint, saved_step

DESCRIPTION = """\
slime-spec eval CHECKPOINT [flags of train]: evaluate a checkpoint on prompts, with speculation, and train nothing.

CHECKPOINT is a Hugging Face folder, a run's folder (its export; flags are laid over the run's settings, its evaluation
sets and draft among them) or a run's checkpoints/ or step-NNNNNN, which a trainer loads and pushes to the engines.
"""
EPILOG = """\
Prompts: --prompt-data FILE (one set), --eval-prompt-data NAME FILE ..., --task NAME ... (docs/evaluation.md)
  slime-spec eval models/SmolLM2-135M-Instruct --task add10 --n-samples-per-prompt 8 --sp-type deterministic
  slime-spec eval runs/NAME --eval-prompt-data aime aime.jsonl --rollout-engine sglang --json aime.json
"""
SETS = "Pass --prompt-data FILE, --eval-prompt-data NAME FILE ... or --task NAME ..."
# Settings of the command line that say what is trained, and how.
OF_TRAINING = ("draft_training", "algorithm", "metrics")
OF_RUN = ("run.seed", "run.skip_checks")
CONFIG, EXPORT, DRAFT = "config.yaml", "hf", "draft"  # in a run's folder


@dataclass(frozen=True)
class EvalArguments:
    """Holds what an eval command line asks for; ``made`` is a run's configuration, ``checkpoint`` as it was given."""

    made: Composed
    checkpoint: str
    json: Path | None
    samples: Path | None


def eval_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own flags."""
    parser = argparse.ArgumentParser(
        prog="slime-spec eval",
        usage=argparse.SUPPRESS,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the metrics of every set here")
    parser.add_argument("--samples", type=Path, help="write every sample here, a line each (eval/step_N.jsonl's form)")
    return parser


def read_eval_arguments(argv: Sequence[str], folder: Path) -> EvalArguments:
    """Read the command line; ``folder`` is for the files of the engines. Raises ConfigError."""
    if not argv or argv[0].startswith("-"):
        rule, remedy = "must come first", "Write slime-spec eval CHECKPOINT [flags]."
        raise ConfigError("CHECKPOINT", rule, argv[0] if argv else None, remedy)
    own, rest = eval_parser().parse_known_args(list(argv[1:]))
    for flag, path in (("--json", own.json), ("--samples", own.samples)):
        _check_writable(flag, path)
    asked = read_arguments(rest)
    try:
        loads, of_checkpoint = _base(argv[0])
    except ConfigError as error:
        raise_all([error, *_other_mistakes([*_generating(0), *rest, *_evaluates(asked), "--output-dir", str(folder)])])
        raise
    for path, value in asked.settings.items():
        section = path.partition(".")[0]
        is_of_run = section == "run" and path not in OF_RUN
        if is_of_run or section in OF_TRAINING or (section == "trainer" and not loads):
            raise ConfigError(path, "belongs to a training run, and eval only evaluates", value, "Leave it out.")
        if path == "model.hf_checkpoint" and not loads:
            raise ConfigError(path, "CHECKPOINT names the model", value, "Leave it out.")
    if mixed := asked.settings.get("task.prompt_data_mix"):
        rule, remedy = "is of a training run: an evaluation has sets, each with a name", SETS
        raise ConfigError("task.prompt_data_mix", rule, mixed, remedy)
    try:
        made = composed([*of_checkpoint, *rest, *_evaluates(asked), "--output-dir", str(folder)])
    except ConfigError as error:
        if error.setting != "eval.interval":
            raise
        raise ConfigError("eval", "needs prompts to evaluate on", argv[0], SETS) from None
    return EvalArguments(made, argv[0], own.json, own.samples)


def _other_mistakes(words: Sequence[str]) -> Sequence[ConfigError]:
    """Return what is wrong with the settings and the data, whatever the checkpoint is."""
    try:
        config = composed([*words]).config
        raise_all(refused_by(*(partial(check_set, each, runs_reward="") for each in eval_sets(config))))
    except ConfigError as error:
        return each_of(error)
    return ()


def _base(checkpoint: str) -> tuple[bool, list[str]]:
    """Return whether a trainer loads the checkpoint, and the words that lay the configuration's ground."""
    folder = Path(checkpoint)
    if (folder / "config.json").is_file():
        return False, ["--hf-checkpoint", checkpoint, *_generating(0)]
    if (folder / CONFIG).is_file():
        if (folder / EXPORT / "config.json").is_file():
            exported = ["--config", str(folder / CONFIG), "--hf-checkpoint", str(folder / EXPORT), *_generating(0)]
            draft = folder / DRAFT
            has_draft = (draft / "config.json").is_file()
            return False, exported + (["--speculative-draft-model-path", str(draft)] if has_draft else [])
        folder = folder / "checkpoints"
    if not has_checkpoint(folder):
        rule = "must be a Hugging Face checkpoint folder, a run's folder, or its checkpoints"
        raise ConfigError("CHECKPOINT", rule, checkpoint, "Give the folder that has config.json, or runs/NAME.")
    found = resolve_checkpoint(folder)
    of_run = [each / CONFIG for each in (found.parent.parent, found.parent) if (each / CONFIG).is_file()]
    base = ["--config", str(of_run[0])] if of_run else []
    return True, [*base, *_generating(saved_step(found)), "run.mode=train", "--load", str(folder)]


def _generating(step: int) -> list[str]:
    """Return the words that take back what a run's own configuration has of its files, its steps and its logs."""
    return [
        *("run.mode=rollout_only", f"run.num_rollout={step + 1}", "run.save_samples=false"),
        *("run.save_debug_rollout_data=null", "run.load_debug_rollout_data=null"),
        *("trainer.load=null", "trainer.save=null", "trainer.save_interval=null"),
        *("run.num_epoch=null", "metrics.use_wandb=false", "metrics.use_tensorboard=false", "metrics.console=false"),
        # What a step of training needs says nothing of an evaluation.
        *("trainer.lr_decay_style=constant", "trainer.lr_warmup_steps=0", "trainer.lr_warmup_fraction=null"),
    ]


def _evaluates(asked: Arguments) -> Iterator[str]:
    """Yield the words that make sets of the prompts of the command line, instead of the run's own sets."""
    given = asked.settings
    yield "eval.interval=1"
    files = given.get("eval.prompt_data", (given["task.prompt_data"],) if "task.prompt_data" in given else ())
    tasks = given.get("eval.tasks", given.get("task.names", ()))
    if files or tasks or "eval.config" in given:
        yield from ("--eval-prompt-data", *files)
        yield from ("--eval-task", *tasks)
        yield from ("--eval-config", given.get("eval.config") or "null")
    if "rollout.n_samples_per_prompt" in given and "eval.n_samples_per_prompt" not in given:
        yield f"eval.n_samples_per_prompt={given['rollout.n_samples_per_prompt']}"
    if (
        tasks and not files and "eval.config" not in given
    ):  # tasks have their own prompts and rewards, whatever a run's data had
        for name in OF_DATA:
            if f"task.{name}" not in given:
                yield f"task.{name}={_word(getattr(TaskConfig(), name))}"
    yield "task.prompt_data=null"
    yield "task.prompt_data_mix=[]"
    yield f"task.names=[{','.join(TaskConfig().names)}]"


def _word(value: object) -> str:
    """Return a setting's value as a command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check_writable(flag: str, path: Path | None) -> None:
    """Raise ConfigError for a file that could not be written when all is done."""
    if path is None:
        return
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise ConfigError(flag, "must be a file in a folder that can be written", str(path), "Choose another file.")
