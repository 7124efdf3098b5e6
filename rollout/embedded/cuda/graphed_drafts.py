"""A draft model's chains or trees of a whole batch are one captured graph here: one launch, and no read.

                    DraftsOnDevice ─────► verify pass, verifier
first pass ─ draw ─ step ─ draw ─ …       (grow_levels, or grow_pool and best_nodes, over passes of fixed shapes)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rollout.embedded.cuda.device_pass import WORD_BITS, Bucket, Column, DevicePass, KvTable, Places, upload
from rollout.embedded.cuda.graphed_target import bucket_of
from rollout.embedded.cuda.graphs import Graphs
from rollout.embedded.drafters.chain import (
    chain_distribution,
    chain_sampler,
    chain_steps,
    chains,
    draw_greedy,
    draw_sampled,
    grow_levels,
)
from rollout.embedded.drafters.step import DrafterSetup, DraftVocab, Heads
from rollout.embedded.drafters.tree import TreeLimits, best_nodes, grow_pool, tree_steps, trees
from rollout.embedded.drafting import DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.unread import Branches, DraftsOnDevice, UnreadDraft


class ModelOnDevice(Protocol):
    """Computes a draft model's passes on the device alone."""

    def first(self, one_pass: DevicePass, features: torch.Tensor | None) -> torch.Tensor:
        """Return the states [tokens, hidden] of committed tokens and the target's features before them."""

    def step(self, token_ids: torch.Tensor, hidden: torch.Tensor, one_pass: DevicePass) -> torch.Tensor:
        """Return the states [tokens, hidden] of drafted tokens after the states ``hidden``."""

    def heads(self, states: torch.Tensor) -> Heads: ...


