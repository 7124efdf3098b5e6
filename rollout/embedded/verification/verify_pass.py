"""A rule verifier groups the rows of a pass by rule, judges each group, and returns results in the rows' order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from rollout.embedded.verification.penalties import adjusted
from rollout.embedded.verification.verifier import Verified, VerifyRow
from slime_spec.types import SamplingParams

# Rows of logits judged at once: the memory a distribution needs stays bounded, and in the caches.
NODES_PER_CHUNK = 64


class Scratch:
    """Keeps memory for rows of the vocabulary's size between passes: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab], uninitialised, valid until ``name`` is taken again."""
        buffer, vocab = self._buffers.get(name), like.shape[1]
        fits = buffer is not None and (buffer.dtype, buffer.device) == (like.dtype, like.device)
        if buffer is None or not fits or buffer.shape[1] != vocab or buffer.shape[0] < rows:
            self._buffers[name] = buffer = torch.empty(rows, vocab, dtype=like.dtype, device=like.device)
        return buffer[:rows]


@dataclass(frozen=True)
class Pass:
    """Holds adjusted logits [nodes, vocab] of some rows, each row's root before its nodes."""

    logits: torch.Tensor
    rows: Sequence[VerifyRow]

    @cached_property
    def roots(self) -> list[int]:
        """Return the logits row of each sequence's root."""
        return [0, *accumulate(row.num_nodes for row in self.rows)][:-1]

    @cached_property
    def params(self) -> list[SamplingParams]:
        """Return the sampling parameters of every node."""
        return [row.params for row in self.rows for _ in range(row.num_nodes)]

    def only(self, which: Sequence[int]) -> Pass:
        """Return the pass of these sequences alone; copies logits unless that is all of them."""
        if len(which) == len(self.rows):
            return self
        roots = self.roots
        nodes = [node for each in which for node in range(roots[each], roots[each] + self.rows[each].num_nodes)]
        index = torch.tensor(nodes, device=self.logits.device)
        return Pass(self.logits.index_select(0, index), [self.rows[each] for each in which])


class Emission(NamedTuple):
    """Holds what a row emits: ``token_ids[0]`` comes from the root's logits, the next from ``path[0]``'s, and so on."""

    token_ids: list[int]
    path: tuple[int, ...]
    root: int

    @property
    def nodes(self) -> list[int]:
        """Return the logits row of every emitted token."""
        return [self.root, *(self.root + 1 + node for node in self.path)]

    def verified(self, logprobs: Iterator[float]) -> Verified:
        return Verified(self.token_ids, [next(logprobs) for _ in self.token_ids], self.path)


def with_logprobs(emissions: Sequence[Emission], weights: torch.Tensor, nodes: Sequence[int]) -> list[Verified]:
    """Return the tokens with logprobs: the k-th has the log of its weight in row ``nodes[k]`` of the distribution.

    A logprob is NaN exactly where the logits gave no distribution of positive finite mass (they hold NaN or infinity).
    """
    tokens = [token for emission in emissions for token in emission.token_ids]
    at = weights[torch.tensor(nodes, device=weights.device), torch.tensor(tokens, device=weights.device)]
    logprobs = iter(at.log().tolist())
    return [emission.verified(logprobs) for emission in emissions]


# Judges rows of one kind
Rule = Callable[[Pass, Scratch], list[Verified]]


class RuleVerifier:
    """Judges rows by rules: ``rule_of`` says which rule judges a row; rows of one rule are judged together."""

    takes_unread = False

    def __init__(
        self, rule_of: Callable[[VerifyRow], Rule], eos_token_ids: frozenset[int] = frozenset(), lossy: bool = False
    ) -> None:
        self._rule_of, self._eos_token_ids, self.lossy = rule_of, eos_token_ids, lossy
        self._scratch = Scratch()

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        verified: list[Verified] = []
        first = 0
        for chunk in chunks(rows, NODES_PER_CHUNK):
            count = sum(row.num_nodes for row in chunk)
            piece = adjusted(logits[first : first + count], chunk, self._eos_token_ids)
            verified += self._judge(Pass(piece, chunk))
            first += count
        return verified

    def _judge(self, verify_pass: Pass) -> list[Verified]:
        kinds: dict[Rule, list[int]] = {}
        for index, row in enumerate(verify_pass.rows):
            kinds.setdefault(self._rule_of(row), []).append(index)
        judged: dict[int, Verified] = {}
        for rule, which in kinds.items():
            judged.update(zip(which, rule(verify_pass.only(which), self._scratch), strict=True))
        return [judged[index] for index in range(len(verify_pass.rows))]


def chunks(rows: Sequence[VerifyRow], most_nodes: int) -> Iterator[list[VerifyRow]]:
    """Yield the rows in pieces of at most so many nodes, or of one row."""
    chunk: list[VerifyRow] = []
    num_nodes = 0
    for row in rows:
        if chunk and num_nodes + row.num_nodes > most_nodes:
            yield chunk
            chunk, num_nodes = [], 0
        chunk.append(row)
        num_nodes += row.num_nodes
    if chunk:
        yield chunk
