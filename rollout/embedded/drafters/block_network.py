"""The forward pass of a block drafter (DFlash, arXiv 2602.06036) turns a root into the logits of the tokens behind it.

    context   c = norm(fc(features of captured layers))    of every committed token before the root: its keys and values
              in every block are made of c itself, and lie in the draft's cache
    block     [embedding of the root, of masks …]          its tokens see the context and all of the block; the keys
              and values of the block are of one round alone and are never cached
    logits    the target's head over norm(y) of the masks: the i-th is that of the i-th token behind the root
              (DSpark, arXiv 2607.05147: from the root's row on, plus a bias of low rank by the tokens before)

It runs in torch's operators on every device: the native kernels have no attention in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rollout.embedded.blocks import gated_mlp, rms_norm
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.layer import Layer, Weights
from rollout.embedded.linear import PackedLinear
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable, rotate
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.draft.markov import behind_token


@dataclass(frozen=True)
class BlockRow:
    """Says where the context of one root lies: ``prefix_len`` tokens in a prefix row, then ``own_len`` in the own."""

    row: int
    own_len: int
    prefix_row: int = -1
    prefix_len: int = 0

    @property
    def position(self) -> int:
        """Return the root's position in its sequence."""
        return self.prefix_len + self.own_len


@dataclass
class BlockNetwork(Weights):
    """Holds the weights of one version of a block drafter; ``embedding`` is None where the target's serves."""

    spec: DraftSpec
    rope: RopeTable
    layers: list[Layer]
    fc: PackedLinear
    hidden_norm: torch.Tensor
    norm: torch.Tensor
    embedding: torch.Tensor | None = None
    previous: torch.Tensor | None = None  # w1 [vocab, rank]
    bias: PackedLinear | None = None  # w2 [vocab, rank]
    mix: PackedLinear | None = None  # of the token before, the state and the memory, in gated and recurrent heads

    def cache_context(self, features: torch.Tensor, plan: AttentionPlan) -> None:
        """Put the keys and values of committed tokens' features [tokens, feature size] where ``plan`` says."""
        context = self._norm(self.fc(features), self.hidden_norm)
        cos, sin_signed = self.rope.at(plan.positions)
        for index, layer in enumerate(self.layers):
            _, keys, values = self._heads(layer, context)
            plan.store.write(index, plan.write_index, rotate(keys, cos, sin_signed), values)

    def states(self, embedded: torch.Tensor, rows: Sequence[BlockRow], cache: KvCache) -> torch.Tensor:
        """Return the states [rows, drafts, hidden] that the head reads, of blocks [rows, block, hidden]."""
        num_rows, block, hidden = embedded.shape
        device = embedded.device
        starts = torch.tensor([row.position for row in rows], device=device)
        positions = (starts[:, None] + torch.arange(block, device=device)).flatten()
        cos, sin_signed = self.rope.at(positions)
        context = _Context(rows, cache, block, device)
        x = embedded.flatten(0, 1)
        for index, layer in enumerate(self.layers):
            query, keys, values = self._heads(layer, self._norm(x, layer.input_norm))
            query, keys = rotate(query, cos, sin_signed), rotate(keys, cos, sin_signed)
            blocks = [each.unflatten(0, (num_rows, block)).transpose(1, 2) for each in (query, keys, values)]
            x = x + layer.out(context.attend(index, *blocks))
            x = x + gated_mlp(self._norm(x, layer.post_norm), layer)
        return self._norm(x.view(num_rows, block, hidden)[:, block - self.spec.num_block_drafts :], self.norm)

    def biased(
        self, logits: torch.Tensor, previous_ids: torch.Tensor, states: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits [rows, vocab] of tokens behind ``previous_ids`` [rows], and the next position's memory.

        A DSpark draft's logits depend on those tokens, and in some heads on ``states`` [rows, hidden] and ``memory``.
        """
        if self.bias is None:
            return logits, None
        assert self.previous is not None, "the bias has two factors"
        before = F.embedding(previous_ids, self.previous)
        read, memory = behind_token(self.spec.markov_kind, self.mix, before, states, memory)
        return logits + self.bias.wide(read), memory

    def _heads(self, layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys (both normed) and values [tokens, heads, head_dim] of x [tokens, hidden]."""
        block = self.spec.block
        parts = (block.num_heads, block.num_kv_heads, block.num_kv_heads)
        query, keys, values = layer.qkv(x).unflatten(-1, (sum(parts), block.head_dim)).split(parts, dim=-2)
        assert layer.q_norm is not None, "a Qwen3 block has a norm of its queries"
        assert layer.k_norm is not None, "and of its keys"
        return self._norm(query, layer.q_norm), self._norm(keys, layer.k_norm), values

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.spec.block.rms_norm_eps)


@dataclass(frozen=True)
class _Part:
    """Holds the part of a round's context that lies in one store: of each row ``length`` slots, not all its own."""

    store: KvStore
    index: torch.Tensor
    length: int
    in_context: torch.Tensor

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """Gather [rows, kv_heads, length, head_dim], zero where it is not the row's: another's NaN times 0 is NaN."""
        return stored[:, :, : self.length].index_select(0, self.index).masked_fill(~self.in_context, 0.0)


class _Context:
    """Reads the context of a round's rows, gathered once a block: [prefix | own | block], padded to the longest."""

    def __init__(self, rows: Sequence[BlockRow], cache: KvCache, block: int, device: torch.device) -> None:
        self._parts: list[_Part] = []
        seen: list[torch.Tensor] = []
        for store, where in (
            (cache.prefixes, [(max(row.prefix_row, 0), row.prefix_len) for row in rows]),
            (cache.own, [(row.row, row.own_len) for row in rows]),
        ):
            lengths = torch.tensor([length for _, length in where], device=device)
            longest = int(lengths.max())
            if longest:
                index = torch.tensor([row for row, _ in where], device=device)
                in_context = torch.arange(longest, device=device) < lengths[:, None]
                self._parts.append(_Part(store, index, longest, in_context[:, None, :, None]))
                seen.append(in_context)
        seen.append(torch.ones(len(rows), block, dtype=torch.bool, device=device))
        self._seen = torch.cat(seen, dim=1)[:, None, None]

    def attend(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return [rows * block, heads * head_dim] of a block's heads [rows, heads, block, head_dim]."""
        stored_keys = [part.of(part.store.keys[layer]) for part in self._parts]
        stored_values = [part.of(part.store.values[layer]) for part in self._parts]
        out = F.scaled_dot_product_attention(
            query,
            torch.cat([*stored_keys, keys], dim=2),
            torch.cat([*stored_values, values], dim=2),
            attn_mask=self._seen,
            enable_gqa=True,
        )
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
