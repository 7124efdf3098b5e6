"""SGLang's acceptance thresholds accept more than the target would when they are below 1: the output is lossy.

At a node, siblings are tried in order with one uniform u; P adds up their probabilities. Sibling x with p(x) > 0 is
accepted when u < P / threshold_acc or p(x) >= threshold_single. When none is, the token comes from p without the
siblings, drawn with a uniform of its own. Only ``speculative.lossy`` leads here, and every sample is marked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rollout.embedded.draft import Draft
from rollout.embedded.transfer import uploaded
from rollout.embedded.verification.distributions import kept_mass, sampling_distribution
from rollout.embedded.verification.draw import inverse_cdf
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import Emission, Pass, Rule, Scratch, with_logprobs
from rollout.embedded.verification.walk import target_only
from slime_spec.types import is_greedy


@dataclass(frozen=True)
class Thresholds:
    """Holds SGLang's two thresholds, in (0, 1]; 1 and 1 are exact for distinct siblings."""

    single: float
    acc: float

    def accept(self, p_of_siblings: list[float], uniform: float) -> int | None:
        """Return which sibling is accepted, None if none is."""
        stacked = 0.0
        for index, p in enumerate(p_of_siblings):
            stacked += p
            if p > 0.0 and (uniform < stacked / self.acc or p >= self.single):
                return index
        return None

    def judge(self, verify_pass: Pass, scratch: Scratch) -> list[Verified]:
        """Judge rows that sample: walk each tree by thresholds, then draw the last token of all of them."""
        logits, rows, roots = verify_pass.logits, verify_pass.rows, verify_pass.roots
        weights = sampling_distribution(logits, verify_pass.params, scratch.take("distribution", len(logits), logits))
        p_of_token = iter(_p_of_drafts(verify_pass, weights))
        last_distribution = scratch.take("residual", len(rows), logits)
        paths, stops, uniforms = [], [], []
        for index, (row, root) in enumerate(zip(rows, roots, strict=True)):
            path, refused = self.walk(row, [next(p_of_token) for _ in row.draft.read().token_ids])
            paths.append(path)
            stops.append(root + 1 + path[-1] if path else root)
            uniforms.append(row.uniforms.emit[row.num_generated + len(path)])
            last_distribution[index].copy_(weights[stops[-1]])
            last_distribution[index, torch.tensor(refused, dtype=torch.long, device=logits.device)] = 0.0
        at, emit = uploaded(logits.device, np.array(stops, np.int64), np.array(uniforms, np.float64))
        # Where the siblings hold all the mass the refusal was rounding.
        left = last_distribution.any(dim=1, keepdim=True)
        last = inverse_cdf(torch.where(left, last_distribution, weights[at]), emit).tolist()
        emissions = [
            Emission([*(row.draft.read().token_ids[node] for node in path), token], path, root)
            for row, root, path, token in zip(rows, roots, paths, last, strict=True)
        ]
        return with_logprobs(emissions, weights, [node for emission in emissions for node in emission.nodes])

    def walk(self, row: VerifyRow, p_of_token: list[float]) -> tuple[tuple[int, ...], list[int]]:
        """Return the accepted nodes, and the tokens refused after the last of them."""
        uniforms = row.uniforms.accept_of_round(row.num_generated)
        path: list[int] = []
        while children := children_of(row.draft.read(), path[-1] if path else -1):
            uniform = uniforms[row.num_generated + len(path)]
            accepted = self.accept([p_of_token[child] for child in children], uniform)
            if accepted is None:
                return tuple(path), [row.draft.read().token_ids[child] for child in children]
            path.append(children[accepted])
        return tuple(path), []


def children_of(draft: Draft, node: int) -> list[int]:
    return [index for index, parent in enumerate(draft.parents) if parent == node]


def thresholded(thresholds: Thresholds) -> Callable[[VerifyRow], Rule]:
    judge = thresholds.judge  # one object, so that rows of a pass are judged together

    def rule_of(row: VerifyRow) -> Rule:
        exact = is_greedy(row.params.temperature) or not row.draft.num_tokens
        return target_only(row) if exact else judge

    return rule_of


def _p_of_drafts(verify_pass: Pass, weights: torch.Tensor) -> list[float]:
    """Return p_target of every drafted token after its parent, row by row."""
    parents = [
        root + 1 + parent
        for row, root in zip(verify_pass.rows, verify_pass.roots, strict=True)
        for parent in row.draft.read().parents
    ]
    tokens = [token for row in verify_pass.rows for token in row.draft.read().token_ids]
    at, device = torch.tensor(parents, device=weights.device), weights.device
    mass = kept_mass(weights, verify_pass.params)
    return (weights[at, torch.tensor(tokens, device=device)] / mass[at]).tolist()
