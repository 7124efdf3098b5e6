"""The configuration tree has every setting with its default, its meaning and its slime-style flag.

A path in this tree is the Hydra spelling (``trainer.lr=1e-6``); the flag is the other spelling of the same value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from slime_spec.algorithms import LOOKUP
from slime_spec.config.cluster import ClusterConfig
from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.push import PushConfig
from slime_spec.config.setting import CORES, INT32, MACHINES, MAX_WAIT_S, SAMPLES, setting
from slime_spec.config.sglang_server import SglangServerConfig
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.engines import ENGINES
from slime_spec.sampling_bounds import MAX_TEMPERATURE

MODES = ("train", "rollout_only", "train_only")
MOST_STEPS_UNSAVED = 20  # what a crash may cost a run that names a folder for checkpoints and no interval
DTYPES = ("float32", "bfloat16", "float16")


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
class TaskConfig:
    """These settings say where prompts and rewards come from."""

    names: tuple[str, ...] = setting(
        ("arithmetic",), "Tasks in turn: built-in names or module:attribute.", flags=("--task",)
    )
    prompt_data: str | None = setting(
        None, "A jsonl (or parquet) file of prompts instead of built-in tasks; FILE@[0:100] takes some of its rows."
    )
    input_key: str = setting("prompt", "Key of the prompt in prompt_data.")
    label_key: str = setting("label", "Key of the answer in prompt_data.")
    advice_key: str | None = setting(
        None, f"Key of a text in prompt_data that the reply will resemble; {LOOKUP.name} drafts from it. Default: none."
    )
    reward: str = setting(
        "last_integer",
        "Reward of prompt_data: a built-in name, or your own as module:function.",
        flags=("--rm-type", "--custom-rm-path"),
    )
    reward_key: str | None = setting(
        None, "Key of the number in the dict that a reward of your own gives (default: score)."
    )
    reward_timeout_s: float = setting(
        60.0,
        "Longest call of a reward of your own, seconds; a longer call costs its sample.",
        flags=("--reward-timeout", "--rm-timeout"),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    reward_processes: int = setting(4, "Processes that call a reward of your own.", minimum=1, maximum=CORES)
    tool_key: str | None = setting(
        None, "Key of a list of tools (JSON schemas) in prompt_data, for the chat template. Default: none."
    )
    refuse_overlong_prompts: bool = setting(
        False,
        "Refuse a prompt of prompt_data that is longer than max_prompt_len. Default: leave it out, with a warning.",
    )
    system_prompt: str = setting(
        "", "System message put before every prompt (empty: the chat template decides).", may_be_empty=True
    )
    chat_date: str | None = setting(
        None, "Today (YYYY-MM-DD) for a chat template that asks. Default: its own date, or 2024-07-26; never the clock."
    )
    apply_chat_template: bool = setting(True, "Wrap prompts in the tokenizer's chat template.")


@dataclass(frozen=True)
class RolloutConfig:
    """These settings say what is generated each step, and by how many engines."""

    engine: str = setting(
        "embedded",
        "Engine that generates: embedded, or sglang (its own servers; fake: for tests).",
        flags=("--rollout-engine",),
        choices=tuple(ENGINES),
    )
    num_engines: int = setting(1, "Engine actors.", flags=("--rollout-num-engines",), minimum=1, maximum=MACHINES)
    num_gpus_per_engine: int = setting(
        0,
        "GPUs of one engine; 0 runs it on the CPU.",
        flags=("--rollout-num-gpus-per-engine",),
        minimum=0,
        maximum=MACHINES,
    )
    num_cpus_per_engine: int = setting(
        2,
        "CPU cores, and compute threads, of one engine.",
        flags=("--rollout-num-cpus-per-engine",),
        minimum=1,
        maximum=CORES,
    )
    batch_size: int = setting(
        8, "Prompts per rollout step.", flags=("--rollout-batch-size",), minimum=1, maximum=SAMPLES
    )
    over_sampling_batch_size: int | None = setting(
        None,
        "Prompts in progress during a step, which ends when batch_size are complete; default: no more.",
        minimum=1,
        maximum=SAMPLES,
    )
    partial_rollout: bool = setting(
        False, "Keep what over-sampling leaves unfinished; the next step goes on with it, under its newer weights."
    )
    routing_replay: bool = setting(
        False,
        "Train with the experts that the engine chose for each token (R3): engines return them, routers replay them.",
        flags=("--use-rollout-routing-replay",),
    )
    n_samples_per_prompt: int = setting(8, "Samples per prompt (the GRPO group).", minimum=1, maximum=SAMPLES)
    max_prompt_len: int = setting(
        512, "Longest prompt, tokens.", flags=("--rollout-max-prompt-len",), minimum=1, maximum=INT32
    )
    max_response_len: int = setting(
        64, "Longest response, tokens.", flags=("--rollout-max-response-len",), minimum=1, maximum=INT32
    )
    temperature: float = setting(
        1.0,
        "Sampling temperature; 0 is greedy.",
        flags=("--rollout-temperature",),
        minimum=0.0,
        maximum=MAX_TEMPERATURE,
    )
    top_p: float = setting(1.0, "Nucleus mass kept.", flags=("--rollout-top-p",), above=0.0, maximum=1.0)
    top_k: int = setting(
        -1, "Most likely tokens kept; -1 keeps all.", flags=("--rollout-top-k",), minimum=-1, maximum=INT32
    )
    min_p: float = setting(
        0.0, "Drop tokens below this share of the likeliest.", flags=("--rollout-min-p",), minimum=0.0, maximum=1.0
    )
    stop: tuple[str, ...] = setting((), "Stop strings.", flags=("--rollout-stop",))
    stop_token_ids: tuple[int, ...] = setting(
        (), "Stop tokens besides EOS.", flags=("--rollout-stop-token-ids",), minimum=0, maximum=INT32
    )

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest sequence that a rollout may make: prompt and response."""
        return self.max_prompt_len + self.max_response_len


