"""Decoder blocks over the tokens of a pass: attention, MLP and the residual stream through them.

One native call where the kernels were built, torch's operators otherwise; the second is also what the first is tested
against. The native residual stream is fp32 in either dtype, torch's is rounded after every addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from rollout.embedded.attention import attend
from rollout.embedded.kernels.blocks import NativeBlocks
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable, rotate
from slime_spec.checkpoints.model_spec import ModelSpec


@dataclass
class Layer:
    """One block's weights; q, k and v are one matrix, gate and up another."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    def move(self, device: torch.device) -> None:
        """Move every weight; only where nothing is packed (CUDA and back)."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, PackedLinear):
                value.move(device)
            elif value is not None:
                setattr(self, item.name, value.to(device))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [.., width] over its root mean square, times ``weight`` [width]."""
    return F.rms_norm(x, weight.shape, weight, eps)


class BlockStack:
    """Some blocks in a row, all packed alike; block i keeps its keys and values in layer i of the plan's store.

    Example::

        hidden, (after_second,) = BlockStack(spec, rope, layers).run(x, plan, capture=(2,))
    """

    def __init__(self, spec: ModelSpec, rope: RopeTable, layers: Sequence[Layer]) -> None:
        self._spec, self._rope, self.layers = spec, rope, list(layers)
        native = layers[0].qkv.packing is Packing.NATIVE
        self._native = NativeBlocks(spec, rope, self.layers) if native else None

    def run(
        self,
        x: torch.Tensor,
        plan: AttentionPlan,
        capture: Sequence[int] = (),
        attention_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The residual stream [tokens, hidden] after the last block, and after each block of ``capture``, for ``x``.

        Writes the plan's KV store. ``attention_input`` [tokens, in of qkv] is what the first block's qkv reads instead
        of the norm of x.
        """
        if self._native is not None:
            return self._native.run(x, plan, capture, attention_input)
        captured: dict[int, torch.Tensor] = {}
        cos, sin_signed = self._rope.at(plan.positions)
        for index, layer in enumerate(self.layers):
            ready = attention_input if index == 0 else None
            inputs = self._norm(x, layer.input_norm) if ready is None else ready
            x = x + self._attention(inputs, layer, index, cos, sin_signed, plan)
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
            if index in capture:
                captured[index] = x
        return x, [captured[index] for index in capture]

    def _attention(
        self, inputs: torch.Tensor, layer: Layer, index: int, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        heads, kv_heads = self._spec.num_heads, self._spec.num_kv_heads
        qkv = layer.qkv(inputs).view(-1, heads + 2 * kv_heads, self._spec.head_dim)
        qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            query, keys = self._norm(qk[:, :heads], layer.q_norm), self._norm(qk[:, heads:], layer.k_norm)
            qk = torch.cat([query, keys], dim=1)
        qk = rotate(qk, cos, sin)
        return layer.out(attend(index, qk[:, :heads], qk[:, heads:], values, plan))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._spec.rms_norm_eps)
