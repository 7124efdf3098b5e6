"""One preflight: ``--dry-run``, the doctor and the launch itself check the same, before anything heavy starts.

Every file that a run reads is read here (checkpoints, tokenizer, prompts, rewards, saved rollouts), every known trap is
looked for, and everything that stands in the way is reported together. Only the start itself can know the rest, which
ONLY_THE_START_KNOWS lists.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from rollout.embedded.validate import check_kv_cache
from slime_spec.agents.own import check_own_functions
from slime_spec.checkpoints.draft_choice import choose_draft, trainable_draft
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.folder import CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import scheme_of
from slime_spec.checkpoints.tensors import verify_headers, verify_tensors
from slime_spec.checkpoints.tokenizer import Tokenizer, check_vocabulary
from slime_spec.config.build import to_yaml
from slime_spec.config.draft_training import MTP, DraftTrainingConfig, check_loss
from slime_spec.config.eval_sets import eval_sets
from slime_spec.config.speculation import FP8_CAPABILITY, check_fp8
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError, NotComputedError, each_of
from slime_spec.launch.compose import Composed
from slime_spec.launch.slime.model_shape import check_model_shape
from slime_spec.metrics.tensorboard import event_writer
from slime_spec.metrics.wandb import mode as wandb_mode
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Finding
from slime_spec.preflight.gate import check_skipped, examine, log_findings, not_skipped, refusal, refused
from slime_spec.preflight.gather import gather
from slime_spec.preflight.gpus import visible_gpu_capabilities
from slime_spec.preflight.reference import check_reference
from slime_spec.preflight.routing import check_routing_replay
from slime_spec.rl.rollout_data import check_rollout_data
from slime_spec.run_folder import CHECKPOINTS, check_run_folder, folder_of
from slime_spec.speculation.corpus import corpus_lines
from slime_spec.tasks.eval_prompts import EvalPrompts, check_set
from slime_spec.tasks.source import PromptSource, check_data
from trainer_bridge.checkpoint_folder import has_checkpoint, resolve_checkpoint, saved_step
from trainer_bridge.layout import check_layout

ONLY_THE_START_KNOWS = (
    "whether ports are free, the cluster of --ray-address answers and has the cores and GPUs, servers load and stay "
    "healthy, servers that run already hold this model's weights, another run holds the folder, disks have room"
)
LATER_THAN_HOPPER = (10, 0)  # from which SGLang rounds scales to powers of two and packs them
logger = logging.getLogger(__name__)
Checked = ParamSpec("Checked")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Inputs:
    """Holds the inputs that a run reads before heavy parts start.

    There is no ``spec`` for a family that only SGLang runs, and no ``load`` for a run that starts anew.
    ``prompts`` are None where nothing but an evaluation is asked for; ``eval_prompts`` are those of evaluations.
    """

    spec: ModelSpec | None
    tokenizer: Tokenizer
    prompts: PromptSource | None
    load: str | None
    eval_prompts: tuple[EvalPrompts, ...] = ()

    def close(self) -> None:
        """End what scores the prompts."""
        for each in (self.prompts, *self.eval_prompts):
            if each is not None:
                each.close()


@dataclass(frozen=True)
class Preflight:
    """Holds all that was found: the facts of the engines that differ, findings with errors first, refused inputs.

    ``engines`` is empty where a checkpoint cannot be read; ``inputs`` is None where any input is refused.
    """

    config: Config
    engines: tuple[Facts, ...]
    findings: tuple[Finding, ...]
    refusals: tuple[ConfigError, ...]
    inputs: Inputs | None

    @property
    def stopping(self) -> tuple[Finding, ...]:
        """Return what stops a launch."""
        return tuple(not_skipped(self.findings, self.config.run.skip_checks))

    def checked(self) -> Inputs:
        """Return the inputs of a run that may start, each warning logged; raises one error for all that stops it."""
        log_findings(self.findings, self.config.run.skip_checks)
        if self.stopping:
            self.close()
            is_one_refusal = len(self.stopping) == len(self.refusals) == 1
            raise self.refusals[0] if is_one_refusal else refusal(self.stopping)
        assert self.inputs is not None, "nothing was refused"
        return self.inputs

    def close(self) -> None:
        """End what scores the prompts; for those who do not start the run."""
        if self.inputs is not None:
            self.inputs.close()


class _Refusals:
    """Makes checks, and keeps what they refuse."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    def of(self, check: Callable[Checked, Result], *args: Checked.args, **kwargs: Checked.kwargs) -> Result | None:
        """Return the result of a check, or None where it refuses."""
        try:
            return check(*args, **kwargs)
        except ConfigError as error:
            self.add(error)
            return None

    def add(self, *errors: ConfigError) -> None:
        for error in chain.from_iterable(map(each_of, errors)):
            if str(error) not in map(str, self.errors):  # two checks may read the same file
                self.errors.append(error)


