"""Drafts of a network stay where they were computed until their round's results are read, so a round waits once.

    propose ──► UnreadDraft   the host knows how many tokens a draft has at most, and whether it is a chain
    verify      tokens go from the draft's memory into the pass's; the verifier reads them with its own results
    read()  ──► Draft         the tokens, cut where the draft ended; it waits for the device unless they were read

A padded draft costs nothing but its rows of the pass: its padding is -1, which no token of the target equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import isfinite
from typing import Any

import torch

from rollout.embedded.draft import Draft
from rollout.embedded.transfer import Array, downloaded

ENDED = -1  # in place of a token, from the end of a draft on


@dataclass(frozen=True)
class Branches:
    """Holds the shapes of trees: parents and depths [rows, nodes] as in Draft and from 1, and nonfinite [rows]."""

    parents: torch.Tensor
    depths: torch.Tensor
    nonfinite: torch.Tensor


@dataclass(eq=False)
class DraftsOnDevice:
    """Holds the drafts of a batch: tokens [rows, nodes], ENDED from a draft's end on, as a chain or as ``branches``.

    ``q_draft`` [rows * nodes, target vocab] are the distributions that the tokens of sampling rows were drawn from.
    ``confidence`` [rows, nodes] is Draft's; reading it must not wait, so it is of the CPU alone.
    """

    tokens: torch.Tensor
    branches: Branches | None = None
    q_draft: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    _host: list[Any] = field(default_factory=list)

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def is_read(self) -> bool:
        return bool(self._host)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return what ``take`` wants, as arrays of the host."""
        shape = self.branches
        return [self.tokens] if shape is None else [self.tokens, shape.parents, shape.nonfinite]

    def take(self, arrays: Sequence[Array]) -> None:
        """Keep the numbers of ``tensors``."""
        self._host = [array.tolist() for array in arrays]

    def draft(self, row: int, most: int, samples: bool) -> Draft:
        """Return a row's draft of at most ``most`` tokens; a device that was not read so far is waited for."""
        if not self.is_read:
            self.take(downloaded(*self.tensors))
        tokens = self._host[0][row][:most]
        ends = ENDED in tokens
        if ends:
            tokens = tokens[: tokens.index(ENDED)]
        if self.branches is not None:
            parents, nonfinite = self._host[1][row], self._host[2][row]
            return Draft(tuple(tokens), tuple(parents[: len(tokens)]), nonfinite=bool(nonfinite))
        q_draft = self.q_draft[row * self.num_nodes :][: len(tokens)] if self.q_draft is not None and samples else None
        draft = Draft.chain(tokens, q_draft if tokens else None, nonfinite=ends)
        if self.confidence is None:
            return draft
        confidence = tuple(takewhile(isfinite, self.confidence[row, :most].tolist()))
        stopped = ends and len(confidence) > len(tokens)
        return replace(draft, nonfinite=ends and not stopped, confidence=confidence)


@dataclass(frozen=True)
class UnreadDraft:
    """Names a row of drafts on a device: a draft of at most ``num_tokens`` tokens, drawn or chosen."""

    of: DraftsOnDevice
    row: int
    num_tokens: int
    samples: bool = False

    @property
    def is_chain(self) -> bool:
        return self.of.branches is None

    @property
    def is_of_text(self) -> bool:
        return False

    @property
    def is_confident(self) -> bool:
        """Return whether the draft says how sure its model was of each token."""
        return self.of.confidence is not None

    @property
    def is_sampled(self) -> bool:
        return self.samples and self.of.q_draft is not None and self.num_tokens > 0

    def read(self) -> Draft:
        return self.of.draft(self.row, self.num_tokens, self.samples)


AnyDraft = Draft | UnreadDraft


@dataclass(frozen=True)
class Placement:
    """Says which rows of a pass, in order, verify the rows of some drafts on the device."""

    of: DraftsOnDevice
    rows: list[int]
    num_tokens: int  # of the longest draft


def placement(drafts: Sequence[AnyDraft]) -> Placement | None:
    """Return where a pass over ``drafts`` has those that are unread, None where none is."""
    unread = [(row, draft) for row, draft in enumerate(drafts) if isinstance(draft, UnreadDraft)]
    if not unread:
        return None
    (of,) = {draft.of for _, draft in unread}
    assert [draft.row for _, draft in unread] == list(range(of.tokens.shape[0])), (
        "a batch's drafts are verified together"
    )
    return Placement(of, [row for row, _ in unread], max(draft.num_tokens for _, draft in unread))
