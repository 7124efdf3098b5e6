"""Rewards that even a random policy's replies differ in."""

from slime_spec.types import Prompt


def variety(prompt: Prompt, reply: str) -> float:
    """How many different characters the reply has."""
    return float(len(set(reply)))
