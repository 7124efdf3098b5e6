"""Fused blocks run a stack of decoder blocks with a GPU's kernels: ten launches a block where operators need thirty.

The residual stream is fp32 in either dtype, as in the CPU's kernels. ``BlockStack`` in torch's operators is the
reference that tests hold this to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.embedded.cuda import operators
from rollout.embedded.cuda.device_pass import DevicePass
from rollout.embedded.layer import Layer
from rollout.embedded.rope import RopeTable
from slime_spec.checkpoints.model_spec import ModelSpec


class FusedBlocks:
    """Runs successive blocks of plain weights over a device pass."""

    def __init__(self, spec: ModelSpec, rope: RopeTable, layers: Sequence[Layer]) -> None:
        self._spec, self._rope, self._layers = spec, rope, layers

    def run(
        self, x: torch.Tensor, one_pass: DevicePass, capture: Sequence[int], attention_input: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See ``BlockStack.run``; tokens are the bucket's, padding included."""
        eps, dtype = self._spec.rms_norm_eps, x.dtype
        stream = x.to(torch.float32, copy=True)
        delta: torch.Tensor | None = None
        captured: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers):
            if index == 0 and attention_input is not None:
                inputs = attention_input
            else:
                inputs = operators.add_and_norm(stream, delta, layer.input_norm, eps)
            if index - 1 in capture:
                captured[index - 1] = stream.to(dtype, copy=True)
            attention = self._attention(inputs, layer, index, one_pass)
            normed = operators.add_and_norm(stream, layer.out(attention), layer.post_norm, eps)
            delta = layer.down(operators.silu_times(layer.gate_up(normed)))
        assert delta is not None, "a stack has a block"
        hidden = stream.add_(delta).to(dtype)
        captured[len(self._layers) - 1] = hidden
        return hidden, [captured[index] for index in capture]

    def _attention(self, inputs: torch.Tensor, layer: Layer, index: int, one_pass: DevicePass) -> torch.Tensor:
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        tables = self._rope.cos, self._rope.sin_signed
        query = operators.rotate_and_store(layer.qkv(inputs), norms, tables, one_pass, index, self._spec)
        return operators.attend(query, one_pass, index, self._spec)
