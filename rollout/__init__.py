"""Rollout engines and the Ray actors and pool that host them."""
