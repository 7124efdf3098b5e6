"""DFlashNetwork drafts a block in one pass: DFlashDraftModel and DSparkDraftModel in SpecForge and SGLang.

DFlash is arXiv 2602.06036, DSpark 2607.05147.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.families.dspark import GATED, RNN
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.block import DraftAttention, RmsNorm, SwiGlu
from slime_spec.draft.markov import behind_token
from slime_spec.draft.network import DraftNetwork


@dataclass(frozen=True)
class Context:
    """Holds ``states`` [batch, tokens, hidden] of committed tokens at ``positions`` [batch, tokens].

    ``visible`` [batch, rows, tokens] says which of them the blocks of a row see.
    """

    states: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor


class DFlashLayer(nn.Module):
    """Implements one of the draft's Qwen3 blocks."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = DraftAttention(spec, spec.hidden_size)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = SwiGlu(spec.hidden_size, spec.intermediate_size)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """Return the blocks behind this layer, of rows' blocks x [batch, rows, size, hidden] at ``positions``."""
        known = self.self_attn.keys_values(context.states, context.positions)
        x = x + self.self_attn.in_blocks(self.input_layernorm(x), positions, known, context.visible)
        y: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class MarkovHead(nn.Module):
    """Holds the matrices of the bias that the tokens before make to DSpark's logits."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        rank, size, self.kind = spec.markov_rank, spec.block.hidden_size, spec.markov_kind
        self.markov_w1 = nn.Embedding(spec.block.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, spec.block.vocab_size, bias=False)
        if self.kind == GATED:
            self.gate_proj = nn.Linear(size + rank, rank)
        elif self.kind == RNN:
            self.joint_proj = nn.Linear(size + 2 * rank, 3 * rank)

    def behind(
        self, states: torch.Tensor, previous_ids: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what w2 reads behind tokens [...], and the memory of the next position; see behind_token."""
        mix = {GATED: "gate_proj", RNN: "joint_proj"}.get(self.kind)
        before = self.markov_w1(previous_ids).to(states.dtype)
        return behind_token(self.kind, None if mix is None else getattr(self, mix), before, states, memory)


class DFlashNetwork(DraftNetwork):
    """Applies its layers to [embedding of the root, of masks], over what ``fc`` makes of the target's features.

    Features are [..., captured layers · target hidden]. The target's head reads the states of the masks. Of a DSpark
    draft what the head reads is [state, what w2 reads]: [..., hidden + rank].
    """

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
        block = spec.block
        self.fc = nn.Linear(spec.feature_size, block.hidden_size, bias=False)
        self.hidden_norm = RmsNorm(block.hidden_size, block.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(block) for _ in range(block.num_layers))
        self.norm = RmsNorm(block.hidden_size, block.rms_norm_eps)
        if spec.markov_rank:
            self.markov_head = MarkovHead(spec)
        if spec.has_own_embedding:
            self.embed_tokens = nn.Embedding(block.vocab_size, block.hidden_size)

    @property
    def own_embedding(self) -> torch.Tensor | None:
        return self.embed_tokens.weight if self.spec.has_own_embedding else None

    @property
    def head_weight(self) -> torch.Tensor | None:
        return self.markov_head.markov_w2.weight if self.spec.markov_rank else None

    def behind(
        self, states: torch.Tensor, previous_ids: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the head reads of states [..., hidden] behind tokens [...], and the next position's memory."""
        if not self.spec.markov_rank:
            return states, None
        read, memory = self.markov_head.behind(states, previous_ids, memory)
        return torch.cat([states, read.to(states.dtype)], dim=-1), memory

    def context(self, features: torch.Tensor) -> torch.Tensor:
        """Return what every layer's keys and values of committed tokens are made of, [..., hidden]."""
        context: torch.Tensor = self.hidden_norm(self.fc(features))
        return context


class BlockUnroll:
    """Runs the blocks of rows, as ``Unroll`` runs their steps: one pass, of which ``next`` returns the next position.

    Row t stands for the round whose root is token t + 1: its block is that token and masks, at positions t + 1 and
    further, and sees the features of tokens to t and all of itself. Of the tokens before it in the block a step depends
    on the last, with a recurrent head on all, and in DFlash on none.
    """

    def __init__(
        self,
        network: DFlashNetwork,
        embed: Callable[[torch.Tensor], torch.Tensor],
        starts: torch.Tensor,
        num_rows: int,
    ) -> None:
        self._network, self._embed = network, embed
        self._rows = starts[:, None] + torch.arange(num_rows, device=starts.device)
        self._memory: torch.Tensor | None = None

    def first(self, features: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Run the blocks; returns what the head reads of the first token behind each root [batch, rows, hidden].

        ``features`` [batch, tokens, width] and ``token_ids`` [batch, tokens] are padded on the right, with anything.
        """
        network, size, (batch, tokens) = self._network, self._network.spec.block_size, token_ids.shape
        num_rows = self._rows.shape[1]
        roots = token_ids.gather(1, (self._rows + 1).clamp(max=tokens - 1))
        ids = roots.new_full((batch, num_rows, size), network.spec.mask_token_id)
        ids[:, :, 0] = roots
        x = self._embed(ids)
        in_context = torch.arange(tokens, device=x.device).expand(batch, -1)
        positions = self._rows[:, :, None] + 1 + torch.arange(size, device=x.device)
        visible = in_context[:, None, :] <= self._rows[:, :, None]
        context = Context(network.context(features), in_context, visible)
        for layer in network.layers:
            x = layer(x, positions, context)
        self._read = network.norm(x)
        self._position, self._memory = size - network.spec.num_block_drafts, None
        return self._behind(roots)

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the head reads of the next position, behind the token ids [batch, rows]."""
        self._position += 1
        return self._behind(ids)

    def _behind(self, ids: torch.Tensor) -> torch.Tensor:
        head_input, self._memory = self._network.behind(self._read[:, :, self._position], ids, self._memory)
        return head_input
