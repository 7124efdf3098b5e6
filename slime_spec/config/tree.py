"""The configuration tree has every setting with its default, its meaning and its slime-style flag.

Each section of the tree is a file of its own here: the run and its model in this file, ``task`` in task.py, and so on.
A path in the tree is the Hydra spelling (``trainer.lr=1e-6``); the flag is the other spelling of the same value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.config.cluster import ClusterConfig
from slime_spec.config.custom import CustomConfig
from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.engine import EngineConfig
from slime_spec.config.evaluation import EvalConfig
from slime_spec.config.metrics import MetricsConfig
from slime_spec.config.push import PushConfig
from slime_spec.config.rollout import RolloutConfig
from slime_spec.config.setting import INT32, setting
from slime_spec.config.sglang_server import SglangServerConfig
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.task import TaskConfig
from slime_spec.config.trainer import TrainerConfig

MODES = ("train", "rollout_only", "train_only")
MOST_STEPS_UNSAVED = 20  # what a crash may cost a run that names a folder for checkpoints and no interval


@dataclass(frozen=True)
class RunConfig:
    """These settings say what the run does, where its files go, and which checks it skips."""

    name: str = setting("default", "Name of the run; its folder is runs/NAME.", flags=("--run-name",))
    output_dir: str | None = setting(None, "Put the run folder here instead of runs/NAME.")
    mode: str = setting(
        "train", "train; rollout_only (no trainer, no push, no offload); train_only (saved rollouts).", choices=MODES
    )
    seed: int = setting(
        0, "Seed of the run: prompts, sampling and initialisation derive from it.", minimum=0, maximum=INT32
    )
    num_rollout: int = setting(30, "Rollout steps to run, each one policy update.", minimum=1, maximum=INT32)
    num_epoch: int | None = setting(
        None, "Passes over prompt_data; num_rollout is then num_epoch x prompts / batch_size.", minimum=1, maximum=INT32
    )
    save_samples: bool = setting(False, "Write every sample to samples.jsonl in the run folder.")
    save_debug_rollout_data: str | None = setting(None, "Save each step's samples here; {rollout_id} is replaced.")
    load_debug_rollout_data: str | None = setting(
        None, "Read samples from here instead of generating; {rollout_id} is replaced."
    )
    skip_checks: tuple[str, ...] = setting(
        (), "Findings of `slime-spec doctor`, by id, that must not stop a launch.", flags=("--skip-check",)
    )


@dataclass(frozen=True)
class ModelConfig:
    """This setting names the policy."""

    hf_checkpoint: str = setting("models/SmolLM2-135M-Instruct", "Hugging Face checkpoint folder of the policy.")


@dataclass(frozen=True)
class Config:
    """Holds the whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    custom: CustomConfig = field(default_factory=CustomConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    sglang_server: SglangServerConfig = field(default_factory=SglangServerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    draft_training: DraftTrainingConfig = field(default_factory=DraftTrainingConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    push: PushConfig = field(default_factory=PushConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    # Every other ServerArgs flag given as --sglang-<flag>, typed by the checked-in table; for the SGLang engine.
    sglang: Mapping[str, object] = field(default_factory=dict)

    @property
    def evaluates(self) -> bool:
        """Return whether the run is evaluated: a run without engines cannot be."""
        return self.eval.interval is not None and self.eval.has_sets and self.run.mode != "train_only"

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest sequence that engines may hold: a rollout's or an evaluation's."""
        if not self.evaluates:
            return self.rollout.longest
        prompt = self.eval.max_prompt_len or self.rollout.max_prompt_len
        return max(self.rollout.longest, prompt + (self.eval.max_response_len or self.rollout.max_response_len))

    @property
    def longest_is(self) -> str:
        """Return how an error names ``longest``."""
        own = self.longest == self.rollout.longest
        return self.rollout.longest_is if own else "eval.max_prompt_len + eval.max_response_len"

    @property
    def flags_of_longest(self) -> str:
        """Return the flags that bound ``longest``, for errors about it."""
        whose = "rollout" if self.longest == self.rollout.longest else "eval"
        return f"--{whose}-max-prompt-len or --{whose}-max-response-len"

    @property
    def engines_leave(self) -> bool:
        """Return whether engines give their memory to the trainer while it trains."""
        return self.run.mode == "train" and self.cluster.colocate and self.cluster.offload

    @property
    def trainer_leaves(self) -> bool:
        """Return whether the trainer gives its GPU memory to the engines while they generate."""
        return self.run.mode == "train" and self.cluster.colocate and self.cluster.offload_train

    @property
    def trains_draft(self) -> bool:
        """Return whether the run trains its draft: what generates alone trains nothing, whatever a recipe sets."""
        return self.draft_training.enable and self.run.mode != "rollout_only"

    @property
    def samples_per_step(self) -> int:
        """Return the samples of an optimizer step; the last step of a rollout may have fewer."""
        num_samples = self.rollout.batch_size * self.rollout.n_samples_per_prompt
        if self.trainer.num_steps_per_rollout is not None:
            return max(1, num_samples // self.trainer.num_steps_per_rollout)
        return self.trainer.global_batch_size or num_samples

    @property
    def num_decay_steps(self) -> int:
        """Return the optimizer steps after which a decaying learning rate is min_lr: by default all of the run."""
        num_samples = self.rollout.batch_size * self.rollout.n_samples_per_prompt
        return self.trainer.lr_decay_iters or self.run.num_rollout * ceil(num_samples / self.samples_per_step)

    @property
    def save_interval(self) -> int | None:
        """Return the steps from one checkpoint to the next; None where the run saves none.

        Where only a folder is named: a tenth of the run, at most MOST_STEPS_UNSAVED, in whole push intervals.
        """
        if self.trainer.save_interval is not None or self.trainer.save is None:
            return self.trainer.save_interval
        num_steps = min(MOST_STEPS_UNSAVED, ceil(self.run.num_rollout / 10))
        return self.push.interval * ceil(num_steps / self.push.interval)
