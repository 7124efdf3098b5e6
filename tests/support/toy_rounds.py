"""Many sequences of a Markov target, generated round by round through a verifier: an engine without a model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.uniforms import Noise, Uniforms
from rollout.embedded.verification import make_verifier
from rollout.embedded.verification.reference import race_reference
from rollout.embedded.verification.verifier import Verified, Verifier, VerifyRow
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import SamplingParams

# (last token, most drafted tokens on a path, the round's uniforms for them) -> draft
Drafting = Callable[[int, int, Sequence[float]], Draft]
DEVICE = torch.device("cpu")  # where logits and distributions are; ``pytest --device`` sets it


@dataclass(frozen=True)
class RacedChains:
    """Chains drawn from ``q_draft[a]`` after a by the slow race, with the noise of the target's own races."""

    q_draft: torch.Tensor
    gamma: int

    def __call__(self, root: int, limit: int, noise: Noise, num_generated: int) -> Draft:
        chain, weights = [root], self.q_draft.tolist()
        for t in range(num_generated, num_generated + min(self.gamma, limit)):
            chain.append(race_reference(weights[chain[-1]], noise.key(t)))
        return Draft.chain(chain[1:])


def no_draft(root: int, limit: int, uniforms: Sequence[float]) -> Draft:
    return NO_DRAFT


@dataclass(frozen=True)
class Judge:
    """The rule of a configuration, on whichever device the logits are."""

    config: SpeculativeConfig

    @property
    def lossy(self) -> bool:
        return self.config.lossy

    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        return _made(self.config, logits.device)(logits, rows)


@cache
def _made(config: SpeculativeConfig, device: torch.device) -> Verifier:
    return make_verifier(config, frozenset(), device)


@dataclass
class ToyRun:
    """Responses, and for every round that drafted: (root, first draft, whether it stood)."""

    responses: list[tuple[int, ...]]
    first_drafts: list[tuple[int, int, bool]] = field(default_factory=list)
    num_accepted: int = 0


def generate(
    verifier: Verifier,
    table: torch.Tensor,
    seeds: Sequence[int],
    num_tokens: int,
    params: SamplingParams,
    drafting: Drafting | RacedChains = no_draft,
    prompt: tuple[int, ...] = (0,),
) -> ToyRun:
    """``num_tokens`` for every seed; the first comes without a draft, as after a prefill."""
    sequences = [list(prompt) for _ in seeds]
    uniforms = [Uniforms(seed, num_tokens) for seed in seeds]
    run = ToyRun([])
    table = table.to(DEVICE)
    running = list(range(len(seeds)))
    while running:
        rows = []
        for index in running:
            tokens, generated = sequences[index], len(sequences[index]) - len(prompt)
            limit = num_tokens - generated - 1
            draft = drafted(drafting, tokens[-1], limit, uniforms[index], generated) if generated else NO_DRAFT
            if draft.q_draft is not None:
                draft = replace(draft, q_draft=draft.q_draft.to(DEVICE))
            rows.append(VerifyRow(draft, params, uniforms[index], tokens, len(prompt)))
        last_tokens = [token for row in rows for token in (row.token_ids[-1], *row.draft.token_ids)]
        nodes = torch.tensor(last_tokens, device=DEVICE)
        for index, row, verified in zip(running, rows, verifier(table[nodes], rows), strict=True):
            if row.draft.token_ids:
                first = row.draft.token_ids[0]
                run.first_drafts.append((row.token_ids[-1], first, verified.token_ids[0] == first))
                run.num_accepted += len(verified.path)
            sequences[index] += verified.token_ids
        running = [index for index in running if len(sequences[index]) < len(prompt) + num_tokens]
    run.responses = [tuple(each[len(prompt) :]) for each in sequences]
    return run


def drafted(drafting: Drafting | RacedChains, root: int, limit: int, uniforms: Uniforms, num_generated: int) -> Draft:
    if not limit:
        return NO_DRAFT
    if isinstance(drafting, RacedChains):
        return drafting(root, limit, uniforms.noise, num_generated)
    return drafting(root, limit, uniforms.draft_of_round(num_generated)[num_generated:])


def chains(next_token: Sequence[int], gamma: int) -> Drafting:
    """Chosen chains: ``next_token[a]`` is drafted after a."""

    @cache
    def chain_of(root: int, length: int) -> Draft:
        chain = [root]
        for _ in range(length):
            chain.append(next_token[chain[-1]])
        return Draft.chain(chain[1:])

    return lambda root, limit, uniforms: chain_of(root, min(gamma, limit))


def trees(ranked: Sequence[Sequence[int]], parents: Sequence[int], ranks: Sequence[int]) -> Drafting:
    """Chosen trees of one shape: node i is the ``ranks[i]``-th choice after its parent; too deep nodes are left out."""

    @cache
    def tree_of(root: int, limit: int) -> Draft:
        tokens: list[int] = []
        depths: list[int] = []
        for parent, rank in zip(parents, ranks, strict=True):
            depth = depths[parent] + 1 if parent >= 0 else 1
            if depth > limit:
                break
            tokens.append(ranked[tokens[parent] if parent >= 0 else root][rank])
            depths.append(depth)
        return Draft(tuple(tokens), tuple(parents[: len(tokens)]))

    return lambda root, limit, uniforms: tree_of(root, limit)


def sampled_chains(q_draft: torch.Tensor, gamma: int) -> Drafting:
    """Chains sampled from ``q_draft[a]`` after a, with the round's uniforms."""
    cumulative = (q_draft.double().cumsum(-1) / q_draft.double().sum(-1, keepdim=True)).tolist()

    def draft(root: int, limit: int, uniforms: Sequence[float]) -> Draft:
        chain = [root]
        for uniform in uniforms[: min(gamma, limit)]:
            chain.append(bisect_right(cumulative[chain[-1]], uniform))
        return Draft.chain(chain[1:], q_draft[chain[:-1]])

    return draft
