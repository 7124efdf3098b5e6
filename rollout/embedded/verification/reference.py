"""The references run each algorithm one row and one node at a time, in its paper's order; batched verifiers must agree.

Distributions are normalised fp64 rows: ``p_target`` [1 + nodes, vocab] after the root (row 0) and after node i (row i +
1), ``q_draft`` [nodes, vocab] that node i was sampled from. Uniforms are indexed by depth: ``accept[d]`` judges the
draft that would be emitted d-th, ``emit[d]`` draws the d-th token where no draft supplies it. All return the emitted
tokens, accepted ones first, then the correction or the bonus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rollout.embedded.draft import Draft
from rollout.embedded.uniforms import GOLDEN, mixed
from slime_spec.types import SamplingParams


def distribution_reference(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    eos_token_ids: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Return the distribution [vocab] of the token after ``generated``: each filter in turn, by full sorts."""
    p = (adjust_reference(logits, params, prompt, generated, eos_token_ids) / params.temperature).softmax(-1)
    if params.top_k > 0:
        p = torch.where(p >= p.sort(descending=True).values[min(params.top_k, len(p)) - 1], p, 0.0)
        p = p / p.sum()
    if params.top_p < 1.0:
        ranked = p.sort(descending=True).values
        mass, kept = 0.0, 0
        while mass < params.top_p and kept < len(p) and ranked[kept] > 0:
            mass += float(ranked[kept])
            kept += 1
        p = torch.where(p >= ranked[kept - 1], p, 0.0)
        p = p / p.sum()
    p = torch.where(p >= params.min_p * p.max(), p, 0.0)
    return p / p.sum()


def adjust_reference(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    eos_token_ids: frozenset[int],
) -> torch.Tensor:
    """Return logits [vocab] in fp64 after penalties, bias and the mask of min_new_tokens, token by token."""
    logits = logits.double().clone()
    for token_id in range(len(logits)):
        count = list(generated).count(token_id)
        logits[token_id] -= params.frequency_penalty * count
        if count:
            logits[token_id] -= params.presence_penalty
        if count or token_id in prompt:
            positive = logits[token_id] > 0
            logits[token_id] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    if len(generated) < params.min_new_tokens:
        for token_id in eos_token_ids.union(params.stop_token_ids):
            logits[token_id] = -torch.inf
    return logits


def walk_reference(draft: Draft, p_target: torch.Tensor, emit: Sequence[float]) -> list[int]:
    """Return the target-only walk; one uniform a depth both accepts and draws, by intervals in vocabulary order."""
    emitted: list[int] = []
    node = -1
    while True:
        distribution, uniform = p_target[node + 1], emit[len(emitted)]
        children = _children(draft, node)
        accepted = None
        for child in children:
            start, end = interval(distribution, draft.token_ids[child])
            if start <= uniform < end:
                accepted = child
                break
        if accepted is None:
            siblings = [draft.token_ids[child] for child in children]
            return [*emitted, draw_outside(distribution, siblings, uniform)]
        emitted.append(draft.token_ids[accepted])
        node = accepted


def rejection_reference(
    drafted: Sequence[int],
    q_draft: torch.Tensor,
    p_target: torch.Tensor,
    accept: Sequence[float],
    emit: Sequence[float],
) -> list[int]:
    """Judge a chain by rejection sampling; a point mass is a one-hot row of ``q_draft``."""
    for i, token_id in enumerate(drafted):
        if not accept[i] * q_draft[i, token_id] < p_target[i, token_id]:
            return [*drafted[:i], draw(_residual(p_target[i], q_draft[i], 1.0), emit[i])]
    return [*drafted, draw(p_target[len(drafted)], emit[len(drafted)])]


