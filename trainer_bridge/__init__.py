"""The policy's trainer: GRPO on packed samples, run by Megatron-Core on CPU (gloo) or GPU (nccl)."""
