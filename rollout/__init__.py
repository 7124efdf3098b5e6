"""This package holds the rollout engines, and the Ray actors and the pool that host them."""

# A line by which slime_spec.namesakes knows this package from others of its name.
PART_OF = "slime_spec"
