"""This package trains the policy: GRPO on packed samples, run by Megatron-Core on CPU (gloo) or GPU (nccl)."""

# A line by which slime_spec.namesakes knows this package from others of its name.
PART_OF = "slime_spec"
