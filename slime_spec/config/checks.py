"""These checks refuse, before anything starts, settings that are valid alone and cannot work together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from slime_spec.config.algorithm_checks import algorithm_notes, check_algorithm, check_batch, check_learning_signal
from slime_spec.config.api_key import refuse_literal_keys
from slime_spec.config.custom_checks import check_custom, check_post_process
from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.eval_checks import check_evaluation, evaluation_notes
from slime_spec.config.server_checks import check_servers, server_notes, unused_server_settings
from slime_spec.config.speculation import check_speculation, speculation_notes
from slime_spec.config.task_checks import check_task
from slime_spec.config.tree import Config, RolloutConfig, TrainerConfig
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError, raise_all, refused_by
from slime_spec.transports.choice import check_transport


def check(config: Config) -> None:
    """Raise ConfigError for every contradiction, all at once; looks at nothing but the configuration."""
    raise_all(refused_by(*_checks(config)))


def _checks(config: Config) -> Iterator[Callable[[], None]]:
    """Yield the checks that the configuration calls for; each raises the first contradiction of its kind."""
    yield partial(refuse_literal_keys, config)
    yield partial(_check_mode, config)
    yield partial(check_task, config)
    yield partial(check_speculation, config)
    yield partial(_check_lengths, config)
    yield partial(check_evaluation, config)
    if config.run.mode != "train_only":
        yield partial(_check_sampling, config)
        yield partial(check_custom, config)
        yield partial(_check_over_sampling, config)
        yield partial(_check_engine_gpus, config)
        if kind_of(config).has_servers:
            yield partial(check_servers, config)
    if config.run.mode != "rollout_only":
        yield partial(check_ranks, config.trainer)
        yield partial(check_algorithm, config)
        yield partial(check_post_process, config)
        yield partial(_check_saving, config)
    yield partial(_check_draft_training, config)
    if config.run.mode == "train":
        yield partial(check_batch, config)
        yield partial(check_learning_signal, config)
        yield partial(_check_shared_gpus, config)
        yield partial(check_transport, config)


def notes(config: Config) -> Iterator[str]:
    """Yield notes on settings that have no effect in this run, one sentence each; the launcher logs them."""
    has_servers = kind_of(config).has_servers
    if config.sglang and not has_servers:
        names = ", ".join(f"--sglang-{dest.replace('_', '-')}" for dest in config.sglang)
        yield f"The {config.rollout.engine} engine has no use for {names}."
    if config.draft_training.enable and not config.trains_draft:
        yield "A run of rollouts alone trains no draft, and --enable-draft-training has no effect."
    custom = config.custom
    unused = (custom.makes_samples, custom.rollout, custom.dynamic_filter, custom.sample_filter, custom.rollout_log)
    if config.run.mode == "train_only" and any(unused):
        yield "Saved rollouts are trained on as they are, and functions that generate, filter or log have no effect."
    yield from evaluation_notes(config)
    if config.run.mode != "rollout_only":
        yield from algorithm_notes(config.algorithm, config.trainer)
    if config.run.mode != "train_only" and not has_servers:
        yield from unused_server_settings(config)
    if config.run.mode != "train_only":
        if config.rollout.partial_rollout and _num_in_progress(config.rollout) == config.rollout.batch_size:
            yield "Without --over-sampling-batch-size nothing is left unfinished, and --partial-rollout has no effect."
        yield from speculation_notes(config)
        if has_servers:
            yield from server_notes(config)


def _check_mode(config: Config) -> None:
    run = config.run
    if run.load_debug_rollout_data is not None and run.mode != "train_only":
        raise ConfigError(
            "run.load_debug_rollout_data",
            f"saved rollouts are only trained on, and run.mode is {run.mode}",
            run.load_debug_rollout_data,
            "Add --debug-train-only, or drop --load-debug-rollout-data.",
        )
    if run.mode == "train_only" and run.load_debug_rollout_data is None:
        raise ConfigError(
            "run.mode",
            "train_only generates nothing, so it needs saved rollouts",
            run.mode,
            "Add --load-debug-rollout-data 'PATH_{rollout_id}.pt' from a run with --save-debug-rollout-data.",
        )
    if run.mode == "train_only" and run.save_debug_rollout_data is not None:
        raise ConfigError(
            "run.save_debug_rollout_data",
            "train_only generates nothing to save",
            run.save_debug_rollout_data,
            "Drop --save-debug-rollout-data.",
        )
    if run.mode == "rollout_only" and config.trainer.load is not None:
        raise ConfigError(
            "trainer.load",
            "rollout_only has no trainer to resume: its engines serve the weights of model.hf_checkpoint",
            config.trainer.load,
            "Pass --hf-checkpoint with the hf/ folder of the run, or drop --load.",
        )
    saved = run.save_debug_rollout_data
    if saved is not None and run.num_rollout > 1 and "{rollout_id}" not in saved:
        raise ConfigError(
            "run.save_debug_rollout_data",
            f"must contain {{rollout_id}}, or each of the {run.num_rollout} rollouts overwrites the one before",
            run.save_debug_rollout_data,
            "Pass --save-debug-rollout-data 'PATH_{rollout_id}.pt'.",
        )


def _check_lengths(config: Config) -> None:
    engine, longest = config.engine, config.longest
    remedy = f"Lower {config.flags_of_longest}, or raise "
    if engine.context_length is not None and longest > engine.context_length:
        raise ConfigError(
            "engine.context_length",
            f"must hold {config.longest_is} = {longest} tokens",
            engine.context_length,
            f"{remedy}--sglang-context-length.",
        )
    if engine.max_total_tokens is not None and longest > engine.max_total_tokens:
        raise ConfigError(
            "engine.max_total_tokens",
            f"must hold one sequence: {config.longest_is} = {longest} tokens",
            engine.max_total_tokens,
            f"{remedy}--sglang-max-total-tokens.",
        )


def _check_sampling(config: Config) -> None:
    if config.rollout.top_k == 0:
        raise ConfigError("rollout.top_k", "keeps no token at all", 0, "Pass --rollout-top-k -1 to keep every token.")


def _check_saving(config: Config) -> None:
    trainer, interval = config.trainer, config.push.interval
    if config.run.mode == "train" and trainer.save_interval is not None and trainer.save_interval % interval:
        raise ConfigError(
            "trainer.save_interval",
            f"must be a multiple of push.interval={interval}, so that resumed engines get the weights they had",
            trainer.save_interval,
            f"Pass --save-interval {interval * (trainer.save_interval // interval + 1)}.",
        )


def _check_draft_training(config: Config) -> None:
    settings = config.draft_training
    if settings.max_rows >= settings.max_length:
        raise ConfigError(
            "draft_training.max_rows",
            f"must be below draft_training.max_length ({settings.max_length}), which counts what is before them too",
            settings.max_rows,
            "Lower --draft-max-rows, or raise --draft-max-length.",
        )
    if not settings.enable and settings != DraftTrainingConfig():
        name = next(name for name in vars(settings) if getattr(settings, name) != getattr(DraftTrainingConfig(), name))
        raise ConfigError(
            f"draft_training.{name}",
            "has no effect where no draft is trained",
            getattr(settings, name),
            "Add --enable-draft-training, or leave it out.",
        )


def _check_engine_gpus(config: Config) -> None:
    rollout, max_gpus = config.rollout, kind_of(config).max_gpus
    if max_gpus is not None and rollout.num_gpus_per_engine > max_gpus:
        raise ConfigError(
            "rollout.num_gpus_per_engine",
            f"must be 0 or {max_gpus}: the {rollout.engine} engine is not parallel over GPUs and would leave the "
            "others idle",
            rollout.num_gpus_per_engine,
            f"Pass --rollout-num-engines {rollout.num_engines * rollout.num_gpus_per_engine} "
            "--rollout-num-gpus-per-engine 1.",
        )


def _num_in_progress(rollout: RolloutConfig) -> int:
    """Return the number of prompts in progress during a step."""
    return rollout.over_sampling_batch_size or rollout.batch_size


def _check_over_sampling(config: Config) -> None:
    rollout = config.rollout
    in_progress = _num_in_progress(rollout)
    if in_progress < rollout.batch_size:
        raise ConfigError(
            "rollout.over_sampling_batch_size",
            f"must be at least rollout.batch_size ({rollout.batch_size})",
            in_progress,
            "Raise it, or leave it out.",
        )
    if in_progress > rollout.batch_size and not rollout.partial_rollout and config.custom.dynamic_filter is None:
        raise ConfigError(
            "rollout.over_sampling_batch_size",
            "begins prompts that a step does not finish; throwing them away would train on short responses only",
            in_progress,
            "Add --partial-rollout, so that the next step goes on with them, or --dynamic-sampling-filter-path "
            "nonzero_std, which takes the others' place.",
        )


def check_ranks(trainer: TrainerConfig) -> None:
    """Raise ConfigError where the ranks do not divide into groups, or have no GPU each."""
    model_parallel = trainer.tensor_model_parallel_size * trainer.pipeline_model_parallel_size
    if trainer.world_size % model_parallel:
        raise ConfigError(
            "trainer.world_size",
            f"must be a multiple of TP x PP = {model_parallel}",
            trainer.world_size,
            f"Pass --actor-world-size {model_parallel}, or lower the parallel sizes.",
        )
    _check_expert_ranks(trainer)
    if trainer.num_gpus not in (0, trainer.world_size):
        raise ConfigError(
            "trainer.num_gpus",
            f"each of the {trainer.world_size} ranks has one GPU, or all run on the CPU",
            trainer.num_gpus,
            f"Pass --actor-world-size {trainer.num_gpus} with --actor-num-gpus {trainer.num_gpus}.",
        )


def _check_expert_ranks(trainer: TrainerConfig) -> None:
    """Raise ConfigError where a stage's ranks do not divide into groups that share its experts."""
    tensor, experts = trainer.tensor_model_parallel_size, trainer.expert_model_parallel_size
    per_expert = trainer.expert_tensor_parallel_size or tensor
    if tensor % per_expert:
        raise ConfigError(
            "trainer.expert_tensor_parallel_size",
            f"must divide tensor_model_parallel_size ({tensor})",
            per_expert,
            "Pass --expert-tensor-parallel-size 1.",
        )
    per_stage = trainer.world_size // trainer.pipeline_model_parallel_size
    if per_stage % (experts * per_expert):
        raise ConfigError(
            "trainer.expert_model_parallel_size",
            f"times expert_tensor_parallel_size ({per_expert}) must divide the TP x DP = {per_stage} ranks of a stage",
            experts,
            "Choose a smaller --expert-model-parallel-size, or pass --expert-tensor-parallel-size 1.",
        )


def _check_shared_gpus(config: Config) -> None:
    engine_gpus = config.rollout.num_engines * config.rollout.num_gpus_per_engine
    if kind_of(config).uses_external_servers(config):
        return  # they have GPUs of their own
    if config.cluster.colocate and engine_gpus != config.trainer.num_gpus:
        raise ConfigError(
            "cluster.colocate",
            f"engines and trainer share the same GPUs, but the engines have {engine_gpus} and the trainer "
            f"{config.trainer.num_gpus}",
            config.cluster.colocate,
            "Make --rollout-num-engines x --rollout-num-gpus-per-engine equal --actor-num-gpus, or pass --no-colocate.",
        )
