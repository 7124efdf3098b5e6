"""The decoder runs the forward pass over packed tokens; it computes logits only of the rows asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from rollout.embedded.blocks import BlockStack, Layer, rms_norm
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable
from slime_spec.checkpoints.model_spec import ModelSpec

__all__ = ["Decoder", "Layer"]


@dataclass
class Decoder:
    """Holds the weights of one version and runs the forward pass over them.

    ``embedding`` is None where the embedding's rows are read out of the head's packed weight, which they are tied to.
    """

    spec: ModelSpec
    rope: RopeTable
    embedding: torch.Tensor | None
    layers: list[Layer]
    norm: torch.Tensor
    head: PackedLinear

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @cached_property
    def blocks(self) -> BlockStack:
        return BlockStack(self.spec, self.rope, self.layers)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [tokens, hidden] of int64 ``token_ids`` [tokens]."""
        return self.head.rows(token_ids) if self.embedding is None else F.embedding(token_ids, self.embedding)

    @torch.inference_mode()
    def hidden(
        self, token_ids: torch.Tensor, plan: AttentionPlan, capture: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return hidden states [tokens, hidden] after the last block, before the final norm; writes the KV store.

        Beside it the residual stream after each layer of ``capture`` (0-based), in the order given.
        """
        return self.blocks.run(self.embed(token_ids), plan, capture)

    @torch.inference_mode()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``hidden`` after the final norm, which the head reads."""
        if self.head.packing is Packing.NATIVE:
            return self.head.library.rms_norm(hidden.contiguous(), self.norm, self.spec.rms_norm_eps)
        return rms_norm(hidden, self.norm, self.spec.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [rows, vocab] of hidden states [rows, hidden]."""
        return self.head.wide(self.final_norm(hidden))

    def move(self, device: torch.device) -> None:
        """Move every weight; only where nothing is packed (CUDA and back)."""
        self.norm = self.norm.to(device)
        if self.embedding is not None:
            self.embedding = self.embedding.to(device)
        if self.spec.tie_word_embeddings and self.embedding is not None:
            self.head = PackedLinear(
                self.embedding, packing=Packing.PLAIN
            )  # moved by itself it would be a second table
        else:
            self.head.move(device)
        for layer in self.layers:
            layer.move(device)
