"""verl's settings, by the paths that its command line takes, and our flags for them.

A row is a path, our flags (or - for none) and what to know; a path that ends in .* is all below it.
"""

from __future__ import annotations

ROWS = """
actor_rollout_ref.model.path | --hf-checkpoint |
actor_rollout_ref.model.enable_gradient_checkpointing | --recompute-activations |
actor_rollout_ref.model.use_remove_padding | - | microbatches are always packed
actor_rollout_ref.model.lora_rank | - | Megatron-Core has no low-rank adapters, and every weight is trained
actor_rollout_ref.model.mtp.enable_train | --enable-mtp-training |
actor_rollout_ref.model.mtp.mtp_loss_scaling_factor | --mtp-loss-scaling-factor |
actor_rollout_ref.model.mtp.speculative_algorithm | --speculative-algorithm |
actor_rollout_ref.model.mtp.speculative_num_steps | --speculative-num-steps |
actor_rollout_ref.model.mtp.speculative_eagle_topk | --speculative-eagle-topk |
actor_rollout_ref.model.mtp.speculative_num_draft_tokens | --speculative-num-draft-tokens |
actor_rollout_ref.actor.optim.lr | --lr |
actor_rollout_ref.actor.optim.lr_warmup_steps | --lr-warmup-iters | optimizer steps
actor_rollout_ref.actor.optim.lr_warmup_steps_ratio | --lr-warmup-fraction |
actor_rollout_ref.actor.optim.lr_scheduler_type | --lr-decay-style |
actor_rollout_ref.actor.optim.min_lr_ratio | --min-lr | the rate itself, not its share of --lr
actor_rollout_ref.actor.optim.weight_decay | --weight-decay | norms and biases do not decay
actor_rollout_ref.actor.optim.betas | --adam-beta1 --adam-beta2 |
actor_rollout_ref.actor.optim.clip_grad | --clip-grad |
actor_rollout_ref.actor.grad_clip | --clip-grad |
actor_rollout_ref.actor.ppo_mini_batch_size | --global-batch-size | samples: verl's prompts times its rollout.n
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu | --max-tokens-per-gpu | microbatches are packed by tokens
actor_rollout_ref.actor.use_dynamic_bsz | --max-tokens-per-gpu | always on
actor_rollout_ref.actor.ppo_max_token_len_per_gpu | --max-tokens-per-gpu |
actor_rollout_ref.actor.ppo_epochs | - | each sample is trained on once; --num-steps-per-rollout N splits a rollout
actor_rollout_ref.actor.clip_ratio | --eps-clip |
actor_rollout_ref.actor.clip_ratio_low | --eps-clip |
actor_rollout_ref.actor.clip_ratio_high | --eps-clip-high |
actor_rollout_ref.actor.clip_ratio_c | --eps-clip-c | off unless given, 3.0 in verl
actor_rollout_ref.actor.policy_loss.loss_mode | --advantage-estimator | vanilla is grpo; gspo, cispo as here
actor_rollout_ref.actor.loss_agg_mode | --loss-mean | token, sample (of token means) or constant (of token sums)
actor_rollout_ref.actor.entropy_coeff | --entropy-coef |
actor_rollout_ref.actor.use_kl_loss | --use-kl-loss |
actor_rollout_ref.actor.kl_loss_coef | --kl-loss-coef |
actor_rollout_ref.actor.kl_loss_type | --kl-loss-type | kl is k1, mse k2
actor_rollout_ref.actor.ulysses_sequence_parallel_size | - | ranks do not share a sequence
actor_rollout_ref.actor.fsdp_config.* | - | Megatron-Core trains: --use-distributed-optimizer, --optimizer-cpu-offload
actor_rollout_ref.actor.megatron.tensor_model_parallel_size | --tensor-model-parallel-size |
actor_rollout_ref.actor.megatron.pipeline_model_parallel_size | --pipeline-model-parallel-size |
actor_rollout_ref.actor.megatron.expert_model_parallel_size | --expert-model-parallel-size |
actor_rollout_ref.actor.megatron.expert_tensor_parallel_size | --expert-tensor-parallel-size |
actor_rollout_ref.actor.megatron.context_parallel_size | - | ranks do not share a sequence
actor_rollout_ref.actor.megatron.use_distributed_optimizer | --use-distributed-optimizer | off unless given
actor_rollout_ref.actor.megatron.optimizer_offload | --optimizer-cpu-offload |
actor_rollout_ref.actor.megatron.param_offload | --offload-train | what a colocated trainer does between steps
actor_rollout_ref.ref.* | - | the reference is computed beside the policy; --ref-load names another checkpoint
actor_rollout_ref.rollout.name | --rollout-engine | sglang, or this project's own; no vLLM
actor_rollout_ref.rollout.n | --n-samples-per-prompt |
actor_rollout_ref.rollout.temperature | --rollout-temperature |
actor_rollout_ref.rollout.top_p | --rollout-top-p |
actor_rollout_ref.rollout.top_k | --rollout-top-k |
actor_rollout_ref.rollout.prompt_length | --rollout-max-prompt-len |
actor_rollout_ref.rollout.response_length | --rollout-max-response-len |
actor_rollout_ref.rollout.dtype | --sglang-dtype |
actor_rollout_ref.rollout.gpu_memory_utilization | --sglang-mem-fraction-static |
actor_rollout_ref.rollout.tensor_model_parallel_size | --rollout-num-gpus-per-engine |
actor_rollout_ref.rollout.max_num_seqs | --sglang-max-running-requests |
actor_rollout_ref.rollout.max_num_batched_tokens | --sglang-chunked-prefill-size |
actor_rollout_ref.rollout.max_model_len | --sglang-context-length |
actor_rollout_ref.rollout.enforce_eager | --sglang-disable-cuda-graph |
actor_rollout_ref.rollout.enable_prefix_caching | --sglang-disable-radix-cache | the other way round
actor_rollout_ref.rollout.free_cache_engine | --offload-rollout |
actor_rollout_ref.rollout.calculate_log_probs | - | engines' logprobs always come with samples
actor_rollout_ref.rollout.enable_rollout_routing_replay | --use-rollout-routing-replay |
actor_rollout_ref.rollout.val_kwargs.n | --n-samples-per-eval-prompt |
actor_rollout_ref.rollout.val_kwargs.temperature | --eval-temperature | the run's own unless given, 0 in verl
actor_rollout_ref.rollout.val_kwargs.top_p | --eval-top-p |
actor_rollout_ref.rollout.val_kwargs.top_k | --eval-top-k |
actor_rollout_ref.rollout.multi_turn.* | --custom-generate-function-path | a function asks for turns (docs/agents.md)
actor_rollout_ref.rollout.agent.* | --custom-generate-function-path | a function asks for turns (docs/agents.md)
actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes | --update-weight-buffer-size | in bytes
data.train_files | --prompt-data |
data.val_files | --eval-prompt-data | NAME FILE, with --eval-interval
data.prompt_key | --input-key |
data.reward_fn_key | --metadata-key | a row's metadata may have rm_type, the name of its reward
data.train_batch_size | --rollout-batch-size | prompts, in both
data.max_prompt_length | --rollout-max-prompt-len |
data.max_response_length | --rollout-max-response-len |
data.shuffle | --rollout-shuffle |
data.seed | --seed |
data.filter_overlong_prompts | --refuse-overlong-prompts | overlong prompts are left out unless refused
data.truncation | - | a prompt is never cut
data.apply_chat_template_kwargs | --apply-chat-template-kwargs |
data.tool_config_path | --tool-key | tools are a key of each row
custom_reward_function.path | --custom-rm-path | module:function
custom_reward_function.name | --custom-rm-path | module:function
reward_model.enable | --rm-url | a model that judges is asked by --rm-type remote_rm, or by a function of yours
reward_model.reward_manager | --rm-type | math, gsm8k, exact and others by name
algorithm.adv_estimator | --advantage-estimator | no gae, which needs a critic
algorithm.lam | - | no critic is trained
algorithm.norm_adv_by_std_in_grpo | --grpo-std-normalization |
algorithm.use_kl_in_reward | --kl-coef | above 0 is on
algorithm.kl_ctrl.kl_coef | --kl-coef | constant
algorithm.kl_penalty | --kl-loss-type |
algorithm.rollout_correction.rollout_is | --use-tis |
algorithm.rollout_correction.rollout_is_threshold | --tis-clip |
algorithm.filter_groups.enable | --dynamic-sampling-filter-path | nonzero_std
critic.* | - | no critic is trained
trainer.total_epochs | --num-epoch |
trainer.total_training_steps | --num-rollout | rollouts
trainer.save_freq | --save-interval |
trainer.test_freq | --eval-interval |
trainer.val_before_train | --skip-eval-before-train | the other way round
trainer.val_only | - | slime-spec eval CHECKPOINT
trainer.logger | --use-wandb --use-tensorboard | metrics.jsonl and the console always
trainer.project_name | --wandb-project |
trainer.experiment_name | --run-name |
trainer.default_local_dir | --output-dir |
trainer.rollout_data_dir | --save-samples |
trainer.nnodes | --actor-num-nodes |
trainer.n_gpus_per_node | --actor-num-gpus-per-node |
trainer.resume_mode | --load |
trainer.resume_from_path | --load |
trainer.balance_batch | - | ranks' microbatches are always balanced by tokens
trainer.critic_warmup | - | no critic is trained
ray_kwargs.ray_init.* | --ray-address | a run starts its own Ray unless it joins one
"""
