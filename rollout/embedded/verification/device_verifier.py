"""On a device a pass is judged in batched operations over all its rows, and its results are read in one transfer.

                                             target-only rows   draw a token at every node ─────────┐
    logits ─ adjust ─ distribution of all ──┤                                                       ├─ one read
                                             sampled chains     accept, residual, last token ───────┘

The rules are those of RuleVerifier, which serves the CPU, where reading a number costs nothing and a row's work is best
done while the row is in the caches; both give the same tokens for the same uniforms, and ``verification.reference``
says what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rollout.embedded.transfer import Array, downloaded, uploaded
from rollout.embedded.unread import Branches, DraftsOnDevice, UnreadDraft
from rollout.embedded.verification.device_chains import Acceptance, ChainArrays, SampledChains
from rollout.embedded.verification.device_filters import FilterArrays, filter_weights
from rollout.embedded.verification.draw import argmax, inverse_cdf
from rollout.embedded.verification.penalties import adjusted
from rollout.embedded.verification.rejection import was_sampled
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import Emission, Pass, chunks
from rollout.embedded.verification.walk import follow_tree
from slime_spec.types import is_greedy

# Rows of logits judged at once: 0.6 GB a buffer with a vocabulary of 150,000.
NODES_PER_CHUNK = 1024


@dataclass(frozen=True)
class Judged:
    """Holds on the device what some rows emit; ``read`` turns the tensors, as arrays, into the rows' results."""

    which: Sequence[int]  # the rows' places in the pass
    tensors: Sequence[torch.Tensor]
    read: Callable[..., list[Verified]]


