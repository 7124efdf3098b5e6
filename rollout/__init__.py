"""This package holds the rollout engines, and the Ray actors and the pool that host them."""
