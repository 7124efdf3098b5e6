"""Chains grow a token at a time for all sequences of a batch: by the draft's argmax, by sampling, or by races.

A chain ends before the first token whose logits are not finite numbers. It keeps the tokens before: they were drawn
already, and a draft that is dropped for what came after its first token would bend the output's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from rollout.embedded.drafters.step import DraftStep, DraftVocab, Drawing, Heads
from rollout.embedded.drafting import DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.transfer import uploaded
from rollout.embedded.unread import ENDED, DraftsOnDevice, UnreadDraft
from rollout.embedded.verification.distributions import sampling_distribution
from rollout.embedded.verification.draw import argmax, inverse_cdf
from rollout.embedded.verification.race import race
from slime_spec.speculation.confidence import StopRule
from slime_spec.types import GREEDY_BELOW_TEMPERATURE, SamplingParams, is_greedy


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
    drawing: Drawing,
) -> list[UnreadDraft]:
    """Return a chain per row, of ``num_steps`` tokens or as many as its context allows.

    ``first`` follows each row's root; ``next_slots[row]`` is where its first drafted token's keys go. Requests that
    sample get tokens drawn as ``drawing`` says; where they are SAMPLED, from softmax(logits / T), ``Draft.q_draft``
    says so. T is the request's temperature times the context's ``draft_temperature``. Where the contexts
    have a rule to stop, chains say how sure the model was of each token, and end as Watch says.
    """
    num_steps = chain_steps(contexts, num_steps)
    sampler = chain_sampler(contexts, num_steps, drawing)

    def next_step(token_ids: torch.Tensor, hidden: torch.Tensor, index: int) -> Heads:
        spans = [RowSpan(span.row, span.start + index, 1, span.prefix_row, span.prefix_len) for span in next_slots]
        return step(token_ids, hidden, spans)

    if drawing is Drawing.RACED:
        draw = raced_draw(contexts, num_steps, vocab)
    else:
        draw = draw_greedy if sampler is None else sampler.draw_on(first.logits.device)
    stop = contexts[0].stop
    watch = None if stop is None else Watch(draw, stop, [False] * len(contexts) if sampler is None else sampler.samples)
    levels = grow_levels(first, next_step, num_steps, watch or draw, vocab, watch)
    return chains(levels, contexts, sampler, vocab, None if watch is None else watch.confidence)


def chain_sampler(contexts: Sequence[DraftContext], num_steps: int, drawing: Drawing) -> ChainSampler | None:
    """Return what samples the drafts of a batch; None where none of it is sampled."""
    sampler = ChainSampler(contexts, num_steps) if drawing is Drawing.SAMPLED else None
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
    watch: Watch | None = None,
) -> torch.Tensor:
    """Return the chains' tokens [rows, steps], without a read of the device; ENDED where there is none to keep.

    ``step(token_ids, hidden, index)`` puts the ``index``-th drafted token where it belongs. With a ``watch``, which is
    of the CPU alone, there may be fewer steps.
    """
    levels: list[torch.Tensor] = []
    heads = first
    for index in range(num_steps):
        draft_ids, kept = draw(heads.logits, index)
        tokens = vocab.tokens(draft_ids)
        levels.append(tokens.where(kept, ENDED))
        if watch is not None and watch.is_over:
            break
        if index + 1 < num_steps:
            heads = step(tokens, heads.hidden, index)
    return torch.stack(levels, dim=1)


class Watch:
    """Draws as ``draw`` does, keeps how sure the model was, and stops chains that are hardly likely to stand.

    Sure is softmax(logits), whatever the temperature: of the token where it is chosen, of the likeliest token in rows
    that sample. A sampled chain ends before the first token of which that, calibrated and times those before, is below
    the rule's bound: what decides is known before the token is drawn, or the output's distribution would bend. All
    chains end once none is worth going on with.
    """

    def __init__(self, draw: Draw, stop: StopRule, samples: Sequence[bool]) -> None:
        self._draw, self._stop = draw, stop
        self._samples = torch.tensor(samples)
        self._levels: list[torch.Tensor] = []
        self._chances = torch.ones(len(samples))

    def __call__(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        draft_ids, kept = self._draw(logits, step)
        chosen = logits.gather(1, draft_ids.unsqueeze(1)).squeeze(1)
        confidence = (torch.where(self._samples, logits.amax(dim=-1), chosen) - logits.logsumexp(dim=-1)).exp()
        self._levels.append(confidence.where(kept, torch.nan))
        expected = [self._stop.calibration.expected(step, each) for each in confidence.where(kept, 0.0).tolist()]
        self._chances = (self._chances * torch.tensor(expected)).where(kept, 0.0)
        return draft_ids, kept & ~(self._samples & (self._chances < self._stop.below))

    @property
    def is_over(self) -> bool:
        return bool((self._chances < self._stop.below).all())

    @property
    def confidence(self) -> torch.Tensor:
        """Return how sure the model was [rows, steps], NaN where its logits are no numbers."""
        return torch.stack(self._levels, dim=1)


def draw_greedy(logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draft_ids = argmax(logits)
    # A row's largest logit is NaN or infinite exactly where its distribution is none.
    return draft_ids, logits.gather(1, draft_ids.unsqueeze(1)).squeeze(1).isfinite()


def raced_draw(contexts: Sequence[DraftContext], num_steps: int, vocab: DraftVocab) -> Draw:
    """Return how a step draws by races: for each row that samples, the token that wins the target's noise.

    The race is run with the draft's distribution under the request's own filters, at the draft's temperature: a token
    that the target's filters drop never wins the target's race.
    """
    samples = torch.tensor([not is_greedy(each.params.temperature) for each in contexts])
    if not samples.any():
        return draw_greedy
    params = [tempered(each) for each in contexts]
    keys = np.array([[_noise_key(each, step) for step in range(num_steps)] for each in contexts], np.uint64)

    def draw(logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        q_draft = sampling_distribution(logits, params)
        if step == 0:
            _show_first(contexts, q_draft, vocab)
        won = race(q_draft, keys[:, step], vocab.target_ids)
        has_mass = q_draft.gather(1, won.unsqueeze(1)).squeeze(1) > 0.0
        if samples.all():
            return won, has_mass
        greedy, finite = draw_greedy(logits, step)
        return won.where(samples, greedy), has_mass.where(samples, finite)

    return draw


def chains(
    levels: torch.Tensor,
    contexts: Sequence[DraftContext],
    sampler: ChainSampler | None,
    vocab: DraftVocab,
    confidence: torch.Tensor | None = None,
) -> list[UnreadDraft]:
    """Return the drafts of ``grow_levels``, each as long as its context allows."""
    samples = [False] * len(contexts) if sampler is None else sampler.samples
    if sampler is not None:
        _show_first(contexts, sampler.distributions[0], vocab)
    q_draft = None if sampler is None else sampler.q_draft(vocab)
    drafts = DraftsOnDevice(levels, q_draft=q_draft, confidence=confidence)
    return [
        UnreadDraft(drafts, row, min(chain_limit(context), drafts.num_nodes), drawn)
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
        self.temperatures = np.array([draw_temperature(each) if samples else 0.0 for each, samples in pairs])
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


def draw_temperature(context: DraftContext) -> float:
    """Return the temperature of a draft's tokens, for a request that samples: it is never so low as to mean greedy."""
    return max(context.params.temperature * context.draft_temperature, GREEDY_BELOW_TEMPERATURE)


def tempered(context: DraftContext) -> SamplingParams:
    """Return the request's parameters at the temperature of a draft's tokens."""
    if context.draft_temperature == 1.0 or is_greedy(context.params.temperature):
        return context.params
    return replace(context.params, temperature=draw_temperature(context))


def _show_first(contexts: Sequence[DraftContext], q_draft: torch.Tensor, vocab: DraftVocab) -> None:
    """Show the distributions [rows, draft vocab] of first tokens to the contexts that ask for theirs."""
    for row, context in enumerate(contexts):
        if context.on_first_distribution is not None and not is_greedy(context.params.temperature):
            context.on_first_distribution(vocab.spread(q_draft[row : row + 1])[0])


def _uniform(context: DraftContext, step: int) -> float:
    """Return the row's uniform for ``step``; a step beyond the row's limit needs none, as its token is cut away."""
    generated = len(context.token_ids) - context.num_prompt_tokens
    return context.uniforms[generated + step] if step < chain_limit(context) else 0.0


def _noise_key(context: DraftContext, step: int) -> int:
    assert context.noise is not None, "the core gives drafters the noise"
    return context.noise.key(len(context.token_ids) - context.num_prompt_tokens + step)
