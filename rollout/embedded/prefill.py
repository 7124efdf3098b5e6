"""Prefill computes the KV of known tokens: a bounded number per step, several prompts in one pass, oldest first.

A step computes at most one chunk, so that a long prompt does not stall the sequences that run; within it a prompt gets
all it needs before the next one gets anything, so that prompts finish in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rollout.embedded.batch import Batch
from rollout.embedded.drafting import KvRow, Prefill
from rollout.embedded.plan import RowSpan
from rollout.embedded.request import Group, SampleState
from rollout.embedded.speculation import Speculation
from rollout.embedded.target import Target

# Tokens per step: fewer while others decode, whose next tokens wait for it; either bounds masks and activations.
CHUNK_TOKENS_ALONE = 1024
CHUNK_TOKENS_BESIDE_DECODING = 256
# Attention pads the rows of a pass to the longest.
MAX_PADDED_TOKENS = 4096
# How many times as many a GPU takes: fewer would leave it waiting for the next launch.
TIMES_ON_GPU = 4


@dataclass(frozen=True)
class Piece:
    """Holds tokens of a sequence, or of its group's shared prompt, for slots ``start ..`` of their KV row."""

    sequence: SampleState
    shared: bool
    row: int
    start: int
    token_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def owner(self) -> Group | SampleState:
        """Return whose KV the tokens are."""
        return self.sequence.group if self.shared else self.sequence

    @property
    def ends_prompt(self) -> bool:
        """Return whether what follows is a first token, so that logits are wanted."""
        group = self.sequence.group
        if self.shared:
            return self.end == group.num_prompt_tokens and group.num_started < len(group.request.seeds)
        return not self.sequence.logprobs and self.end == self.sequence.prefill_len

    def note_cached(self, version: int) -> None:
        """Note that the tokens lie in the KV, computed by weights ``version``."""
        self.owner.num_prefilled = self.end
        if self.start == 0:
            self.owner.kv_version = version


class Prefiller:
    """Computes the KV of the batch's sequences that do not run yet."""

    def __init__(self, batch: Batch, target: Target, speculation: Speculation) -> None:
        self._batch, self._target, self._speculation = batch, target, speculation
        self._times = TIMES_ON_GPU if target.device.type == "cuda" else 1

    def step(self, version: int) -> list[SampleState]:
        """Compute one chunk; the sequences that are ready now, already promoted. ``version`` is the weights'."""
        batch = self._batch
        pieces = list(self._next_pieces())
        # Shared prompts first: a resumed sequence may need its prompt in this very step.
        for shared in (True, False):
            of_a_store = [piece for piece in pieces if piece.shared == shared]
            for together in _passes(of_a_store, self._times * MAX_PADDED_TOKENS):
                self._run(together, version)
        ready = []
        while batch.num_running < len(batch.sequences) and batch.sequences[batch.num_running].prefilled:
            sequence = batch.promote()
            if sequence.group.shares_prompt:
                own = [sequence.kv_version] if sequence.num_prefilled else []
                sequence.kv_version = min([sequence.group.kv_version, *own])
            ready.append(sequence)
        return ready

    def _next_pieces(self) -> Iterator[Piece]:
        batch = self._batch
        budget = self._times * (CHUNK_TOKENS_BESIDE_DECODING if batch.num_running else CHUNK_TOKENS_ALONE)
        started = set()
        for row in range(batch.num_running, len(batch.sequences)):
            sequence = batch.sequences[row]
            group = sequence.group
            if not group.prefix_ready and group.key not in started:
                started.add(group.key)
                start = group.num_prefilled
                tokens = group.request.prompt_token_ids[start : start + budget]
                yield Piece(sequence, True, group.prefix_row, start, tokens)
                budget -= len(tokens)
            first = group.prefix_tokens + sequence.num_prefilled
            tokens = tuple(sequence.token_ids[first : min(first + budget, group.prefix_tokens + sequence.prefill_len)])
            if tokens and budget:
                yield Piece(sequence, False, row, sequence.num_prefilled, tokens)
                budget -= len(tokens)
            if not budget:
                return

    def _run(self, pieces: Sequence[Piece], version: int) -> None:
        """Run one pass over pieces of prompts in one store."""
        spans: list[RowSpan] = []
        tokens: list[int] = []
        ending: list[tuple[Group, int]] = []
        for piece in pieces:
            group = piece.sequence.group
            prefix = (-1, 0) if piece.shared else (group.prefix_row, group.prefix_tokens)
            spans.append(RowSpan(piece.row, piece.start, len(piece.token_ids), *prefix))
            tokens += piece.token_ids
            if piece.ends_prompt:
                ending.append((group, len(tokens) - 1))
        store = self._target.cache.prefixes if pieces[0].shared else self._target.cache.own
        output = self._target.run(store, spans, tokens)
        for piece in pieces:
            piece.note_cached(version)
        self._show(pieces, self._target.features(output))
        if ending:
            logits = self._target.logits(output.hidden[self._target.tensor([last for _, last in ending])])
            for (group, _), row_logits in zip(ending, logits.split(1), strict=True):
                group.first_logits, group.prompt_version = row_logits, version

    def _show(self, pieces: Sequence[Piece], features: torch.Tensor | None) -> None:
        """Show the drafter what a pass has put into the KV."""
        sizes = [len(piece.token_ids) for piece in pieces]
        of_pieces = [None] * len(pieces) if features is None else features.split(sizes)
        self._speculation.prefill(
            [
                self._prefill(piece, of_piece)
                for piece, of_piece in zip(pieces, of_pieces, strict=True)
                if self._speculation.applies_to(piece.sequence.group)
            ]
        )

    def _prefill(self, piece: Piece, features: torch.Tensor | None) -> Prefill:
        group = piece.sequence.group
        return Prefill(
            key=piece.owner.key,
            shared=piece.shared,
            kv_row=KvRow(-1, group.prefix_row, group.prefix_tokens) if piece.shared else self._batch.kv_row(piece.row),
            start=piece.start if piece.shared else group.prefix_tokens + piece.start,
            token_ids=piece.token_ids,
            features=features,
            prompt_key=group.key,
        )


def _passes(pieces: Sequence[Piece], most_tokens: int) -> Iterator[list[Piece]]:
    """Yield the pieces of one store, in as few passes as bearable padding allows."""
    together: list[Piece] = []
    for piece in pieces:
        longest = max(len(each.token_ids) for each in (piece, *together))
        if together and (len(together) + 1) * longest > most_tokens:
            yield together
            together = []
        together.append(piece)
    if together:
        yield together