@dataclass(frozen=True)
class GrowthShape:
    """Names the shape of a graph: its first pass, its steps, whether rows sample; a tree's leaves a level and nodes."""

    bucket: Bucket
    num_steps: int
    samples: bool
    width: int = 1
    num_nodes: int = 0

    def level(self, number: int) -> Bucket:
        """Return the shape of the pass over a level, from 1; a tree's tokens see nodes of it and of those above."""
        words = -(-number * self.width // WORD_BITS) if self.width > 1 else 0
        return Bucket(self.bucket.rows, self.width, words)


@dataclass(frozen=True)
class DraftWork:
    """Holds the host's part of a batch: what each row extends by, and where its first drafted token's keys go.

    ``features`` are the target's before the tokens, None for a model that reads none.
    """

    spans: Sequence[RowSpan]
    token_ids: Sequence[int]
    features: torch.Tensor | None
    next_slots: Sequence[RowSpan]


class DraftBuffers:
    """Holds what a graph of one shape reads."""

    def __init__(
        self, growth: GrowthShape, table: KvTable, device: torch.device, features: torch.Tensor | None
    ) -> None:
        bucket = growth.bucket
        self.first = DevicePass(bucket, table, device)
        self.levels = [DevicePass(growth.level(number), table, device) for number in range(1, growth.num_steps)]
        self.features = None if features is None else features.new_zeros(bucket.tokens, features.shape[1])
        self.ends = torch.arange(bucket.rows, device=device) * bucket.queries - 1
        self.temperatures = torch.zeros(bucket.rows, dtype=torch.float64, device=device)
        self.uniforms = torch.zeros(bucket.rows, growth.num_steps, dtype=torch.float64, device=device)
        self.limits = torch.ones(2, bucket.rows, dtype=torch.int64, device=device)  # nodes and depths of trees
        self._device = device

    def fill(self, growth: GrowthShape, work: DraftWork) -> None:
        self.first.fill(work.spans, work.token_ids)
        if self.features is not None and work.features is not None:
            Places(growth.bucket, work.spans, self._device).pad(work.features, self.features)
        width = growth.width
        no_tokens = [0] * (width * len(work.spans))
        for index, one_pass in enumerate(self.levels):
            slots = [
                RowSpan(each.row, each.start + index * width, width, each.prefix_row, each.prefix_len)
                for each in work.next_slots
            ]
            one_pass.fill(slots, no_tokens)

    def draw_with(self, temperatures: npt.NDArray[np.float64], uniforms: npt.NDArray[np.float64]) -> None:
        """Set what rows draw with: temperatures [rows], 0 for the argmax, and uniforms [rows, steps]."""
        upload(torch.from_numpy(temperatures), self.temperatures[: len(temperatures)])
        upload(torch.from_numpy(uniforms), self.uniforms[: len(uniforms)])

    def limit(self, limits: TreeLimits) -> None:
        upload(torch.from_numpy(np.stack([limits.nodes, limits.depths])), self.limits[:, : len(limits.nodes)])

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Return the state of every row's last token."""
        return states.index_select(0, (self.ends + self.first.rows[:, Column.COUNT]).clamp_(min=0))


class GraphedDrafts:
    """Grows the drafts of a model, chains or trees as ``setup`` says."""

    def __init__(self, table: KvTable, graphs: Graphs, setup: DrafterSetup) -> None:
        self._table, self._graphs, self._setup = table, graphs, setup
        self._buffers: dict[GrowthShape, DraftBuffers] = {}

    def grow(
        self,
        model: Callable[[], ModelOnDevice],
        vocab: DraftVocab,
        owners: tuple[object, ...],
        work: DraftWork,
        contexts: Sequence[DraftContext],
    ) -> list[UnreadDraft] | None:
        """Return a draft per context; None, and nothing done, for a batch outside the buckets.

        ``owners`` are what the graph of ``model`` is captured over.
        """
        bucket = bucket_of(work.spans)
        if bucket is None:
            return None
        if self._setup.shape.topk > 1:
            return self._trees(bucket, model, vocab, owners, work, contexts)
        return self._chains(bucket, model, vocab, owners, work, contexts)

    def _chains(
        self,
        bucket: Bucket,
        model: Callable[[], ModelOnDevice],
        vocab: DraftVocab,
        owners: tuple[object, ...],
        work: DraftWork,
        contexts: Sequence[DraftContext],
    ) -> list[UnreadDraft]:
        num_steps = chain_steps(contexts, self._setup.shape.num_steps)
        sampler = chain_sampler(contexts, num_steps, self._setup.drawing)
        growth = GrowthShape(bucket, num_steps, sampler is not None)
        buffers = self._filled(growth, work)
        if sampler is not None:
            buffers.draw_with(sampler.temperatures, sampler.uniforms)
        levels, distributions = self._graphs.run(
            ("chains", growth), owners, lambda: _chains(model(), vocab, growth, buffers)
        )
        rows = len(contexts)
        if sampler is not None:
            sampler.distributions += [each[:rows] for each in distributions]
        return chains(levels[:rows].clone(), contexts, sampler, vocab)

    def _trees(
        self,
        bucket: Bucket,
        model: Callable[[], ModelOnDevice],
        vocab: DraftVocab,
        owners: tuple[object, ...],
        work: DraftWork,
        contexts: Sequence[DraftContext],
    ) -> list[UnreadDraft]:
        shape, limits = self._setup.shape, TreeLimits.of(contexts, self._setup.shape.num_draft_tokens - 1)
        growth = GrowthShape(
            bucket, tree_steps(contexts, shape.num_steps), False, shape.topk, shape.num_draft_tokens - 1
        )
        buffers = self._filled(growth, work)
        buffers.limit(limits)
        tokens, *branches = self._graphs.run(("trees", growth), owners, lambda: _trees(model(), vocab, growth, buffers))
        rows = len(contexts)
        drafts = DraftsOnDevice(tokens[:rows].clone(), Branches(*(each[:rows].clone() for each in branches)))
        return trees(drafts, limits, growth.width)

    def _filled(self, growth: GrowthShape, work: DraftWork) -> DraftBuffers:
        buffers = self._buffers.get(growth)
        if buffers is None:
            device = self._setup.device
            buffers = self._buffers[growth] = DraftBuffers(growth, self._table, device, work.features)
        buffers.fill(growth, work)
        return buffers


def _chains(
    model: ModelOnDevice, vocab: DraftVocab, growth: GrowthShape, buffers: DraftBuffers
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run chains on the device alone; return the levels of ``grow_levels`` and every step's distribution.

    The distributions are [rows, draft vocab], of rows that sample.
    """
    distributions: list[torch.Tensor] = []

    def step(token_ids: torch.Tensor, hidden: torch.Tensor, index: int) -> Heads:
        return model.heads(model.step(token_ids, hidden, buffers.levels[index]))

    def draw(logits: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        q_draft = chain_distribution(logits, buffers.temperatures)
        distributions.append(q_draft)
        return draw_sampled(logits, q_draft, buffers.temperatures, buffers.uniforms[:, index])

    first = model.heads(buffers.last(model.first(buffers.first, buffers.features)))
    levels = grow_levels(first, step, growth.num_steps, draw if growth.samples else draw_greedy, vocab)
    return levels, distributions


def _trees(
    model: ModelOnDevice, vocab: DraftVocab, growth: GrowthShape, buffers: DraftBuffers
) -> tuple[torch.Tensor, ...]:
    """Run trees on the device alone; return the tensors of ``best_nodes``."""
    rows, width = growth.bucket.rows, growth.width
    own = torch.eye(width, dtype=torch.bool, device=buffers.ends.device).expand(rows, -1, -1)
    sees = own[:, :, :0]  # [rows, leaves, nodes]: which nodes the last level's leaves see

    def step(token_ids: torch.Tensor, hidden: torch.Tensor, level: int, parents: torch.Tensor | None) -> Heads:
        nonlocal sees
        if parents is not None:
            sees = sees.gather(1, parents.unsqueeze(2).expand(-1, -1, sees.shape[2]))
        sees = torch.cat([sees, own], dim=2)
        one_pass = buffers.levels[level - 1]
        tree_starts = one_pass.rows[:, Column.START] - (level - 1) * width
        depths = torch.full((rows, width), level - 1, dtype=torch.int64, device=own.device)
        one_pass.place_trees(slice(rows), tree_starts, depths, sees)
        return model.heads(model.step(token_ids, hidden, one_pass))

    first = model.heads(buffers.last(model.first(buffers.first, buffers.features)))
    pool = grow_pool(first, step, growth.num_steps, width, vocab)
    drafts = best_nodes(pool, buffers.limits[0], buffers.limits[1], growth.num_nodes)
    assert drafts.branches is not None, "trees have branches"
    return drafts.tokens, drafts.branches.parents, drafts.branches.depths, drafts.branches.nonfinite