def look(made: Composed, acceptance: tuple[float, ...] = (), *, takes_prompts: bool = True) -> Preflight:
    """Make every check; raises ConfigError for a check to skip that does not exist.

    ``acceptance`` are a finished run's rates by draft position. ``takes_prompts`` is False for what takes no step of a
    run, and needs none of its prompts. Nothing is started: this reads files, asks SGLang's
    interpreter for its version and running servers for their flags.
    """
    config = made.config
    check_skipped(config.run.skip_checks)
    refusals = _Refusals()
    refusals.of(check_model_shape, made.of_slime, config.model.hf_checkpoint)
    engines = refusals.of(gather, config, made.given, acceptance) or ()
    for facts in engines:
        refusals.add(*(each.refusal(facts.external_url) for each in facts.differing if each.is_decisive))
    inputs = _inputs(made, refusals, takes_prompts)
    if inputs is not None and inputs.prompts is not None and config.run.num_epoch is not None:
        config = refusals.of(with_epochs, config, inputs.prompts.num_rows) or config
        engines = tuple(replace(each, config=config) for each in engines)
    findings = (*map(refused, refusals.errors), *(examine(engines) if engines else ()))
    looked = Preflight(config, engines, findings, tuple(refusals.errors), inputs)
    if not refusals.errors:
        return looked
    looked.close()
    return replace(looked, inputs=None)


def with_epochs(config: Config, num_rows: int | None) -> Config:
    """Return the configuration with as many rollouts as its epochs take, as slime counts them: whole batches.

    Raises ConfigError where the epochs are shorter than one rollout.
    """
    if config.run.num_epoch is None:
        return config
    assert num_rows is not None, "task_checks.py refuses epochs of tasks"
    num_rollout = config.run.num_epoch * num_rows // config.rollout.batch_size
    if num_rollout == 0:
        rule = f"must give a rollout of {config.rollout.batch_size} prompts, the data have {num_rows}"
        raise ConfigError("run.num_epoch", rule, config.run.num_epoch, "Pass a smaller --rollout-batch-size.")
    logger.info("epochs=%d prompts=%d make num_rollout=%d", config.run.num_epoch, num_rows, num_rollout)
    return replace(config, run=replace(config.run, num_rollout=num_rollout))


