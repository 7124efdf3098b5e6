"""Watches a drafter at work, and may put other tokens in its drafts' place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.embedded.draft import Draft
from rollout.embedded.drafting import DraftContext, Drafter


@dataclass(frozen=True)
class Proposal:
    """One draft, and the tokens it was asked to continue (the root last)."""

    token_ids: tuple[int, ...]
    draft: Draft
    context: DraftContext


class RecordingDrafter:
    """``inner`` drafts and is recorded; with ``script`` the core is given what that says instead, as chains.

    So a drafter whose random weights would have nothing accepted can be watched over accepted drafts of any length.
    """

    def __init__(self, inner: Drafter, script: Callable[[DraftContext], Sequence[int]] | None = None) -> None:
        self._inner, self._script = inner, script
        self.proposals: list[Proposal] = []

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        drafts = [draft.read() for draft in self._inner.propose(contexts)]
        for context, draft in zip(contexts, drafts, strict=True):
            self.proposals.append(Proposal(tuple(context.token_ids), draft, context))
        if self._script is None:
            return drafts
        limits = [min(context.max_draft_tokens, context.max_depth) for context in contexts]
        return [Draft.chain(tuple(self._script(each))[:limit]) for each, limit in zip(contexts, limits, strict=True)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
