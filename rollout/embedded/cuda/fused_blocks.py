"""Fused blocks run a stack of decoder blocks with a GPU's kernels: seven or ten launches a block instead of thirty.

The residual stream is fp32 in either dtype, as in the CPU's kernels. ``BlockStack`` in torch's operators is the
reference that tests hold this to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.embedded.cuda import operators
from rollout.embedded.cuda.device_pass import DevicePass
from rollout.embedded.cuda.products import Choose, ChosenProducts, Residual, Stage
from rollout.embedded.layer import Layer
from rollout.embedded.rope import RopeTable
from slime_spec.checkpoints.model_spec import ModelSpec


class FusedBlocks:
    """Runs successive blocks over a device pass; ``choose`` says by what the products of few tokens are computed."""

    def __init__(self, spec: ModelSpec, rope: RopeTable, layers: Sequence[Layer], choose: Choose | None = None) -> None:
        self._spec, self._rope, self._layers = spec, rope, layers
        self._products = ChosenProducts(layers, spec.rms_norm_eps, choose)

    def run(
        self, x: torch.Tensor, one_pass: DevicePass, capture: Sequence[int], attention_input: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See ``BlockStack.run``; tokens are the bucket's, padding included."""
        eps, dtype = self._spec.rms_norm_eps, x.dtype
        products = self._products.of(len(x))
        residual = Residual(x.to(torch.float32, copy=True))
        captured: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers):
            if index == 0 and attention_input is not None:
                qkv = layer.qkv(attention_input)
            else:
                qkv = products[Stage.QKV].enter(residual, layer.input_norm, layer.qkv, eps)
            if index - 1 in capture:
                captured[index - 1] = residual.stream.to(dtype, copy=True)
            attention = self._attention(qkv, layer, index, one_pass)
            products[Stage.OUT].leave(residual, attention, layer.out)
            gated = products[Stage.GATE_UP].enter_gated(residual, layer.post_norm, layer.gate_up, eps)
            products[Stage.DOWN].leave(residual, gated, layer.down)
        hidden = residual.summed().to(dtype)
        captured[len(self._layers) - 1] = hidden
        return hidden, [captured[index] for index in capture]

    def _attention(self, qkv: torch.Tensor, layer: Layer, index: int, one_pass: DevicePass) -> torch.Tensor:
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        tables = self._rope.cos, self._rope.sin_signed
        query = operators.rotate_and_store(qkv, norms, tables, one_pass, index, self._spec)
        return operators.attend(query, one_pass, index, self._spec)
