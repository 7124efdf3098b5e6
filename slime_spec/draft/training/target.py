"""The frozen target gives the hidden states that a draft reads, and the distribution of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.training.sequence import DraftSequence


@dataclass(frozen=True)
class SequenceFeatures:
    """Holds the target's outputs for one sequence of n tokens, m of them the reply.

    ``features`` [n, width] are what the draft reads. For the reply's positions: ``final`` [m, hidden] after the final
    norm, whose product with the head are the logits, and of those logits ``argmax`` [m] and ``logsumexp`` [m] (fp32)
    over the whole vocabulary.
    """

    features: torch.Tensor
    final: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor


class FrozenTarget:
    """Runs the target in transformers; ``embedding`` and ``head`` [vocab, hidden] are its tables.

    ``capture_layers`` are 0-based layers whose outputs, concatenated, are the features; empty means the hidden state
    after the final norm.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, capture_layers: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        disable_progress_bar()  # its bar would break this program's own bar
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False).to(device)
        self._body = model.model
        self.spec, self.capture_layers, self.device = spec, tuple(capture_layers), device
        self.embedding: torch.Tensor = model.get_input_embeddings().weight
        self.head: torch.Tensor = model.get_output_embeddings().weight

    @torch.inference_mode()
    def features(self, sequences: Sequence[DraftSequence]) -> list[SequenceFeatures]:
        """Compute the features of each sequence in one padded forward pass; on the CPU, in the target's dtype."""
        longest = max(len(each.token_ids) for each in sequences)
        padded = [(*each.token_ids, *[0] * (longest - len(each.token_ids))) for each in sequences]
        # Padding is on the right and attention causal: no real token sees it, so that no mask is needed.
        out = self._body(torch.tensor(padded, device=self.device), output_hidden_states=bool(self.capture_layers))
        states = out.last_hidden_state  # after the final norm
        # hidden_states[0] is the embedding, [l + 1] the output of layer l.
        captured = [out.hidden_states[layer + 1] for layer in self.capture_layers]
        wide = torch.cat(captured, dim=-1) if captured else states
        return [
            self._of_one(each, wide[row, : len(each.token_ids)], states[row, each.prompt_len : len(each.token_ids)])
            for row, each in enumerate(sequences)
        ]

    def _of_one(self, sequence: DraftSequence, features: torch.Tensor, final: torch.Tensor) -> SequenceFeatures:
        logits = (final @ self.head.T).float()
        return SequenceFeatures(
            features=features.cpu().clone(),
            final=final.cpu().clone(),
            argmax=logits.argmax(-1).cpu(),
            logsumexp=logits.logsumexp(-1).cpu(),
        )
