"""A reduced draft vocabulary has the target's most frequent tokens, and two tables that translate ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from slime_spec.draft.training.sequence import DraftSequence


@dataclass(frozen=True)
class DraftVocabulary:
    """Lists the draft's tokens: ``target_ids`` [draft vocab], ascending; draft token i is ``target_ids[i]``."""

    target_ids: torch.Tensor
    vocab_size: int

    @classmethod
    def most_frequent(cls, sequences: Iterable[DraftSequence], vocab_size: int, size: int) -> DraftVocabulary:
        """Choose the ``size`` most frequent tokens of the replies; of equally frequent ones the lower."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for sequence in sequences:
            counts += torch.bincount(torch.tensor(sequence.reply), minlength=vocab_size)
        chosen = torch.sort(counts, descending=True, stable=True).indices[:size]
        return cls(chosen.sort().values, vocab_size)

    @property
    def d2t(self) -> torch.Tensor:
        """Return offsets, the convention of EAGLE, SpecForge and SGLang: target id = draft id + d2t[draft id]."""
        return self.target_ids - torch.arange(len(self.target_ids))

    @property
    def t2d(self) -> torch.Tensor:
        """Return bool [target vocab]: the token is in the draft vocabulary."""
        return torch.zeros(self.vocab_size, dtype=torch.bool).index_fill_(0, self.target_ids, True)

    @property
    def draft_ids(self) -> torch.Tensor:
        """Return int64 [target vocab]: the draft's id of every token, -1 where it has none."""
        ids = torch.full((self.vocab_size,), -1)
        return ids.index_copy_(0, self.target_ids, torch.arange(len(self.target_ids)))

    def coverage(self, sequences: Iterable[DraftSequence]) -> float:
        """Return the share of the replies' tokens that the vocabulary has."""
        t2d = self.t2d
        inside = [t2d[torch.tensor(sequence.reply)] for sequence in sequences]
        return float(torch.cat(inside).float().mean())
