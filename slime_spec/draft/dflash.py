"""DFlashNetwork drafts a block in one pass (arXiv 2602.06036), DFlashDraftModel in SpecForge and SGLang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.block import DraftAttention, KeysValues, RmsNorm, SwiGlu
from slime_spec.draft.network import DraftNetwork


@dataclass(frozen=True)
class Context:
    """Holds ``states`` [batch, tokens, hidden] of committed tokens at ``positions`` [batch, tokens].

    ``visible`` [batch, rows · size, tokens] says which of them a block's token sees.
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
        self.mlp = SwiGlu(spec)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, context: Context, size: int) -> torch.Tensor:
        """Return the blocks [batch, rows · size, hidden] behind this one, of rows' blocks x at ``positions``."""
        normed = self.input_layernorm(x)
        known = self.self_attn.keys_values(context.states, context.positions)
        own = _in_every_place(self.self_attn.keys_values(normed, positions), size)
        x = x + self.self_attn(normed, positions, known, context.visible, own)
        y: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class DFlashNetwork(DraftNetwork):
    """Applies its layers to [embedding of the root, of masks], over what ``fc`` makes of the target's features.

    Features are [..., captured layers · target hidden]. The target's head reads the states of the masks.
    """

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
        block = spec.block
        self.fc = nn.Linear(spec.feature_size, block.hidden_size, bias=False)
        self.hidden_norm = RmsNorm(block.hidden_size, block.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(block) for _ in range(block.num_layers))
        self.norm = RmsNorm(block.hidden_size, block.rms_norm_eps)
        if spec.has_own_embedding:
            self.embed_tokens = nn.Embedding(block.vocab_size, block.hidden_size)

    @property
    def own_embedding(self) -> torch.Tensor | None:
        return self.embed_tokens.weight if self.spec.has_own_embedding else None

    def context(self, features: torch.Tensor) -> torch.Tensor:
        """Return what every layer's keys and values of committed tokens are made of, [..., hidden]."""
        context: torch.Tensor = self.hidden_norm(self.fc(features))
        return context


class BlockUnroll:
    """Runs the blocks of rows, as ``Unroll`` runs their steps: one pass, of which ``next`` returns the next position.

    Row t stands for the round whose root is token t + 1: its block is that token and masks, at positions t + 1 and
    further, and sees the features of tokens to t and all of itself. What a step predicts does not depend on the tokens
    before it in the block.
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

    def first(self, features: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Run the blocks; returns what the head reads of the first token behind each root [batch, rows, hidden].

        ``features`` [batch, tokens, width] and ``token_ids`` [batch, tokens] are padded on the right, with anything.
        """
        network, size, (batch, tokens) = self._network, self._network.spec.block_size, token_ids.shape
        num_rows = self._rows.shape[1]
        roots = token_ids.gather(1, (self._rows + 1).clamp(max=tokens - 1))
        ids = roots.new_full((batch, num_rows, size), network.spec.mask_token_id)
        ids[:, :, 0] = roots
        x = self._embed(ids.flatten(1))
        in_context = torch.arange(tokens, device=x.device).expand(batch, -1)
        positions = (self._rows[:, :, None] + 1 + torch.arange(size, device=x.device)).flatten(1)
        visible = (in_context[:, None, :] <= self._rows[:, :, None]).repeat_interleave(size, dim=1)
        context = Context(network.context(features), in_context, visible)
        for layer in network.layers:
            x = layer(x, positions, context, size)
        self._read = network.norm(x).unflatten(1, (num_rows, size))
        self._position = 1
        return self._read[:, :, 1]

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the head reads of the next position, whatever ``ids`` [batch, rows] precede it."""
        self._position += 1
        return self._read[:, :, self._position]


def _in_every_place(own: KeysValues, size: int) -> list[KeysValues]:
    """Return, for each position of a block, its keys and values in the place of every token of that block."""
    keys, values = (each.unflatten(1, (-1, size)) for each in (own.keys, own.values))
    return [
        KeysValues(keys[:, :, index].repeat_interleave(size, dim=1), values[:, :, index].repeat_interleave(size, dim=1))
        for index in range(size)
    ]