class DeviceVerifier:
    """Judges every row by the target-only walk, or by ``acceptance`` where it is given and the draft was sampled."""

    lossy = False
    takes_unread = True

    def __init__(self, acceptance: Acceptance | None = None, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self._acceptance, self._eos_token_ids = acceptance, eos_token_ids

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        judged: list[Judged] = []
        first_row = first_node = 0
        for chunk in chunks(rows, NODES_PER_CHUNK):
            count = sum(row.num_nodes for row in chunk)
            piece = adjusted(logits[first_node : first_node + count], chunk, self._eos_token_ids)
            judged += self._judge(Pass(piece, chunk), first_row)
            first_row, first_node = first_row + len(chunk), first_node + count
        drafts = unread_drafts(rows)
        of_drafts = [tensor for each in drafts for tensor in each.tensors]
        arrays = iter(downloaded(*of_drafts, *(tensor for each in judged for tensor in each.tensors)))
        for unread in drafts:
            unread.take([next(arrays) for _ in unread.tensors])
        verified: dict[int, Verified] = {}
        for each in judged:
            results = each.read(*(next(arrays) for _ in each.tensors))
            verified.update(zip(each.which, results, strict=True))
        return [verified[index] for index in range(len(rows))]

    def _judge(self, verify_pass: Pass, first_row: int) -> list[Judged]:
        """Return what the rows emit, without waiting for the device."""
        rows, params, logits = verify_pass.rows, verify_pass.params, verify_pass.logits
        sampled = [index for index, row in enumerate(rows) if self._acceptance is not None and was_sampled(row)]
        walked = sorted({*range(len(rows))} - {*sampled})
        walk, chains, filters = WalkArrays(verify_pass, walked), ChainArrays(verify_pass, sampled), FilterArrays(params)
        temperatures = np.array([1.0 if is_greedy(each.temperature) else each.temperature for each in params])
        parts = (temperatures,), walk.arrays, filters.arrays, chains.arrays
        tensors = iter(uploaded(logits.device, *(array for part in parts for array in part)))
        column, on_walk, on_filters, on_chains = ([next(tensors) for _ in part] for part in parts)
        weights = torch.empty_like(logits)
        hot = (
            torch.div(logits, column[0].to(logits.dtype).unsqueeze(1), out=weights)
            if (temperatures != 1).any()
            else logits
        )
        torch.softmax(hot, dim=-1, out=weights)
        mass = filter_weights(weights, filters, on_filters)
        judged: list[Judged] = []
        if walked:
            drawn = walk.draw(logits, weights, *on_walk)
            judged.append(Judged([first_row + index for index in walked], drawn, walk.read))
        if sampled:
            assert self._acceptance is not None, "without an acceptance every row is walked"
            emitted = SampledChains(chains, weights, mass, on_chains).judge(self._acceptance)
            judged.append(Judged([first_row + index for index in sampled], emitted, chains.read))
        return judged


def unread_drafts(rows: Sequence[VerifyRow]) -> list[DraftsOnDevice]:
    """Return the drafts of a pass that nobody has read yet."""
    found = {id(row.draft.of): row.draft.of for row in rows if isinstance(row.draft, UnreadDraft)}
    return [each for each in found.values() if not each.is_read]


class WalkArrays:
    """Holds what the walk of some rows of a pass needs on the device: a token is drawn at every one of their nodes.

    A node's uniform is that of its depth. Of a tree that is not read the device knows the depths: its uniforms go up
    by depth, and every node takes that of its own.
    """

    def __init__(self, verify_pass: Pass, which: Sequence[int]) -> None:
        self._rows = [verify_pass.rows[index] for index in which]
        roots = verify_pass.roots
        nodes = [node for i in which for node in range(roots[i], roots[i] + verify_pass.rows[i].num_nodes)]
        greedy = [is_greedy(row.params.temperature) for row in self._rows for _ in range(row.num_nodes)]
        uniforms = [uniform for row in self._rows for uniform in emit_uniforms(row)]
        self._is_all, self._any_greedy, self._all_greedy = (
            len(nodes) == len(verify_pass.logits),
            any(greedy),
            all(greedy),
        )
        self._unread = unread_trees(self._rows)
        places = [] if self._unread is None else node_places(self._rows, self._unread)
        self.arrays = (
            np.array(nodes, np.int64),
            np.array(greedy, np.int64),
            np.array(uniforms, np.float64),
            np.array(places, np.int64).reshape(-1, 2),
        )

    def draw(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        nodes: torch.Tensor,
        greedy: torch.Tensor,
        uniforms: torch.Tensor,
        places: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token drawn at every node and its logprob, each [nodes]."""
        if not self._is_all:
            logits, weights = logits.index_select(0, nodes), weights.index_select(0, nodes)
        if self._unread is not None:
            root, place = places.unbind(1)
            uniforms = uniforms.index_select(0, root + F.pad(self._unread.depths, (1, 0)).flatten()[place])
        drawn = argmax(logits) if self._all_greedy else inverse_cdf(weights, uniforms)
        if self._any_greedy and not self._all_greedy:
            drawn = torch.where(greedy > 0, argmax(logits), drawn)
        return drawn, weights.gather(1, drawn.unsqueeze(1)).squeeze(1).log()

    def read(self, drawn: Array, logprobs: Array) -> list[Verified]:
        verified: list[Verified] = []
        tokens, of_tokens, root = drawn.tolist(), logprobs.tolist(), 0
        for row in self._rows:
            emission = Emission(*follow_tree(tokens[root : root + row.num_nodes], row.draft.read()), root)
            verified.append(emission.verified(of_tokens[node] for node in emission.nodes))
            root += row.num_nodes
        return verified


def emit_uniforms(row: VerifyRow) -> Sequence[float]:
    """Return the uniforms of a row's nodes; those of depths 0, 1, .. where the depths are not known."""
    start, emit = row.num_generated, row.uniforms.emit
    if row.draft.is_chain:
        return emit[start : start + row.num_nodes]
    if isinstance(row.draft, UnreadDraft):
        by_depth = list(emit[start : start + row.num_nodes])
        return by_depth + [0.0] * (row.num_nodes - len(by_depth))  # no node is deeper than the tokens left
    return [emit[start + depth] for depth in row.depths()]


def unread_trees(rows: Sequence[VerifyRow]) -> Branches | None:
    """Return the shapes of the trees of some rows, where they lie on the device."""
    of_rows = (row.draft.of.branches for row in rows if isinstance(row.draft, UnreadDraft))
    return next((branches for branches in of_rows if branches is not None), None)


def node_places(rows: Sequence[VerifyRow], branches: Branches) -> list[tuple[int, int]]:
    """Return for every node of rows the number of its root, and its place in [tree, 1 + nodes] of ``branches``."""
    width = 1 + branches.depths.shape[1]
    places: list[tuple[int, int]] = []
    for row in rows:
        root, tree = len(places), row.draft.row * width if isinstance(row.draft, UnreadDraft) else 0
        places += [(root, tree + node) for node in range(row.num_nodes)]
    return places