def block_reference(
    drafted: Sequence[int],
    q_draft: torch.Tensor,
    p_target: torch.Tensor,
    accept: Sequence[float],
    emit: Sequence[float],
) -> list[int]:
    """Judge a chain as a block (arXiv 2403.10444), prefixes in growing order; a point mass is a one-hot row."""
    gamma, standing, scale, ratio = len(drafted), 0, 1.0, 1.0
    for i in range(1, gamma + 1):
        token_id = drafted[i - 1]
        ratio = min(ratio * float(p_target[i - 1, token_id] / q_draft[i - 1, token_id]), 1.0)
        passes = ratio
        if i < gamma:
            left = float((ratio * p_target[i] - q_draft[i]).clamp(min=0).sum())
            passes = left / (left + 1 - ratio) if left + 1 - ratio > 0 else 1.0
        if accept[i - 1] < passes:
            standing, scale = i, ratio
    if standing == gamma:
        return [*drafted, draw(p_target[gamma], emit[gamma])]
    residual = _residual(p_target[standing], q_draft[standing], scale)
    return [*drafted[:standing], draw(residual, emit[standing])]


def threshold_reference(
    draft: Draft,
    p_target: torch.Tensor,
    accept: Sequence[float],
    emit: Sequence[float],
    single: float = 1.0,
    acc: float = 1.0,
) -> list[int]:
    """Judge as SGLang's kernel: siblings stack from zero. Exact at 1 and 1 for distinct siblings, biased otherwise."""
    emitted: list[int] = []
    node = -1
    while True:
        distribution, stacked, accepted = p_target[node + 1], 0.0, None
        for child in _children(draft, node):
            p = float(distribution[draft.token_ids[child]])
            stacked += p
            if p > 0 and (accept[len(emitted)] < stacked / acc or p >= single):
                accepted = child
                break
        if accepted is None:
            left = distribution.clone()
            left[[draft.token_ids[child] for child in _children(draft, node)]] = 0.0
            return [*emitted, draw(left if left.any() else distribution, emit[len(emitted)])]
        emitted.append(draft.token_ids[accepted])
        node = accepted


def race_reference(weights: Sequence[float], key: int, token_ids: Sequence[int] | None = None) -> int:
    """Return the index of the first arrival of a race: the smallest exponential over weight."""
    names = range(len(weights)) if token_ids is None else token_ids
    arrivals = [
        exponential_reference(key, name) / weight if weight > 0 else math.inf
        for name, weight in zip(names, weights, strict=True)
    ]
    return arrivals.index(min(arrivals))


def exponential_reference(key: int, token_id: int) -> float:
    """Return the exponential of a token id in the race of ``key``, by Python's integers."""
    top_bits = mixed(key + token_id * GOLDEN) >> 12
    return -math.log1p(-(2 * top_bits + 1) / 2**53)


def interval(distribution: torch.Tensor, token_id: int) -> tuple[float, float]:
    """Return the part of [0, 1) that belongs to a token: lengths are probabilities, in vocabulary order."""
    end = distribution.cumsum(dim=0)
    return (float(end[token_id - 1]) if token_id else 0.0), float(end[token_id])


def draw(weights: torch.Tensor, uniform: float) -> int:
    """Return the token whose interval of the normalised ``weights`` holds the uniform."""
    return draw_outside(weights / weights.sum(), (), uniform)


def draw_outside(distribution: torch.Tensor, removed: Sequence[int], uniform: float) -> int:
    """Return the token outside ``removed`` whose interval holds the uniform, which lies in none of the removed."""
    for token_id in range(distribution.shape[0]):
        start, end = interval(distribution, token_id)
        if token_id not in removed and start <= uniform < end:
            return token_id
    positive = [i for i in range(distribution.shape[0]) if distribution[i] > 0 and i not in removed]
    return positive[-1]  # the uniform lies in the rounding error above the last interval


def _residual(p: torch.Tensor, q: torch.Tensor, scale: float) -> torch.Tensor:
    left = (scale * p - q).clamp(min=0)
    return left if left.any() else p


def _children(draft: Draft, node: int) -> list[int]:
    return [index for index, parent in enumerate(draft.parents) if parent == node]
