"""TRL's settings, the fields of GRPOConfig with those of transformers that it inherits, and our flags for them.

A row is a field, our flags (or - for none) and what to know.
"""

from __future__ import annotations

ROWS = """
model_name_or_path | --hf-checkpoint | GRPOTrainer's model
dataset_name | --prompt-data | a file, or a folder of Hugging Face datasets
reward_funcs | --custom-rm-path --rm-type | one reward, a function of yours or a name
reward_weights | - | one reward: add up in a function of yours
num_generations | --n-samples-per-prompt |
num_generations_eval | --n-samples-per-eval-prompt |
generation_batch_size | --rollout-batch-size | prompts: TRL's samples over num_generations
steps_per_generation | --num-steps-per-rollout |
num_iterations | - | each sample is trained on once; --num-steps-per-rollout N splits a rollout
per_device_train_batch_size | --global-batch-size | samples of an optimizer step over all ranks
gradient_accumulation_steps | --global-batch-size | samples of an optimizer step over all ranks
max_prompt_length | --rollout-max-prompt-len |
max_completion_length | --rollout-max-response-len |
temperature | --rollout-temperature |
top_p | --rollout-top-p |
top_k | --rollout-top-k | -1 keeps all, 0 in TRL
min_p | --rollout-min-p |
repetition_penalty | - | samples are the policy's own distribution
generation_kwargs | - | sampling is that of --rollout-temperature and its like
chat_template_kwargs | --apply-chat-template-kwargs |
shuffle_dataset | --rollout-shuffle |
max_tool_calling_iterations | --custom-generate-function-path | a function of yours asks for turns (docs/agents.md)
use_vllm | --rollout-engine | sglang, or this project's own
vllm_mode | --rollout-external-engine-addrs | SGLang servers that run already
vllm_server_base_url | --rollout-external-engine-addrs |
vllm_server_host | --rollout-external-engine-addrs |
vllm_gpu_memory_utilization | --sglang-mem-fraction-static |
vllm_max_model_length | --sglang-context-length |
vllm_tensor_parallel_size | --rollout-num-gpus-per-engine |
vllm_enable_sleep_mode | --offload-rollout |
beta | --kl-loss-coef |
epsilon | --eps-clip |
epsilon_high | --eps-clip-high |
delta | --eps-clip-c |
importance_sampling_level | --advantage-estimator | sequence is gspo
loss_type | --advantage-estimator --loss-mean | dapo is loss_mean token, grpo sample, dr_grpo and cispo estimators
scale_rewards | --grpo-std-normalization | by group; none is --disable-grpo-std-normalization
mask_truncated_completions | --rollout-sample-filter-path | a function that sets remove_sample
sync_ref_model | - | the reference stays as it is for the whole run
ref_model_mixup_alpha | - | the reference stays as it is for the whole run
top_entropy_quantile | - | every token of a reply is trained on
entropy_coef | --entropy-coef |
vllm_importance_sampling_correction | --use-tis | off unless given
vllm_importance_sampling_mode | --tis-mode | by token: truncate or mask
vllm_importance_sampling_clip_max | --tis-clip |
vllm_importance_sampling_clip_min | --tis-clip-low |
vllm_importance_sampling_cap | --tis-clip |
log_completions | --save-samples | slime-spec report shows them
learning_rate | --lr |
lr_scheduler_type | --lr-decay-style |
warmup_ratio | --lr-warmup-fraction |
warmup_steps | --lr-warmup-iters |
max_grad_norm | --clip-grad |
adam_epsilon | --adam-eps |
max_steps | --num-rollout | rollouts, each of --num-steps-per-rollout steps
num_train_epochs | --num-epoch |
save_steps | --save-interval |
eval_steps | --eval-interval |
eval_strategy | --eval-interval |
eval_on_start | --skip-eval-before-train | the other way round
logging_steps | - | every step is logged
report_to | --use-wandb --use-tensorboard |
resume_from_checkpoint | --load |
gradient_checkpointing | --recompute-activations |
fp16 | - | the trainer computes in float32 or bfloat16: --train-dtype bfloat16
deepspeed | - | the trainer is Megatron-Core: --tensor-model-parallel-size, --use-distributed-optimizer
fsdp | - | the trainer is Megatron-Core: --tensor-model-parallel-size, --use-distributed-optimizer
peft_config | - | Megatron-Core has no low-rank adapters, and every weight is trained
push_to_hub | - | a run exports hf/ in its folder, which the hub's own tools push
"""
