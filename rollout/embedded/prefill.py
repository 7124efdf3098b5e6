"""Prefill computes the KV of known tokens: a bounded number per step, several prompts in one pass, oldest first.

A step computes at most one chunk, so that a long prompt does not stall the sequences that run; within it a prompt gets
all it needs before the next one gets anything, so that prompts finish in order. What a prompt begins alike with is
copied where it was computed before (see prompt_cache), or waited for where it is computed in this very step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from rollout.embedded.batch import Batch
from rollout.embedded.drafting import KvRow, Prefill
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import RowSpan
from rollout.embedded.prompt_cache import PromptCache, num_common
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

    @property
    def text(self) -> tuple[int, ...] | None:
        """Return all tokens of the KV row, from the first on; None where another row holds what they follow."""
        if self.shared:
            return self.sequence.group.request.prompt_token_ids
        sequence = self.sequence
        return None if sequence.group.shares_prompt else tuple(sequence.token_ids[: sequence.prefill_len])

    def note_cached(self, version: int, features: torch.Tensor | None, num_copied: int = 0) -> None:
        """Note that the tokens lie in the KV, computed by weights ``version``."""
        owner = self.owner
        owner.num_prefilled = self.end
        if self.start == 0:
            owner.kv_version, owner.num_copied = version, num_copied
            owner.features.clear()
        if features is not None:
            owner.features.append(features)


class Prefiller:
    """Computes the KV of the batch's sequences that do not run yet; ``prompts`` are those that may be copied."""

    def __init__(self, batch: Batch, target: Target, speculation: Speculation, prompts: PromptCache) -> None:
        self._batch, self._target, self._speculation, self._prompts = batch, target, speculation, prompts
        self._times = TIMES_ON_GPU if target.device.type == "cuda" else 1

    def step(self, version: int) -> list[SampleState]:
        """Compute one chunk; the sequences that are ready now, already promoted. ``version`` is the weights'."""
        batch = self._batch
        budget = self._times * (CHUNK_TOKENS_BESIDE_DECODING if batch.num_running else CHUNK_TOKENS_ALONE)
        # Again where a prompt waited to copy what another has computed by now.
        while budget and (pieces := list(self._next_pieces(budget, version))):
            budget -= sum(len(piece.token_ids) for piece in pieces)
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

    def keep(self, row: int, version: int) -> None:
        """Keep the text of a sequence that has ended: the prompt of the next turn begins with it.

        A group's samples lie behind a prompt that they share, and features are at hand of prompts alone.
        """
        sequence = self._batch.sequences[row]
        is_current = sequence.oldest_version == sequence.kv_version == version
        if is_current and not sequence.group.shares_prompt and not self._target.has_features:
            text = sequence.token_ids[: sequence.own_len]
            self._prompts.keep(text, self._target.cache.own, row, None)

    def _next_pieces(self, budget: int, version: int) -> Iterator[Piece]:
        batch, begun = self._batch, list[Piece]()
        for row in range(batch.num_running, len(batch.sequences)):
            for rest in self._rests(row, {piece.owner for piece in begun}):
                left = self._copied(rest, version)
                if left.start == 0 and any(self._begins_alike(piece, left) for piece in begun):
                    return
                piece = replace(left, token_ids=left.token_ids[:budget])
                yield piece
                begun.append(piece)
                budget -= len(piece.token_ids)
                if not budget:
                    return

    def _rests(self, row: int, begun: set[Group | SampleState]) -> Iterator[Piece]:
        """Yield all that is to be computed of a row's shared prompt, where no row before began it, and of the row."""
        sequence = self._batch.sequences[row]
        group = sequence.group
        if not group.prefix_ready and group not in begun:
            start = group.num_prefilled
            yield Piece(sequence, True, group.prefix_row, start, group.request.prompt_token_ids[start:])
        first, end = sequence.num_prefilled, sequence.prefill_len
        if first < end:
            own = sequence.token_ids[group.prefix_tokens + first : group.prefix_tokens + end]
            yield Piece(sequence, False, row, first, tuple(own))

    def _copied(self, piece: Piece, version: int) -> Piece:
        """Copy what the piece begins with from a prompt that was kept; what is left to compute, its last token too."""
        if piece.start or piece.text is None or piece.sequence.group.scores_prompt:
            return piece
        beginning = self._prompts.longest(piece.token_ids[:-1])
        if beginning is None:
            return piece
        self._prompts.copy(beginning, self._store(piece), piece.row)
        copied = replace(piece, token_ids=piece.token_ids[: beginning.length])
        copied.note_cached(version, beginning.features, beginning.length)
        self._show([copied], beginning.features)
        return replace(piece, start=copied.end, token_ids=piece.token_ids[copied.end :])

    def _begins_alike(self, begun: Piece, piece: Piece) -> bool:
        """Return whether ``piece`` had better wait until what ``begun`` computes can be copied."""
        if piece.sequence.group.scores_prompt or begun.text is None or piece.text is None:
            return False
        if not self._will_be_kept(begun):
            return False
        return num_common(begun.text, piece.token_ids[:-1]) >= self._prompts.least

    def _will_be_kept(self, piece: Piece) -> bool:
        """Return whether the piece ends a text of which enough was computed to be worth keeping."""
        text, prompts = piece.text, self._prompts
        return (
            prompts.is_on
            and text is not None
            and piece.end == len(text)
            and len(text) - piece.owner.num_copied >= prompts.least
        )

    def _store(self, piece: Piece) -> KvStore:
        return self._target.cache.prefixes if piece.shared else self._target.cache.own

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
        output = self._target.run(self._store(pieces[0]), spans, tokens)
        features = self._target.features(output)
        self._score(pieces, output.hidden)
        self._note(pieces, features, version)
        self._show(pieces, features)
        if ending:
            logits = self._target.logits(output.hidden[self._target.tensor([last for _, last in ending])])
            for (group, _), row_logits in zip(ending, logits.split(1), strict=True):
                group.first_logits, group.prompt_version = row_logits, version

    def _score(self, pieces: Sequence[Piece], hidden: torch.Tensor) -> None:
        """Record the logprobs of prompt tokens, of which all are computed, for the groups that ask for them."""
        for piece, states in zip(pieces, hidden.split([len(piece.token_ids) for piece in pieces]), strict=True):
            group = piece.sequence.group
            if group.record is not None and group.scores_prompt and piece.text is not None:
                group.record.read_prompt(piece.start, states, group.request.prompt_token_ids, self._target.logits)

    def _note(self, pieces: Sequence[Piece], features: torch.Tensor | None, version: int) -> None:
        """Note what a pass has put into the KV, and keep the prompts that it ended."""
        for piece, of_piece in zip(pieces, self._split(pieces, features), strict=True):
            owner, text = piece.owner, piece.text
            piece.note_cached(version, None if text is None else of_piece)
            if text is None or piece.end < len(text):
                continue
            if self._will_be_kept(piece) and owner.kv_version == version:  # none of it is of earlier weights
                kept = torch.cat(owner.features) if owner.features else None
                self._prompts.keep(text, self._store(piece), piece.row, kept)
            owner.features.clear()

    def _show(self, pieces: Sequence[Piece], features: torch.Tensor | None) -> None:
        """Show the drafter what a pass has put into the KV."""
        self._speculation.prefill(
            [
                self._prefill(piece, of_piece)
                for piece, of_piece in zip(pieces, self._split(pieces, features), strict=True)
                if self._speculation.applies_to(piece.sequence.group)
            ]
        )

    @staticmethod
    def _split(pieces: Sequence[Piece], features: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        if features is None:
            return [None] * len(pieces)
        return features.split([len(piece.token_ids) for piece in pieces])

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
