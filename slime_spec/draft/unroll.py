"""Draft many rounds of one sequence at once: the multi-step unrolled forward of EAGLE-3's training.

Row t stands for the round whose root is token t + 1: it knows the tokens to t + 1 and the target's features
to t. Step i of the row embeds token t + 1 + i and predicts token t + 2 + i:

    step 0   embeds token t+1, hidden = features of t, position t        sees step-0 keys of rows ≤ t
    step 1   embeds token t+2, hidden = step 0's output, position t+1    … and step 1's key of its own row
    step i   embeds token t+1+i, hidden = step i-1's, position t+i       … and its own row's keys of steps 1 … i

which is what an engine computes in a round, whose cache holds keys of true features for committed tokens and its own
steps' keys for drafted ones. Only step 0 needs every row, as keys; queries are the rows trained on, contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from slime_spec.draft.block import KeysValues
from slime_spec.draft.dflash import BlockUnroll, DFlashNetwork
from slime_spec.draft.network import DraftNetwork, StepNetwork


def make_unroll(
    network: DraftNetwork, embed: Callable[[torch.Tensor], torch.Tensor], starts: torch.Tensor, num_rows: int
) -> Unroll | BlockUnroll:
    """Return what runs the rounds of a batch's rows, step by step or a block at once; see Unroll for the arguments."""
    if isinstance(network, DFlashNetwork):
        return BlockUnroll(network, embed, starts, num_rows)
    assert isinstance(network, StepNetwork), "a network drafts by steps or in blocks"
    return Unroll(network, embed, starts, num_rows)


class Unroll:
    """Runs rows ``starts[b] … starts[b] + num_rows - 1`` of every sequence b of a padded batch. Example::

    unroll = Unroll(network, model.embed, starts, num_rows)
    head_input = unroll.first(features, token_ids)      # step 0, [batch, rows, hidden]
    head_input = unroll.next(ids)                       # step 1 embeds ids [batch, rows], and so on

    ``embed`` looks token ids [...] up in the target's table, or the draft's own, and returns [..., hidden].
    """

    def __init__(
        self,
        network: StepNetwork,
        embed: Callable[[torch.Tensor], torch.Tensor],
        starts: torch.Tensor,
        num_rows: int,
    ) -> None:
        self._network, self._embed = network, embed
        self._rows = starts[:, None] + torch.arange(num_rows, device=starts.device)
        self._own: list[KeysValues] = []

    def first(self, features: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Run step 0 from the target's features [batch, tokens, width] at ``token_ids`` [batch, tokens].

        Sequences are padded on the right, with anything: no row that counts sees a later token.
        """
        network, (batch, tokens) = self._network, token_ids.shape
        embedded = self._embed(token_ids.roll(-1, dims=1))
        if network.spec.zero_first_embedding:
            embedded = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, 1:]], dim=1)
        x, residual = network.inputs(features, embedded, first=True)
        positions = torch.arange(tokens, device=x.device).expand(batch, -1)
        self._context = network.attention.keys_values(x, positions)
        self._visible = positions[:, None, :] <= self._rows[:, :, None]
        # Rows beyond a sequence's end count nowhere; they only must not be read out of bounds.
        within = self._rows.clamp(max=tokens - 1)[:, :, None]
        x = x.gather(1, within.expand(-1, -1, x.shape[-1]))
        return self._step(x, residual.gather(1, within.expand(-1, -1, residual.shape[-1])))

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the next step, embedding the token ids [batch, rows] that follow each row's tokens so far."""
        network = self._network
        x, residual = network.inputs(self._recurrent, self._embed(ids), first=False)
        self._own.append(network.attention.keys_values(x, self._rows + len(self._own) + 1))
        return self._step(x, residual)

    def _step(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        positions = self._rows + len(self._own)
        attended = self._network.attention(x, positions, self._context, self._visible, self._own)
        head_input, self._recurrent = self._network.after_attention(residual + attended)
        return head_input
