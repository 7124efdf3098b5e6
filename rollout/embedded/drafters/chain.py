"""Chains grow a token at a time for all sequences of a batch: by the draft's argmax, or by sampling.

A chain ends before the first token whose logits are not finite numbers. It keeps the tokens before: they were drawn
already, and a draft that is dropped for what came after its first token would bend the output's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout.embedded.drafters.step import DraftStep, DraftVocab, Heads
from rollout.embedded.drafting import Draft, DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.transfer import uploaded
from rollout.embedded.verification.draw import argmax, inverse_cdf
from slime_spec.types import is_greedy

NONFINITE = -1  # in place of a token whose logits were not finite numbers


def chain_limit(context: DraftContext) -> int:
    return min(context.max_draft_tokens, context.max_depth)


def grow_chains(
    first: Heads,
    step: DraftStep,
    next_slots: Sequence[RowSpan],
    contexts: Sequence[DraftContext],
    num_steps: int,
    vocab: DraftVocab,
    samples: bool,
) -> list[Draft]:
    """Return a chain per row, of ``num_steps`` tokens or as many as its context allows.

    ``first`` follows each row's root; ``next_slots[row]`` is where its first drafted token's keys go. With ``samples``
    requests that sample get tokens drawn from softmax(logits / T), and ``Draft.q_draft`` says so.
    """
    num_steps = min(num_steps, max(map(chain_limit, contexts)))
    sampler = ChainSampler(contexts, num_steps, vocab, first.logits.device) if samples else None
    levels: list[torch.Tensor] = []
    heads, spans = first, next_slots
    for index in range(num_steps):
        draft_ids = argmax(heads.logits)
        # A row's largest logit is NaN or infinite exactly where its distribution is none.
        finite = heads.logits.gather(1, draft_ids.unsqueeze(1)).squeeze(1).isfinite()
        if sampler is not None and sampler.rows:
            draft_ids, finite = sampler.draw(heads.logits, draft_ids, finite, index)
        tokens = vocab.tokens(draft_ids)
        levels.append(tokens.where(finite, NONFINITE))
        if index + 1 < num_steps:
            heads = step(tokens, heads.hidden, spans)
            spans = [RowSpan(span.row, span.start + 1, 1, span.prefix_row, span.prefix_len) for span in spans]
    drafts = []
    for row, (context, chain) in enumerate(zip(contexts, torch.stack(levels, dim=1).tolist(), strict=True)):
        tokens = chain[: chain_limit(context)]
        nonfinite = NONFINITE in tokens
        if nonfinite:
            tokens = tokens[: tokens.index(NONFINITE)]
        q_draft = None if sampler is None else sampler.distribution(row, len(tokens))
        drafts.append(Draft.chain(tokens, q_draft, nonfinite))
    return drafts


class ChainSampler:
    """Draws the drafts of those rows of a batch whose requests sample, and keeps the distributions they came from."""

    def __init__(
        self, contexts: Sequence[DraftContext], num_steps: int, vocab: DraftVocab, device: torch.device
    ) -> None:
        self.rows = [row for row, each in enumerate(contexts) if not is_greedy(each.params.temperature)]
        self._vocab = vocab
        sampling = [contexts[row] for row in self.rows]
        uniforms = [[_uniform(each, step) for each in sampling] for step in range(num_steps)]
        self._index, self._temperatures, self._uniforms = uploaded(
            device,
            np.array(self.rows, np.int64),
            np.array([[each.params.temperature] for each in sampling]),
            np.array(uniforms, np.float64),
        )
        self._distributions: list[torch.Tensor] = []

    def draw(
        self, logits: torch.Tensor, draft_ids: torch.Tensor, finite: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both [rows] with what this step's uniforms drew for sampling rows: the tokens, and whether q is one.

        A q is none where logits are not finite numbers, or are no longer after the division by the temperature.
        """
        q_draft = (logits[self._index] / self._temperatures.to(logits.dtype)).softmax(dim=-1)
        self._distributions.append(self._vocab.spread(q_draft))
        drawn = inverse_cdf(q_draft, self._uniforms[step])
        has_mass = q_draft.gather(1, drawn.unsqueeze(1)).squeeze(1) > 0.0
        return draft_ids.index_copy(0, self._index, drawn), finite.index_copy(0, self._index, has_mass)

    def distribution(self, row: int, num_nodes: int) -> torch.Tensor | None:
        """Return the distributions [nodes, target vocab] of the row's first sampled tokens.

        None for a row of argmaxes, or without a token.
        """
        if row not in self.rows or not num_nodes:
            return None
        place = self.rows.index(row)
        return torch.stack([distribution[place] for distribution in self._distributions[:num_nodes]])


def _uniform(context: DraftContext, step: int) -> float:
    """Return the row's uniform for ``step``; a step beyond the row's limit needs none, as its token is cut away."""
    generated = len(context.token_ids) - context.num_prompt_tokens
    return context.uniforms[generated + step] if step < chain_limit(context) else 0.0
