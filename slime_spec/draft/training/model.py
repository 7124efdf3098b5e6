"""A draft model is a draft network with the tensors of its target that it uses, for training and judging."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from slime_spec.draft.network import DraftNetwork
from slime_spec.draft.training.vocabulary import DraftVocabulary


@dataclass(frozen=True)
class DraftModel:
    """Joins a draft network with ``embedding`` and ``target_head`` [vocab, hidden] of the target, in fp32 and frozen.

    ``vocabulary`` is what the draft's logits range over: the head's rows of a network with a head of its own, else
    those tokens of the target's head. Logits are those at ``temperature``, at which the replies were sampled. Where
    ``embedding`` has the rows of some tokens alone, ``embedding_rows`` [vocab] says which row is whose.
    """

    network: DraftNetwork
    embedding: torch.Tensor
    target_head: torch.Tensor
    vocabulary: DraftVocabulary
    temperature: float = 1.0
    embedding_rows: torch.Tensor | None = None

    @classmethod
    def of(cls, network: DraftNetwork, embedding: torch.Tensor, head: torch.Tensor, ids: DraftVocabulary) -> DraftModel:
        """Make the model from the target's whole tables."""
        own = network.own_embedding
        table = embedding if own is None else own
        return cls(network, table.float(), head[ids.target_ids.to(head.device)].float(), ids)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [..., hidden] of token ids [...]."""
        return F.embedding(ids if self.embedding_rows is None else self.embedding_rows[ids], self.embedding)

    def logits(self, head_input: torch.Tensor) -> torch.Tensor:
        """Return the draft's logits [..., draft vocab], fp32."""
        own, bias = self.network.own_head, self.network.head_weight
        if own is None and bias is not None:
            states, behind = head_input.split([self.target_head.shape[1], bias.shape[1]], dim=-1)
            is_whole = len(self.vocabulary.target_ids) == len(bias)
            rows = bias if is_whole else bias[self.vocabulary.target_ids.to(bias.device)]
            return (F.linear(states, self.target_head) + F.linear(behind, rows)).float() / self.temperature
        return F.linear(head_input, self.target_head if own is None else own).float() / self.temperature

    def target_logits(self, final: torch.Tensor) -> torch.Tensor:
        """Return the target's logits over the draft vocabulary, from hidden states after its final norm."""
        return F.linear(final.float(), self.target_head) / self.temperature

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.target_ids.to(draft_ids.device)[draft_ids]

    def over_all_tokens(self, head: torch.Tensor) -> DraftModel:
        """Return the model as engines run it: without its own head it drafts from the target's whole vocabulary."""
        if self.network.own_head is not None:
            return self
        everything = DraftVocabulary(torch.arange(head.shape[0]), head.shape[0])
        return replace(self, target_head=head.float(), vocabulary=everything)
