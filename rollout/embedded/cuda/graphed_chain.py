"""A draft network's whole chain, first pass and every step, is one captured graph here: one launch, one read.

Of the sampling rows every step's distribution is kept, in memory that the next chain writes anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rollout.embedded.cuda.device_pass import Bucket, Column, DevicePass, KvTable, Places, upload
from rollout.embedded.cuda.graphed_target import bucket_of
from rollout.embedded.cuda.graphs import Graphs
from rollout.embedded.drafters.chain import chain_distribution, draw_greedy, draw_sampled, grow_levels
from rollout.embedded.drafters.network import DraftNetwork
from rollout.embedded.drafters.step import DraftVocab, Heads
from rollout.embedded.linear import PackedLinear
from rollout.embedded.plan import RowSpan

Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ChainShape:
    """Names the shape of a chain's graph: its first pass, its number of steps, and whether its rows sample."""

    bucket: Bucket
    num_steps: int
    samples: bool


@dataclass(frozen=True)
class Sampling:
    """Holds what the rows of a batch draw with: temperatures [rows], 0 for the argmax, and uniforms [rows, steps]."""

    temperatures: npt.NDArray[np.float64]
    uniforms: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChainWork:
    """Holds the host's part of a chain: what each row extends by, and where its first drafted token's keys go."""

    spans: Sequence[RowSpan]
    token_ids: Sequence[int]
    features: torch.Tensor
    next_slots: Sequence[RowSpan]
    num_steps: int
    sampling: Sampling | None


class ChainBuffers:
    """Holds what a graph of one shape reads."""

    def __init__(self, shape: ChainShape, table: KvTable, features: torch.Tensor) -> None:
        bucket, device = shape.bucket, features.device
        self.first = DevicePass(bucket, table, device)
        self.steps = [DevicePass(Bucket(bucket.rows, 1), table, device) for _ in range(shape.num_steps - 1)]
        self.features = features.new_zeros(bucket.tokens, features.shape[1])
        self.ends = torch.arange(bucket.rows, device=device) * bucket.queries - 1
        self.temperatures = torch.zeros(bucket.rows, dtype=torch.float64, device=device)
        self.uniforms = torch.zeros(bucket.rows, shape.num_steps, dtype=torch.float64, device=device)

    def fill(self, shape: ChainShape, work: ChainWork) -> None:
        self.first.fill(work.spans, work.token_ids)
        Places(shape.bucket, work.spans, self.features.device).pad(work.features, self.features)
        for index, one_pass in enumerate(self.steps):
            slots = [
                RowSpan(each.row, each.start + index, 1, each.prefix_row, each.prefix_len) for each in work.next_slots
            ]
            one_pass.fill(slots, [0] * len(slots))
        if work.sampling is not None:
            upload(torch.from_numpy(work.sampling.temperatures), self.temperatures[: len(work.spans)])
            upload(torch.from_numpy(work.sampling.uniforms), self.uniforms[: len(work.spans)])

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Return the state of every row's last token."""
        return states.index_select(0, (self.ends + self.first.rows[:, Column.COUNT]).clamp_(min=0))


class GraphedChain:
    """Grows the chains of a network's drafts."""

    def __init__(self, table: KvTable, graphs: Graphs) -> None:
        self._table, self._graphs = table, graphs
        self._buffers: dict[ChainShape, ChainBuffers] = {}

    def grow(
        self,
        network: DraftNetwork,
        embed: Embed,
        head: Callable[[], PackedLinear | None],
        vocab: DraftVocab,
        owners: tuple[object, ...],
        work: ChainWork,
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Return the levels of ``grow_levels``, and every step's distribution [rows, draft vocab] where rows sample.

        ``owners`` are what the graph is captured over. None, and nothing done, for a batch outside the buckets.
        """
        bucket = bucket_of(work.spans)
        if bucket is None or work.num_steps < 1:
            return None
        shape = ChainShape(bucket, work.num_steps, work.sampling is not None)
        buffers = self._buffers.get(shape)
        if buffers is None:
            buffers = self._buffers[shape] = ChainBuffers(shape, self._table, work.features)
        buffers.fill(shape, work)
        levels, distributions = self._graphs.run(
            ("chain", shape), owners, lambda: _chain(network, embed, head(), vocab, shape, buffers)
        )
        rows = len(work.spans)
        return levels[:rows], [each[:rows] for each in distributions]


def _chain(
    network: DraftNetwork,
    embed: Embed,
    head: PackedLinear | None,
    vocab: DraftVocab,
    shape: ChainShape,
    buffers: ChainBuffers,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a chain on the device alone."""
    distributions: list[torch.Tensor] = []

    def step(token_ids: torch.Tensor, hidden: torch.Tensor, index: int) -> Heads:
        return network.heads(network.forward(embed(token_ids), hidden, buffers.steps[index]), head)

    def draw(logits: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        q_draft = chain_distribution(logits, buffers.temperatures)
        distributions.append(q_draft)
        return draw_sampled(logits, q_draft, buffers.temperatures, buffers.uniforms[:, index])

    residual = network.forward(embed(buffers.first.tokens), network.project(buffers.features), buffers.first)
    first = network.heads(buffers.last(residual), head)
    levels = grow_levels(first, step, shape.num_steps, draw if shape.samples else draw_greedy, vocab)
    return levels, distributions
