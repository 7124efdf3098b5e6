"""slime_spec is speculative decoding that pays in RL rollouts.

This package holds what both sides of the framework share (types, configuration, interfaces, weights, metrics, the RL
loop); `rollout` hosts the engines, `trainer_bridge` the trainer, `slime_spec.launch` wires them.
"""

__version__ = "0.1.0"
# A line by which slime_spec.namesakes knows this package from others of its name.
PART_OF = "slime_spec"
