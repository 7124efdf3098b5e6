"""Make batches of sequences with their features, in an order that a restart reproduces."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.target import SequenceFeatures

# Sequences are sorted by length within pools of this many batches: little padding, and still a random order.
POOL_BATCHES = 16


@dataclass(frozen=True)
class TrainBatch:
    """Holds sequences padded on the right to one length, and the target's view of their replies.

    ``token_ids`` [batch, tokens], ``features`` [batch, tokens, width] (fp32), ``starts`` [batch]: the first row trained
    on, the prompt's last token, whose root is the first reply token. ``reply_lens`` [batch]. Of the reply's positions,
    padded to the longest: ``final`` [batch, reply, hidden], ``argmax`` and ``logsumexp`` [batch, reply].
    """

    token_ids: torch.Tensor
    features: torch.Tensor
    starts: torch.Tensor
    reply_lens: torch.Tensor
    final: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Count the rows that predict a token of the longest reply: all its tokens but the last are roots."""
        return int(self.reply_lens.max()) - 1

    def valid(self, step: int) -> torch.Tensor:
        """Return bool [batch, rows]: the token that ``step`` of the row predicts is in the reply."""
        rows = torch.arange(self.num_rows, device=self.starts.device)
        return rows + step + 1 < self.reply_lens[:, None]

    def replies_from(self, offset: int) -> torch.Tensor:
        """Return [batch, rows]: reply token ``row + offset`` of every row; any value where there is no such token."""
        columns = self.starts[:, None] + 1 + offset + torch.arange(self.num_rows, device=self.starts.device)
        return self.token_ids.gather(1, columns.clamp(max=self.token_ids.shape[1] - 1))


def epoch_batches(
    sequences: Sequence[DraftSequence], batch_size: int, seed: int, epoch: int
) -> list[list[DraftSequence]]:
    """Yield every sequence once, in batches of about equal lengths, drawn from (seed, epoch)."""
    rng = random.Random(f"{seed}/batches/{epoch}")
    order = list(sequences)
    rng.shuffle(order)
    batches: list[list[DraftSequence]] = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = sorted(order[start : start + batch_size * POOL_BATCHES], key=lambda each: len(each.token_ids))
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


class Features(Protocol):
    """Has the target's features of sequences by their index."""

    def __getitem__(self, index: int, /) -> SequenceFeatures: ...


def collate(sequences: Sequence[DraftSequence], store: Features, device: torch.device) -> TrainBatch:
    known = [store[each.index] for each in sequences]
    token_ids = [torch.tensor(each.token_ids) for each in sequences]
    return TrainBatch(
        token_ids=padded(token_ids).to(device),
        features=padded([each.features for each in known]).to(device).float(),
        starts=torch.tensor([each.prompt_len - 1 for each in sequences], device=device),
        reply_lens=torch.tensor([len(each.reply) for each in sequences], device=device),
        final=padded([each.final for each in known]).to(device),
        argmax=padded([each.argmax for each in known]).to(device),
        logsumexp=padded([each.logsumexp for each in known]).to(device),
    )


def padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensors side by side, each padded with zeros behind its end to the longest."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
