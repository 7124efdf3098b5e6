"""One round's drafts as the settings want them: chains or trees."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.embedded.drafters.chain import grow_chains
from rollout.embedded.drafters.heads import DraftStep, DraftVocab, Heads
from rollout.embedded.drafters.setup import DrafterSetup
from rollout.embedded.drafters.tree import grow_trees
from rollout.embedded.drafting import Draft, DraftContext
from rollout.embedded.plan import RowSpan


def grow_drafts(
    setup: DrafterSetup,
    vocab: DraftVocab,
    first: Heads,
    step: DraftStep,
    next_slots: Sequence[RowSpan],
    contexts: Sequence[DraftContext],
) -> list[Draft]:
    """A draft per context; see grow_chains and grow_trees."""
    shape = setup.shape
    if shape.topk == 1:
        return grow_chains(first, step, next_slots, contexts, shape.num_steps, vocab, setup.samples_drafts)
    return grow_trees(first, step, next_slots, contexts, shape.num_steps, shape.topk, shape.num_draft_tokens, vocab)
