"""These settings are the policy trainer's."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import CORES, INT32, MACHINES, setting

LR_DECAY_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainerConfig:
    """Holds the settings of ``trainer``."""

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
    lr: float = setting(1e-5, "Learning rate, after warm-up and before decay.", minimum=0.0, maximum=1.0)
    lr_decay_style: str = setting(
        "constant", "How the rate falls after warm-up, to min_lr at lr_decay_iters.", choices=LR_DECAY_STYLES
    )
    lr_decay_iters: int | None = setting(
        None,
        "Optimizer steps after which the rate is min_lr; default: all of the run (num_rollout).",
        minimum=1,
        maximum=INT32,
    )
    lr_warmup_steps: int = setting(
        0, "Optimizer steps of linear warm-up.", flags=("--lr-warmup-iters",), minimum=0, maximum=INT32
    )
    lr_warmup_fraction: float | None = setting(
        None, "Share of lr_decay_iters that is warm-up, in place of lr_warmup_steps.", minimum=0.0, below=1.0
    )
    min_lr: float = setting(0.0, "Learning rate at the end of a decay.", minimum=0.0, maximum=1.0)
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
    num_steps_per_rollout: int | None = setting(
        None,
        "Optimizer steps per rollout, in place of global_batch_size: that is then batch_size * n_samples_per_prompt "
        "over this.",
        minimum=1,
        maximum=INT32,
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
    ref_load: str | None = setting(
        None,
        "Hugging Face folder of the KL's reference, of the policy's architecture. Default: model.hf_checkpoint, with "
        "which the policy begins in any case.",
    )
    load: str | None = setting(None, "Resume from this checkpoint folder (a run's checkpoints/).")
    save_interval: int | None = setting(
        None,
        "Save a checkpoint to resume from every this many steps, and at the end. Default: none; with save, a tenth of "
        "the run, at most 20 steps.",
        minimum=1,
        maximum=INT32,
    )
    save_final: bool = setting(True, "Write an HF export of the policy at the end.")
