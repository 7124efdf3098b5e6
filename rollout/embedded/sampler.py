"""From logits to tokens: one law for plain decoding and for verification.

The law is softmax(logits / T), then top-k, then top-p on what top-k kept, then min-p, each keeping every token at
least as likely as its cutoff (so that ties never depend on a sort's order). A token is drawn by inverse CDF from the
request's own uniform; T = 0 is argmax. The reported logprob is the unfiltered law's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from slime_spec.types import SamplingParams, is_greedy

# Most nuclei hold fewer tokens than this; a full sort of the vocabulary costs 3 ms a row.
FIRST_CANDIDATES = 1024
BLOCK = 256


@dataclass(frozen=True)
class Sampled:
    """A token and its log probability for every row of logits."""

    token_ids: list[int]
    logprobs: list[float]


def is_filtered(params: SamplingParams) -> bool:
    return not is_greedy(params.temperature) and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


@torch.inference_mode()
def sample(logits: torch.Tensor, params: Sequence[SamplingParams], coins: Sequence[float]) -> Sampled:
    """One token per row of ``logits`` [rows, vocab] (fp32); ``coins`` are uniforms in [0, 1), unused by greedy rows."""
    p_full, p_target = sampling_law(logits, params)
    greedy = [is_greedy(each.temperature) for each in params]
    if all(greedy):
        tokens = logits.argmax(dim=-1)
    else:
        uniforms = torch.tensor(coins, dtype=torch.float64, device=logits.device)
        tokens = inverse_cdf(p_target, uniforms)
        if any(greedy):
            tokens = torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(dim=-1), tokens)
    logprobs = p_full.gather(1, tokens.unsqueeze(1)).squeeze(1).log()
    return Sampled(tokens.tolist(), logprobs.tolist())


def sampling_law(logits: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(logits / T), the same after the filters, not renormalised), each [rows, vocab].

    Greedy rows have T = 1 here: their logprobs are the raw ones, and their token is the argmax.
    """
    temperatures = [1.0 if is_greedy(each.temperature) else each.temperature for each in params]
    if set(temperatures) != {1.0}:
        logits = logits / torch.tensor(temperatures, device=logits.device, dtype=logits.dtype).unsqueeze(1)
    p_full = logits.softmax(dim=-1)
    rows = [row for row, each in enumerate(params) if is_filtered(each)]
    if not rows:
        return p_full, p_full
    p_target = p_full if len(rows) == len(params) else p_full[rows]
    cutoff = filter_cutoff(p_target, [params[row] for row in rows])
    filtered = torch.where(p_target >= cutoff.unsqueeze(1), p_target, 0.0)
    if len(rows) == len(params):
        return p_full, filtered
    p_target = p_full.clone()
    p_target[rows] = filtered
    return p_full, p_target


def filter_cutoff(p: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The least probability each row keeps [rows]; looks at the likeliest tokens first, at all of them if need be."""
    vocab = p.shape[1]
    widest_k = max(each.top_k for each in params)
    candidates = min(vocab, max(FIRST_CANDIDATES if any(each.top_p < 1.0 for each in params) else 1, widest_k))
    ranked = p.topk(candidates, dim=-1).values
    cutoff, covered = _cutoff_of_ranked(ranked, params)
    if candidates == vocab or bool(covered.all()):
        return cutoff
    rest = (~covered).nonzero().squeeze(1)
    full, _ = _cutoff_of_ranked(p[rest].sort(dim=-1, descending=True).values, [params[row] for row in rest.tolist()])
    return cutoff.index_copy(0, rest, full)


def _cutoff_of_ranked(ranked: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cutoffs from descending probabilities, and whether the nucleus ends within them."""
    width, device = ranked.shape[1], ranked.device
    top_k = torch.tensor([min(each.top_k, width) if each.top_k > 0 else width for each in params], device=device)
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([each.min_p for each in params], dtype=ranked.dtype, device=device)
    has_k = torch.tensor([each.top_k > 0 for each in params], device=device)
    at_k = ranked.gather(1, (top_k - 1).unsqueeze(1)).squeeze(1)
    floor = torch.where(has_k, at_k, torch.zeros_like(at_k))
    # Ties with the k-th token stay, and count in the mass that top-p measures.
    kept = torch.where(ranked >= floor.unsqueeze(1), ranked, 0.0).double()
    mass = torch.where(has_k, kept.sum(dim=-1), torch.ones_like(top_p))
    before = kept.cumsum(dim=-1) - kept
    inside = (before < top_p.unsqueeze(1) * mass.unsqueeze(1)) & (kept > 0)
    last_inside = ranked.gather(1, inside.sum(dim=-1, keepdim=True).clamp(min=1) - 1).squeeze(1)
    nucleus = torch.where(top_p < 1.0, last_inside, torch.zeros_like(last_inside))
    covered = has_k | (top_p >= 1.0) | ~inside[:, -1]
    return torch.maximum(torch.maximum(floor, nucleus), min_p * ranked[:, 0]), covered


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token whose interval of the cumulative ``weights`` [rows, vocab] holds ``uniforms`` [rows] times their sum.

    Two levels (blocks of the vocabulary, then one block): one pass over the weights instead of a cumulative sum,
    and cumulative sums in fp64. A token of weight zero has an empty interval and is never drawn.
    """
    rows, vocab = weights.shape
    block = min(BLOCK, vocab)
    whole = vocab // block * block
    sums = weights[:, :whole].view(rows, -1, block).sum(dim=-1) if whole == vocab else _ragged_sums(weights, block)
    cumulative = sums.double().cumsum(dim=-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    # Rounding may put the target at the very end: step back to a block that has weight.
    chosen = _last_positive(sums, chosen)
    before = cumulative.gather(1, chosen) - sums.double().gather(1, chosen)
    columns = chosen * block + torch.arange(block, device=weights.device)
    inner = weights.gather(1, columns.clamp(max=vocab - 1)) * (columns < vocab)
    cumulative = inner.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulative, target - before, right=True).clamp_(max=block - 1)
    return (chosen * block + _last_positive(inner, index)).squeeze(1)


def _ragged_sums(weights: torch.Tensor, block: int) -> torch.Tensor:
    padded = F.pad(weights, (0, -weights.shape[1] % block))
    return padded.view(weights.shape[0], -1, block).sum(dim=-1)


def _last_positive(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``index`` [rows, 1] where its weight is positive, else the nearest earlier (or first) positive position."""
    if bool((weights.gather(1, index) > 0).all()):
        return index
    columns = torch.arange(weights.shape[1], device=weights.device)
    positive = weights > 0
    earlier = torch.where(positive & (columns <= index), columns, -1).amax(dim=-1, keepdim=True)
    first = positive.int().argmax(dim=-1, keepdim=True)
    return torch.where(earlier >= 0, earlier, first)
