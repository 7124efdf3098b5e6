"""Chains grow a token at a time for all sequences of a batch: by the draft's argmax, or by sampling.

A chain ends before the first token whose logits are not finite numbers. It keeps the tokens before: they were drawn
already, and a draft that is dropped for what came after its first token would bend the output's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rollout.embedded.drafters.step import DraftStep, DraftVocab, Heads
from rollout.embedded.drafting import DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.transfer import uploaded
from rollout.embedded.unread import ENDED, DraftsOnDevice, UnreadDraft
from rollout.embedded.verification.draw import argmax, inverse_cdf
from slime_spec.types import is_greedy


def chain_limit(context: DraftContext) -> int:
    return min(context.max_draft_tokens, context.max_depth)


# (logits [rows, draft vocab], number of the step) -> the draft's tokens [rows], and which of them may be kept
Draw = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def grow_chains(
    first: Heads,
    step: DraftStep,
    next_slots: Sequence[RowSpan],
    contexts: Sequence[DraftContext],
    num_steps: int,
    vocab: DraftVocab,
    samples: bool,
) -> list[UnreadDraft]:
    """Return a chain per row, of ``num_steps`` tokens or as many as its context allows.

    ``first`` follows each row's root; ``next_slots[row]`` is where its first drafted token's keys go. With ``samples``
    requests that sample get tokens drawn from softmax(logits / T), and ``Draft.q_draft`` says so.
    """
    num_steps = chain_steps(contexts, num_steps)
    sampler = chain_sampler(contexts, num_steps, samples)

    def next_step(token_ids: torch.Tensor, hidden: torch.Tensor, index: int) -> Heads:
        spans = [RowSpan(span.row, span.start + index, 1, span.prefix_row, span.prefix_len) for span in next_slots]
        return step(token_ids, hidden, spans)

    draw = draw_greedy if sampler is None else sampler.draw_on(first.logits.device)
    levels = grow_levels(first, next_step, num_steps, draw, vocab)
    return chains(levels, contexts, sampler, vocab)


def chain_sampler(contexts: Sequence[DraftContext], num_steps: int, samples: bool) -> ChainSampler | None:
    """Return what draws the drafts of a batch; None where all of it takes argmaxes."""
    sampler = ChainSampler(contexts, num_steps) if samples else None
    return sampler if sampler is not None and sampler.any else None


def chain_steps(contexts: Sequence[DraftContext], num_steps: int) -> int:
    """Return the number of steps that some context has room for."""
    return min(num_steps, max(map(chain_limit, contexts)))


def grow_levels(
    first: Heads,
    step: Callable[[torch.Tensor, torch.Tensor, int], Heads],
    num_steps: int,
    draw: Draw,
    vocab: DraftVocab,
) -> torch.Tensor:
    """Return the chains' tokens [rows, steps], without a read of the device; ENDED where there is none to keep.

    ``step(token_ids, hidden, index)`` puts the ``index``-th drafted token where it belongs.
    """
    levels: list[torch.Tensor] = []
    heads = first
    for index in range(num_steps):
        draft_ids, kept = draw(heads.logits, index)
        tokens = vocab.tokens(draft_ids)
        levels.append(tokens.where(kept, ENDED))
        if index + 1 < num_steps:
            heads = step(tokens, heads.hidden, index)
    return torch.stack(levels, dim=1)


def draw_greedy(logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draft_ids = argmax(logits)
    # A row's largest logit is NaN or infinite exactly where its distribution is none.
    return draft_ids, logits.gather(1, draft_ids.unsqueeze(1)).squeeze(1).isfinite()


def chains(
    levels: torch.Tensor, contexts: Sequence[DraftContext], sampler: ChainSampler | None, vocab: DraftVocab
) -> list[UnreadDraft]:
    """Return the drafts of ``grow_levels``, each as long as its context allows."""
    samples = [False] * len(contexts) if sampler is None else sampler.samples
    drafts = DraftsOnDevice(levels, q_draft=None if sampler is None else sampler.q_draft(vocab))
    return [
        UnreadDraft(drafts, row, chain_limit(context), drawn)
        for row, (context, drawn) in enumerate(zip(contexts, samples, strict=True))
    ]


def chain_distribution(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Return softmax(logits / T) [rows, draft vocab]; rows of temperature 0, which take the argmax, with T = 1."""
    divisors = temperatures.where(temperatures > 0.0, 1.0).to(logits.dtype)
    return (logits / divisors.unsqueeze(1)).softmax(dim=-1)


def draw_sampled(
    logits: torch.Tensor, q_draft: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``uniforms`` [rows] draw from ``q_draft``, argmaxes at temperature 0, and which may be kept.

    A q is none where logits are not finite numbers, or are no longer after the division by the temperature.
    """
    greedy, finite = draw_greedy(logits, 0)
    drawn = inverse_cdf(q_draft, uniforms)
    has_mass = q_draft.gather(1, drawn.unsqueeze(1)).squeeze(1) > 0.0
    samples = temperatures > 0.0
    return drawn.where(samples, greedy), has_mass.where(samples, finite)


class ChainSampler:
    """Draws the drafts of a batch in which some requests sample, and keeps the distributions they came from."""

    def __init__(self, contexts: Sequence[DraftContext], num_steps: int) -> None:
        self.samples = [not is_greedy(each.params.temperature) for each in contexts]
        pairs = zip(contexts, self.samples, strict=True)
        self.temperatures = np.array([each.params.temperature if samples else 0.0 for each, samples in pairs])
        self.uniforms = np.array([[_uniform(each, step) for step in range(num_steps)] for each in contexts])
        self.distributions: list[torch.Tensor] = []

    @property
    def any(self) -> bool:
        """Return whether some request of the batch samples."""
        return any(self.samples)

    def draw_on(self, device: torch.device) -> Draw:
        """Return how a step draws its tokens; what was drawn from is kept."""
        temperatures, uniforms = uploaded(device, self.temperatures, self.uniforms)

        def draw(logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            q_draft = chain_distribution(logits, temperatures)
            self.distributions.append(q_draft)
            return draw_sampled(logits, q_draft, temperatures, uniforms[:, step])

        return draw

    def q_draft(self, vocab: DraftVocab) -> torch.Tensor:
        """Return what every token was drawn from [rows * steps, target vocab]; of no use for rows of argmaxes."""
        return vocab.spread(torch.stack(self.distributions, dim=1).flatten(0, 1))


def _uniform(context: DraftContext, step: int) -> float:
    """Return the row's uniform for ``step``; a step beyond the row's limit needs none, as its token is cut away."""
    generated = len(context.token_ids) - context.num_prompt_tokens
    return context.uniforms[generated + step] if step < chain_limit(context) else 0.0
