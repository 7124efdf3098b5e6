"""The forward pass of an EAGLE, EAGLE-3 or MTP draft turns tokens and the features before them into logits.

Position t of a draft reads the embedding e of token t + 1 and the target's features h of token t, so that it predicts
token t + 2. Beyond the committed tokens it reads its own hidden state in the features' place.

    EAGLE-3   x = fc(h of captured layers)    block 0 attends over [norm(e); norm(x)]    head(norm(y)), next x = y
    EAGLE     x = fc([e; h])                  block 0 attends over x, without a norm     head(y),       next h = y
    MTP       x = fc([norm(h); norm(e)])      an ordinary block                          head(norm(y)), next h = norm(y)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from rollout.embedded.blocks import BlockStack, rms_norm
from rollout.embedded.drafters.step import Heads
from rollout.embedded.layer import Weights
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.mixed_blocks import AnyLayer, MixedBlocks, stack_of
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable
from slime_spec.checkpoints.draft_spec import DraftSpec

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import DevicePass


@dataclass
class DraftNetwork(Weights):
    """Holds the weights of one version of a draft and runs the forward pass over them.

    ``embedding`` and ``head`` are the draft's own; where they are None the target's serve.
    """

    spec: DraftSpec
    rope: RopeTable
    layers: list[AnyLayer]
    fc: PackedLinear | None = None  # an EAGLE-3 draft that reads the target's final state has none
    norm: torch.Tensor | None = None
    embedding_norm: torch.Tensor | None = None
    hidden_norm: torch.Tensor | None = None
    input_norm: torch.Tensor | None = None  # over all captured layers, before fc
    fc_norms: list[torch.Tensor] = field(default_factory=list)  # one per captured layer, before fc
    embedding: torch.Tensor | None = None
    head: PackedLinear | None = None

    @cached_property
    def blocks(self) -> BlockStack | MixedBlocks:
        return stack_of(self.spec.block, self.rope, self.layers)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return the target's features [tokens, feature size] as what ``forward`` reads [tokens, hidden]."""
        if self.spec.family != "eagle3" or self.fc is None:
            return features
        if self.input_norm is not None:
            features = self._norm(features, self.input_norm)
        if self.fc_norms:
            chunks = features.split(self.spec.target_hidden_size, dim=-1)
            features = torch.cat([self._norm(x, w) for x, w in zip(chunks, self.fc_norms, strict=True)], dim=-1)
        return self.fc(features)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor, plan: AttentionPlan | DevicePass) -> torch.Tensor:
        """Return the residual stream [tokens, hidden] after the last block; writes the draft's KV store.

        ``embedded`` are the tokens' embeddings, ``hidden`` what precedes them: projected features or drafted states.
        """
        if self.spec.zero_first_embedding and plan.has_first_position:
            embedded = embedded.masked_fill((plan.positions == 0).unsqueeze(1), 0.0)
        x, attention_input = self._enter(embedded, hidden)
        residual, _ = self.blocks.run(x, plan, attention_input=attention_input)
        return residual

    def heads(self, residual: torch.Tensor, target_head: PackedLinear | None) -> Heads:
        """Return the heads of rows [rows, hidden] of ``forward``.

        ``target_head`` serves a draft without its own head.
        """
        normed = residual if self.norm is None else self._norm(residual, self.norm)
        head = self.head if self.head is not None else target_head
        assert head is not None, "a draft without a head is bound to a target before it drafts"
        logits = head.wide(normed if self.spec.logits_norm else residual)
        return Heads(logits, normed if self.spec.recurrent_norm else residual)

    def _enter(self, embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (the first block's residual stream, its attention's input, None where that is the stream's norm)."""
        if self.spec.family == "eagle":
            assert self.fc is not None, "it projects both halves"
            x = self.fc(torch.cat([embedded, hidden], dim=-1))
            return x, x
        assert self.embedding_norm is not None, "both halves have a norm"
        assert self.hidden_norm is not None, "both halves have a norm"
        embedded, normed = self._norm(embedded, self.embedding_norm), self._norm(hidden, self.hidden_norm)
        if self.spec.family == "eagle3":
            return normed if self.spec.residual_norm else hidden, torch.cat([embedded, normed], dim=-1)
        assert self.fc is not None, "it projects both halves"
        halves = [normed, embedded] if self.spec.hidden_first else [embedded, normed]
        return self.fc(torch.cat(halves, dim=-1)), None

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        eps = self.spec.block.rms_norm_eps
        linear = self.head if self.fc is None else self.fc
        if linear is not None and linear.packing is Packing.NATIVE:
            return linear.library.rms_norm(x.contiguous(), weight, eps)
        return rms_norm(x, weight, eps)
