"""A slow sampler for comparison: transformers' forward in fp64 and the sampling rules as they are documented.

It shares nothing with the engine but the uniforms, whose t-th decides the t-th token: the token whose interval of the
cumulative distribution, in vocabulary order, holds the uniform; or the exponentials of a race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slime_spec.types import SamplingParams

GREEDY_BELOW = 1e-6
LOGIT_ERROR = 1e-4  # by which 32-bit logits of these tiny models may be off


@dataclass(frozen=True)
class Position:
    """Holds what is known of one token of a reply: logprobs and the distribution to draw from, both [vocab]."""

    logprobs: torch.Tensor
    distribution: torch.Tensor
    loosest: torch.Tensor  # the distribution's support if every cutoff of a filter were lower by a rounding error
    slack: float  # by which a rounding error may move the end of an interval

    def draw(self, uniform: float) -> int:
        inside = self.distribution.cumsum(0) > uniform * self.distribution.sum()
        return int(inside.int().argmax())

    def may_draw(self, token_id: int, uniform: float) -> bool:
        """Whether rounding errors could make it this token."""
        both = [weights / weights.sum() for weights in (self.distribution, self.loosest)]
        low = min(float(p[:token_id].sum()) for p in both) - self.slack
        high = max(float(p[: token_id + 1].sum()) for p in both) + self.slack
        return bool(self.loosest[token_id] > 0) and low <= uniform <= high

    def race(self, exponentials: torch.Tensor) -> int:
        return int((exponentials / self.distribution).argmin())

    def may_win(self, token_id: int, exponentials: torch.Tensor) -> bool:
        """Whether rounding errors could make it the first of the race, which tokens that are dropped do not run."""
        arrivals = (exponentials / self.loosest).where(self.loosest > 0, torch.inf)
        rivals = arrivals.where(self.distribution > 0, torch.inf)
        return bool(arrivals[token_id] <= rivals.min() * (1 + 4 * self.slack))


def logits_after(model: torch.nn.Module, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """fp64 logits [reply, vocab] that decide each token of the reply, from one forward over all tokens."""
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].double()


def position(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], eos: Sequence[int]
) -> Position:
    """Adjust logits in SGLang's order (penalties, bias, minimum length), scale and filter them, token by token."""
    logits = logits.clone()
    for token_id in set(generated):
        logits[token_id] -= params.frequency_penalty * generated.count(token_id) + params.presence_penalty
    for token_id in {*prompt, *generated}:
        factor = params.repetition_penalty
        logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    if len(generated) < params.min_new_tokens:
        logits[[*eos, *params.stop_token_ids]] = -torch.inf
    if params.temperature < GREEDY_BELOW:
        logprobs = logits.log_softmax(0)
        best = (logits >= logits.max() - LOGIT_ERROR).double()
        only = torch.zeros_like(best).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
        return Position(logprobs, only, best, slack=1.0)
    logprobs = (logits / params.temperature).log_softmax(0)
    slack = LOGIT_ERROR / min(params.temperature, 1.0)
    return Position(logprobs, filtered(logprobs.exp(), params, 0.0), filtered(logprobs.exp(), params, slack), slack)


def filtered(p: torch.Tensor, params: SamplingParams, slack: float) -> torch.Tensor:
    """Zero what top-k, then top-p of that, then min-p drops; each keeps all that is as likely as its last token."""
    lower = 1.0 - 4 * slack
    if params.top_k > 0:
        p = p.where(p >= lower * p.sort(descending=True).values[min(params.top_k, len(p)) - 1], 0.0)
    if params.top_p < 1.0:
        ranked = p.sort(descending=True).values
        before = ranked.cumsum(0) - ranked
        last = int((before < params.top_p * p.sum() + slack * (slack > 0)).sum()) - 1
        p = p.where(p >= lower * ranked[max(last, 0)], 0.0)
    return p.where(p >= lower * params.min_p * p.max(), 0.0)
