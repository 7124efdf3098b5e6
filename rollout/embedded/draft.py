"""A Draft is what a drafter proposes for one sequence and one round: a chain or a tree of candidate tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draft:
    """Holds the candidate tokens of one verify pass without the root (last emitted token); parents precede children.

    ``parents[i]`` is the index of node i's parent, -1 for the root: a chain of three is ``(-1, 0, 1)``. Siblings are
    distinct tokens. ``q_draft`` is the distribution each token was truly sampled from ([nodes, target vocab], fp32);
    None means the drafter chose its tokens (argmax, n-gram, lookup, top-k), a point mass. ``nonfinite`` says that the
    draft ends, perhaps before its first token, where the draft model's logits were not finite numbers. ``expected``,
    where the drafter knows it, is its own estimate for each node of the probability that the node is accepted, given
    that its parent was: it says where rows are well spent, and verification never reads it. Drafts out of texts may
    have it, those of a network do not: theirs is ``confidence``, where it was asked for: the draft model's probability
    of each token it chose, or of the likeliest where it samples, which is to be calibrated. It goes on beyond a sampled
    draft's last token where the draft was stopped.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    q_draft: torch.Tensor | None = None
    nonfinite: bool = False
    expected: tuple[float, ...] | None = None
    confidence: tuple[float, ...] | None = None

    @classmethod
    def chain(
        cls,
        token_ids: Sequence[int],
        q_draft: torch.Tensor | None = None,
        nonfinite: bool = False,
        expected: tuple[float, ...] | None = None,
    ) -> Draft:
        return cls(tuple(token_ids), tuple(range(-1, len(token_ids) - 1)), q_draft, nonfinite, expected)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    @property
    def is_of_text(self) -> bool:
        return self.expected is not None

    @property
    def is_confident(self) -> bool:
        """Return whether the draft says how sure its model was of each token."""
        return self.confidence is not None

    @property
    def is_sampled(self) -> bool:
        """Return whether its tokens were drawn from a distribution that verification must know."""
        return self.q_draft is not None and bool(self.token_ids)

    def read(self) -> Draft:
        return self

    def first(self, count: int) -> Draft:
        """Return the draft's first ``count`` nodes, of a draft whose tokens were chosen, not sampled."""
        assert self.q_draft is None, "which tokens of a sampled draft are judged must not depend on the others"
        expected = None if self.expected is None else self.expected[:count]
        return Draft(self.token_ids[:count], self.parents[:count], None, self.nonfinite, expected, self.confidence)


NO_DRAFT = Draft(token_ids=(), parents=())