def _inputs(made: Composed, refusals: _Refusals, takes_prompts: bool) -> Inputs | None:
    """Read everything that a run reads, past what is refused; None where a part of the inputs is missing."""
    config = made.config
    load = refusals.of(checkpoint_to_load, config)
    refusals.of(_check_saved_rollouts, config, load)
    refusals.of(check_run_folder, config, to_yaml(config), load)
    if config.metrics.use_wandb:
        refusals.of(wandb_mode, config.metrics.wandb_mode, os.environ, config.metrics.wandb_host)
    if config.metrics.use_tensorboard:
        refusals.of(event_writer)
    spec = refusals.of(_target_spec, config)
    tokenizer = None
    if Path(config.model.hf_checkpoint).is_dir():  # or its absence, told above, would be told once more
        names = config.task.template_values
        tokenizer = refusals.of(Tokenizer.load, config.model.hf_checkpoint, config.task.chat_date, names)
    if config.run.mode != "rollout_only":
        refusals.of(check_reference, config, spec)
    if spec is not None:
        _check_target(config, spec, refusals)
    if spec is not None and tokenizer is not None:
        refusals.of(check_vocabulary, tokenizer, spec)
    refusals.of(_check_corpus, config)
    refusals.of(check_own_functions, config)
    sets = (refusals.of(eval_sets, config) or ()) if config.evaluates else ()
    prompts = None
    if takes_prompts and tokenizer is not None:
        prompts = refusals.of(PromptSource, config, tokenizer, may_lack=made.may_lack)
    if takes_prompts and prompts is None:  # what else is wrong with the data and the reward can be told all the same
        refusals.of(check_data, config, may_lack=made.may_lack)
    if tokenizer is None:
        for each in sets:
            refusals.of(check_set, each, config.task.reward)
        return None
    of_sets = (refusals.of(EvalPrompts.load, each, tokenizer) for each in sets)
    eval_prompts = tuple(each for each in of_sets if each is not None)
    return Inputs(spec, tokenizer, prompts, load, eval_prompts)


def _check_target(config: Config, spec: ModelSpec, refusals: _Refusals) -> None:
    refusals.of(_check_context, config, spec)
    refusals.of(check_routing_replay, config, spec)
    if config.run.mode != "rollout_only":
        refusals.of(check_layout, config, spec)
    # A damaged file must be refused here, not in an actor a minute later.
    generates = config.run.mode != "train_only"
    dtypes = [getattr(torch, config.engine.dtype)] if generates else []
    if _is_served_only(config) and scheme_of(CheckpointFolder(Path(config.model.hf_checkpoint)).config, "") is not None:
        # R1's 690 GB would be read twice, and are computed with by the server alone, which reads them itself.
        refusals.of(verify_headers, config.model.hf_checkpoint, spec)
    else:
        refusals.of(verify_tensors, config.model.hf_checkpoint, spec, dtypes=dtypes)
    if generates and kind_of(config).runs_built_decoders:
        refusals.of(_check_draft, config, spec, dtypes)
        refusals.of(_check_fp8, config)
    if config.trains_draft:
        refusals.of(_check_draft_in_training, config, spec)
    if config.run.mode == "train" and kind_of(config).has_servers:
        refusals.of(_check_fp8_pushes, config)


def _check_draft(config: Config, spec: ModelSpec, dtypes: Sequence[torch.dtype]) -> None:
    draft = choose_draft(config, spec)
    if draft is not None:
        draft.verify(dtypes)


def _check_mtp_layers(settings: DraftTrainingConfig, draft: DraftSpec) -> None:
    if settings.mtp_num_layers is None:
        return
    if draft.family != MTP:
        rule, remedy = f"is of MTP layers, and this draft is in the format {draft.family}", "Leave it out."
        raise ConfigError("draft_training.mtp_num_layers", rule, settings.mtp_num_layers, remedy)
    if settings.mtp_num_layers > 1:
        rule = "must be 1: one layer drafts every position, each from its own states at the position before"
        raise ConfigError("draft_training.mtp_num_layers", rule, settings.mtp_num_layers, "Pass --mtp-num-layers 1.")


def _check_draft_in_training(config: Config, spec: ModelSpec) -> None:
    draft = trainable_draft(config, spec).spec
    assert isinstance(draft, DraftSpec), "a whole model is not trained"
    check_loss(config.draft_training, draft.family)
    _check_mtp_layers(config.draft_training, draft)
    num_steps = config.draft_training.num_steps
    if draft.num_block_drafts and num_steps not in (DraftTrainingConfig().num_steps, draft.num_block_drafts):
        rule = f"has no effect on a block drafter, which learns all {draft.num_block_drafts} positions of its blocks"
        raise ConfigError("draft_training.num_steps", rule, num_steps, "Drop --draft-ttt-length.")