@dataclass(frozen=True)
class EngineConfig:
    """These settings are the flags `--sglang-<flag>` that the embedded engine understands too, and its own."""

    dtype: str = setting(
        "float32", "Weights and compute dtype of the engine.", flags=("--sglang-dtype",), choices=DTYPES
    )
    context_length: int | None = setting(
        None,
        "Longest sequence, tokens; default: the model's.",
        flags=("--sglang-context-length",),
        minimum=2,
        maximum=INT32,
    )
    max_running_requests: int = setting(
        64,
        "Sequences decoded at once.",
        flags=("--sglang-max-running-requests",),
        minimum=1,
        maximum=SAMPLES,
    )
    max_total_tokens: int | None = setting(
        None,
        "KV cache bound, tokens; default: from kv_cache_gb.",
        flags=("--sglang-max-total-tokens",),
        minimum=2,
        maximum=10**12,
    )
    kv_cache_gb: float = setting(1.0, "KV cache bound, GB, where max_total_tokens is not set.", above=0.0, maximum=1e6)
    disable_radix_cache: bool = setting(
        False,
        "Compute every prompt from its first token on; default: what prompts begin alike with is computed once.",
        flags=("--sglang-disable-radix-cache",),
    )
    cost_probe_interval: int = setting(
        128,
        "Embedded: time a plain decode step once in this many rounds with drafts, for spec/net_speedup_est; 0: never.",
        minimum=0,
        maximum=INT32,
    )
    cuda_graphs: bool = setting(
        True, "Embedded, on a GPU: run passes in fused kernels and captured graphs; false: operator by operator."
    )


