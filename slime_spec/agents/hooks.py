"""Hooks of a user's own change each sample between its generation and its reward, as slime's do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from slime_spec.agents.client import Client
from slime_spec.agents.own import OwnFunction, takes


async def one_turn(args: Any, sample: Any, sampling_params: Mapping[str, Any], client: Client) -> Any:
    """Make a sample of one turn: what hooks get where no function of the user's own generates."""
    await client.turn(sample, sampling_params)
    return sample


async def hooked(hooks: Sequence[OwnFunction], args: Any, made: Any, rollout_id: int, evaluation: bool) -> Any:
    """Return a sample, or a list of samples, as the hooks leave it, each called with what the one before gave.

    A hook ``hook(args, sample, *, rollout_id=None, evaluation=False)``, sync or async, changes the sample and returns
    nothing, or returns another. Raises TypeError for anything else that it returns.
    """
    if isinstance(made, list):
        return [await hooked(hooks, args, each, rollout_id, evaluation) for each in made]
    besides = {"rollout_id": rollout_id, "evaluation": evaluation}
    for hook in hooks:
        returned = hook(args, made, **{name: value for name, value in besides.items() if takes(hook, name)})
        if inspect.isawaitable(returned):
            returned = await returned
        if returned is not None and not hasattr(returned, "tokens"):
            raise TypeError(f"a sample hook returns a sample or None, it was {type(returned).__name__}")
        made = made if returned is None else returned
    return made
