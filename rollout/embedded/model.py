"""The decoder runs the forward pass over packed tokens; it computes logits only of the rows asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rollout.embedded.blocks import BlockStack, rms_norm
from rollout.embedded.layer import Layer
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.mixed_blocks import AnyLayer, MixedBlocks, stack_of
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable
from slime_spec.checkpoints.model_spec import ModelSpec

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import DevicePass

__all__ = ["Decoder", "Layer"]


class Memory:
    """Stands for the addresses at which weights lie: what was captured over it is right as long as it is the same."""


@dataclass
class Decoder:
    """Holds the weights of one version and runs the forward pass over them.

    ``embedding`` is None where the embedding's rows are read out of the head's packed weight, which they are tied to.
    """

    spec: ModelSpec
    rope: RopeTable
    embedding: torch.Tensor | None
    layers: list[AnyLayer]
    norm: torch.Tensor
    head: PackedLinear
    memory: Memory = field(default_factory=Memory)

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @cached_property
    def blocks(self) -> BlockStack | MixedBlocks:
        return stack_of(self.spec, self.rope, self.layers)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [tokens, hidden] of integer ``token_ids`` [tokens]."""
        return self.head.rows(token_ids) if self.embedding is None else F.embedding(token_ids, self.embedding)

    @torch.inference_mode()
    def hidden(
        self, token_ids: torch.Tensor, plan: AttentionPlan | DevicePass, capture: Sequence[int] = ()
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

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor of plain weights once, in an order that two decoders of one model share."""
        modules = [self.embedding, self.norm, self.head]
        modules += [weight for layer in self.layers for weight in layer.weights()]
        found: dict[int, torch.Tensor] = {}
        for module in modules:
            for tensor in module.plain_tensors() if isinstance(module, PackedLinear) else [module]:
                if tensor is not None:
                    found.setdefault(id(tensor), tensor)
        return list(found.values())

    @torch.inference_mode()
    def exchange_memory(self, other: Decoder) -> None:
        """Lie where the other decoder lies, and the other one here; both keep their weights.

        What was captured over the other's memory computes with these weights from now on.
        """
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            values = mine.clone()
            memory = mine.untyped_storage(), mine.storage_offset(), mine.shape, mine.stride()
            mine.set_(its.untyped_storage(), its.storage_offset(), its.shape, its.stride())
            its.set_(*memory)
            its.copy_(mine)
            mine.copy_(values)
        self.memory, other.memory = other.memory, self.memory

    def move(self, device: torch.device) -> None:
        """Move every weight; only where nothing is packed (CUDA and back)."""
        self.memory = Memory()
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