@dataclass(frozen=True)
class TrainerConfig:
    """These settings are the policy trainer's."""

    num_gpus: int = setting(
        0,
        "GPUs of the trainer; 0 trains on CPU with world_size ranks.",
        flags=("--actor-num-gpus",),
        minimum=0,
        maximum=MACHINES,
    )
    world_size: int = setting(
        1, "Trainer ranks: TP x PP x DP.", flags=("--actor-world-size",), minimum=1, maximum=MACHINES
    )
    num_cpus_per_rank: int = setting(2, "CPU cores, and compute threads, of one rank.", minimum=1, maximum=CORES)
    tensor_model_parallel_size: int = setting(1, "Tensor parallel ranks.", minimum=1, maximum=MACHINES)
    pipeline_model_parallel_size: int = setting(1, "Pipeline parallel ranks.", minimum=1, maximum=MACHINES)
    num_layers_in_first_pipeline_stage: int | None = setting(
        None,
        "Layers of the first pipeline stage; default: as many as the others.",
        flags=("--decoder-first-pipeline-num-layers",),
        minimum=1,
        maximum=INT32,
    )
    num_layers_in_last_pipeline_stage: int | None = setting(
        None,
        "Layers of the last pipeline stage, which has the head too; default: as many as the others.",
        flags=("--decoder-last-pipeline-num-layers",),
        minimum=1,
        maximum=INT32,
    )
    expert_model_parallel_size: int = setting(
        1, "Ranks over which a layer's experts are spread.", minimum=1, maximum=MACHINES
    )
    expert_tensor_parallel_size: int | None = setting(
        None,
        "Tensor parallel ranks of each expert; default: tensor_model_parallel_size.",
        minimum=1,
        maximum=MACHINES,
    )
    dtype: str = setting(
        "float32", "Parameter dtype of the trainer.", flags=("--train-dtype",), choices=("float32", "bfloat16")
    )
    lr: float = setting(1e-5, "Learning rate (constant after warm-up).", minimum=0.0, maximum=1.0)
    lr_warmup_steps: int = setting(
        0, "Optimizer steps of linear warm-up.", flags=("--lr-warmup-iters",), minimum=0, maximum=INT32
    )
    adam_beta1: float = setting(0.9, "Adam beta 1.", minimum=0.0, below=1.0)
    adam_beta2: float = setting(0.95, "Adam beta 2.", minimum=0.0, below=1.0)
    adam_eps: float = setting(1e-8, "Adam epsilon.", minimum=1e-30, maximum=1.0)
    weight_decay: float = setting(
        0.0, "Decoupled weight decay; norms and biases do not decay.", minimum=0.0, maximum=1.0
    )
    clip_grad: float = setting(1.0, "Gradient norm clip; 0 switches it off.", minimum=0.0, maximum=1e6)
    max_tokens_per_microbatch: int = setting(
        1024,
        "Packed tokens per microbatch.",
        flags=("--max-tokens-per-gpu",),
        minimum=1,
        maximum=INT32,
    )
    global_batch_size: int | None = setting(
        None, "Samples per optimizer step; default: all of one rollout.", minimum=1, maximum=INT32
    )
    metrics_of_all_samples: bool = setting(
        False,
        "Compute train/entropy and the logprob difference at samples of advantage 0, too, by a forward pass of them.",
    )
    recompute: bool = setting(
        False,
        "Recompute activations in the backward pass (less memory, more time).",
        flags=("--recompute-activations",),
    )
    use_distributed_optimizer: bool = setting(
        False, "Split the optimizer's states and float32 masters over data parallel ranks (Megatron's)."
    )
    optimizer_cpu_offload: bool = setting(
        False, "Keep Adam's moments in host memory and update there (less GPU memory, more time)."
    )
    save: str | None = setting(None, "Folder for checkpoints; default: checkpoints/ in the run folder.")
    load: str | None = setting(None, "Resume from this checkpoint folder (a run's checkpoints/).")
    save_interval: int | None = setting(
        None,
        "Save a checkpoint to resume from every this many steps, and at the end. Default: none; with save, a tenth of "
        "the run, at most 20 steps.",
        minimum=1,
        maximum=INT32,
    )
    save_final: bool = setting(True, "Write an HF export of the policy at the end.")


@dataclass(frozen=True)
class AlgorithmConfig:
    """These settings are the constants of GRPO."""

    normalize_std: bool = setting(
        True,
        "Divide a group's advantages by its sample standard deviation (n - 1), as slime.",
        flags=("--grpo-std-normalization",),
    )
    eps_clip: float = setting(0.2, "Lower clip of the importance ratio.", above=0.0, maximum=1.0)
    eps_clip_high: float | None = setting(None, "Upper clip of the ratio; default: eps_clip.", above=0.0, maximum=100.0)
    kl_loss_coef: float = setting(
        0.0,
        "Weight of the KL to the reference (the initial checkpoint); 0: no reference.",
        minimum=0.0,
        maximum=1000.0,
    )


@dataclass(frozen=True)
class MetricsConfig:
    """These settings say where metrics go; metrics.jsonl is always written."""

    console: bool = setting(True, "Show progress on the terminal.", flags=("--console",))
    use_wandb: bool = setting(False, "Log to wandb (offline when there is no API key).")
    wandb_project: str = setting("slime_spec", "wandb project.")
    wandb_group: str | None = setting(None, "wandb group.")
    wandb_mode: str | None = setting(
        None, "online, offline or disabled; default: by the API key.", choices=("online", "offline", "disabled")
    )


@dataclass(frozen=True)
class Config:
    """Holds the whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
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
    def save_interval(self) -> int | None:
        """Return the steps from one checkpoint to the next; None where the run saves none.

        Where only a folder is named: a tenth of the run, at most MOST_STEPS_UNSAVED, in whole push intervals.
        """
        if self.trainer.save_interval is not None or self.trainer.save is None:
            return self.trainer.save_interval
        num_steps = min(MOST_STEPS_UNSAVED, ceil(self.run.num_rollout / 10))
        return self.push.interval * ceil(num_steps / self.push.interval)
