"""A verifier decides which tokens a pass emits from its logits; plain decoding is a round with an empty draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from rollout.embedded.logprobs import Beside, Wanted
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.unread import AnyDraft
from slime_spec.types import SamplingParams


@dataclass(frozen=True)
class VerifyRow:
    """Holds one sequence of a pass: its draft, params and uniforms; ``token_ids`` are all committed, prompt first."""

    draft: AnyDraft
    params: SamplingParams
    uniforms: Uniforms
    token_ids: Sequence[int]
    num_prompt_tokens: int
    wanted: Wanted | None = None  # beside each emitted token

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_nodes(self) -> int:
        """Return the number of rows of logits: the root and every drafted token."""
        return 1 + self.draft.num_tokens

    def depths(self) -> list[int]:
        """Return how many drafted tokens lead to each node, root first: node d decides token ``num_generated + d``."""
        if self.draft.is_chain:
            return list(range(self.num_nodes))
        depths = [0]
        for parent in self.draft.read().parents:
            depths.append(depths[parent + 1] + 1)
        return depths


class Verified(NamedTuple):
    """Holds what a round emits: accepted drafts, then one token of the target; ``path`` names the accepted nodes.

    ``logprobs[i]`` is the target's log softmax(logits / T) at ``token_ids[i]``, after bias and penalties. It is finite
    but where logits hold NaN or infinity or leave no token: the core then gives the request up, token and all.
    """

    token_ids: list[int]
    logprobs: list[float]
    path: tuple[int, ...]
    beside: Sequence[Beside] = ()  # each token, where a row wants something


class Verifier(Protocol):
    """Decides a pass; one thread calls it."""

    @property
    def lossy(self) -> bool:
        """Return whether it may bend the target's distribution: every sample it touches is marked."""

    @property
    def takes_unread(self) -> bool:
        """Return whether it judges drafts that still lie on the device, and reads them with its results."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        """Decide a pass; ``logits`` [sum of num_nodes, vocab], only read, holds each row's root, then its nodes."""
