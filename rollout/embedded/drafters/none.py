"""No speculation: every round is a plain decode step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import PushError
from slime_spec.interfaces import Draft, DraftContext

EMPTY = Draft(token_ids=(), parents=())


class NoneDrafter:
    """Proposes nothing."""

    def __init__(self, config: SpeculativeConfig) -> None:
        pass

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [EMPTY] * len(contexts)

    def observe(self, request_key: int, num_accepted: int) -> None:
        pass

    def forget(self, request_key: int) -> None:
        pass

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        raise PushError("speculation is off: the engine has no draft weights to update")