def _check_fp8(config: Config) -> None:
    """Judge this machine's GPUs; a cluster's are judged where the engines start."""
    if config.speculative.draft_model_quantization == "fp8" and config.cluster.ray_address is None:
        for capability in visible_gpu_capabilities(os.environ):
            check_fp8(capability)


def _check_fp8_pushes(config: Config) -> None:
    """Refuse GPUs of this machine on which servers keep fp8 in another layout than they load."""
    folder = CheckpointFolder(Path(config.model.hf_checkpoint))
    is_elsewhere = config.cluster.ray_address is not None or kind_of(config).uses_external_servers(config)
    if is_elsewhere or not config.rollout.num_gpus_per_engine or scheme_of(folder.config, folder.source) is None:
        return
    for capability in visible_gpu_capabilities(os.environ):
        if not FP8_CAPABILITY <= capability < LATER_THAN_HOPPER:
            raise ConfigError(
                "model.hf_checkpoint",
                "with weights in fp8 is pushed to servers on Ada and Hopper alone (compute capability 8.9 and 9.0): on "
                "others they lay codes and scales out anew, and cannot load a second time",
                "a GPU of {}.{}".format(*capability),
                "Choose the same model with weights in bfloat16, such as what a run exports, or pass "
                "--debug-rollout-only.",
            )


def _check_corpus(config: Config) -> None:
    corpus = config.speculative.ngram_external_corpus_path
    if corpus is not None and config.speculative.record.takes_corpus:
        for _ in corpus_lines(corpus):  # called only for its errors
            pass


def _check_saved_rollouts(config: Config, load: str | None) -> None:
    check_rollout_data(config.run, 0 if load is None else saved_step(resolve_checkpoint(load)))


def _is_served_only(config: Config) -> bool:
    """Return whether the policy is computed by servers alone."""
    return kind_of(config).has_servers and config.run.mode == "rollout_only"


def _target_spec(config: Config) -> ModelSpec | None:
    """Return the policy's spec; raises NotComputedError for a model that this project must compute and cannot."""
    stored = CheckpointFolder(Path(config.model.hf_checkpoint))
    try:
        return ModelSpec.from_dict(stored.config, stored.source)
    except NotComputedError:
        # Which of its layers have experts is known of decoders that are built here.
        if _is_served_only(config) and not config.rollout.routing_replay:
            return None  # SGLang computes it: quantised weights, windows of attention
        raise


def _check_context(config: Config, spec: ModelSpec) -> None:
    longest = config.longest
    if longest > spec.max_position_embeddings:
        raise ConfigError(
            "rollout.max_prompt_len",
            f"with max_response_len must fit the model's context of {spec.max_position_embeddings} tokens",
            longest,
            f"Lower {config.flags_of_longest}.",
        )
    if config.run.mode != "train_only" and kind_of(config).runs_built_decoders:
        check_kv_cache(config, spec)


def checkpoints_of(config: Config, run_folder: Path) -> str | None:
    """Return the folder of the run's checkpoints, or None where it saves none."""
    if config.run.mode == "rollout_only" or config.save_interval is None:
        return None
    return config.trainer.save or str(run_folder / CHECKPOINTS)


def checkpoint_to_load(config: Config) -> str | None:
    """Return ``trainer.load``, or None where the run starts anew.

    A run that loads from where it saves starts anew as long as nothing was saved there, so that one command is the
    first start and every restart. Raises CheckpointError for any other folder without a checkpoint.
    """
    load, save = config.trainer.load, checkpoints_of(config, folder_of(config))
    if load is None:
        return None
    if save is not None and Path(load).resolve() == Path(save).resolve() and not has_checkpoint(load):
        logger.info("started anew: nothing was saved yet to resume from path=%s", load)
        return None
    resolve_checkpoint(load)
    return load
