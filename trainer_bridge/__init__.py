"""This package trains the policy: GRPO on packed samples, run by Megatron-Core on CPU (gloo) or GPU (nccl)."""
