"""Decoder blocks compute attention and MLP over the tokens of a pass and pass on the residual stream.

The blocks run in one native call where the CPU's kernels were built, in Triton's kernels where a pass lies on a GPU,
and in torch's operators otherwise; tests hold both to the operators. The kernels' residual stream is fp32 in either
dtype, torch's is rounded after every addition.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from rollout.embedded.attention import attend
from rollout.embedded.kernels.library import (
    DTYPE_CODES,
    BlocksStruct,
    BlockStruct,
    PassStruct,
    StreamStruct,
)
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.layer import Layer
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable, rotate
from slime_spec.checkpoints.model_spec import ModelSpec

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import DevicePass
    from rollout.embedded.cuda.fused_blocks import FusedBlocks


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x [.., width] over its root mean square, times ``weight`` [width]."""
    return F.rms_norm(x, weight.shape, weight, eps)


class GroupedWeights(Protocol):
    """Is what ``grouped_attention`` reads."""

    qkv: PackedLinear
    out: PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class GatedWeights(Protocol):
    """Is what ``gated_mlp`` reads."""

    gate_up: PackedLinear
    down: PackedLinear


def grouped_attention(
    inputs: torch.Tensor,
    part: GroupedWeights,
    spec: ModelSpec,
    index: int,
    angles: tuple[torch.Tensor, torch.Tensor],
    plan: AttentionPlan,
) -> torch.Tensor:
    """Return grouped-query attention [tokens, hidden] over ``inputs``, in torch's operators; writes layer ``index``."""
    heads, kv_heads, eps = spec.num_heads, spec.num_kv_heads, spec.rms_norm_eps
    qkv = part.qkv(inputs).view(-1, heads + 2 * kv_heads, spec.head_dim)
    qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if part.q_norm is not None and part.k_norm is not None:
        query, keys = rms_norm(qk[:, :heads], part.q_norm, eps), rms_norm(qk[:, heads:], part.k_norm, eps)
        qk = torch.cat([query, keys], dim=1)
    qk = rotate(qk, *angles)
    return part.out(attend(index, qk[:, :heads], qk[:, heads:], values, plan))


def gated_mlp(x: torch.Tensor, part: GatedWeights) -> torch.Tensor:
    """Return the SwiGLU MLP of x [tokens, hidden], in torch's operators."""
    gate, up = part.gate_up(x).chunk(2, dim=-1)
    return part.down(F.silu(gate) * up)


class BlockStack:
    """Runs successive plain blocks, all packed alike; block i keeps its keys and values in layer i of the plan's store.

    Example::

        hidden, (after_second,) = BlockStack(spec, rope, layers).run(x, plan, capture=(2,))
    """

    def __init__(self, spec: ModelSpec, rope: RopeTable, layers: Sequence[Layer]) -> None:
        self._spec, self.rope, self.layers = spec, rope, list(layers)
        native = layers[0].qkv.packing is Packing.NATIVE
        self._native = NativeBlocks(spec, rope, self.layers) if native else None

    @cached_property
    def _fused(self) -> FusedBlocks:
        from rollout.embedded.cuda.fused_blocks import FusedBlocks  # needs Triton, which a CPU does without

        return FusedBlocks(self._spec, self.rope, self.layers)

    def run(
        self,
        x: torch.Tensor,
        plan: AttentionPlan | DevicePass,
        capture: Sequence[int] = (),
        attention_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the residual stream [tokens, hidden] after the last block, and after each block of ``capture``.

        Writes the plan's KV store. ``attention_input`` [tokens, in of qkv] is what the first block's qkv reads instead
        of the norm of x. A device pass is computed by the GPU's kernels.
        """
        if not isinstance(plan, AttentionPlan):
            return self._fused.run(x, plan, capture, attention_input)
        if self._native is not None:
            return self._native.run(x, plan, capture, attention_input)
        captured: dict[int, torch.Tensor] = {}
        angles = self.rope.at(plan.positions)
        for index, layer in enumerate(self.layers):
            ready = attention_input if index == 0 else None
            inputs = self._norm(x, layer.input_norm) if ready is None else ready
            x = x + grouped_attention(inputs, layer, self._spec, index, angles, plan)
            x = x + gated_mlp(self._norm(x, layer.post_norm), layer)
            if index in capture:
                captured[index] = x
        return x, [captured[index] for index in capture]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._spec.rms_norm_eps)


class NativeBlocks:
    """Runs the blocks of a ``BlockStack`` in one native call; their weights are described to the kernels once.

    It keeps the weights alive. Each call describes its pass.
    """

    def __init__(self, spec: ModelSpec, rope: RopeTable, layers: Sequence[Layer]) -> None:
        self._kernels, self._layers, self._rope = layers[0].qkv.library, layers, rope
        self._hidden = spec.hidden_size
        self._blocks = (BlockStruct * len(layers))(*(_block(layer) for layer in layers))
        self._model = BlocksStruct(
            dtype=DTYPE_CODES[layers[0].qkv.dtype],
            hidden=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate=layers[0].down.num_inputs,
            num_blocks=len(layers),
            eps=spec.rms_norm_eps,
            cosines=rope.cos.data_ptr(),
            signed_sines=rope.sin_signed.data_ptr(),
            blocks=self._blocks,
        )

    def run(
        self, x: torch.Tensor, plan: AttentionPlan, capture: Sequence[int], attention_input: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See ``BlockStack.run``."""
        x = x.contiguous()
        ready = None if attention_input is None else attention_input.contiguous()
        hidden = torch.empty_like(x)
        features = torch.empty(x.shape[0], len(capture), self._hidden, dtype=x.dtype)
        captured = array("i", capture)
        spans, parents = _spans(plan)
        own = _kv_layers(plan.store, len(self._layers))
        prefix = _kv_layers(plan.prefixes, len(self._layers)) if plan.prefixes is not None else None
        one_pass = PassStruct(
            num_tokens=x.shape[0],
            num_spans=len(plan.spans),
            spans=_address(spans),
            parents=_address(parents),
            own=_address(own),
            prefix=_address(prefix) if prefix is not None else None,
        )
        stream = StreamStruct(
            x=x.data_ptr(),
            attention=None if ready is None else ready.data_ptr(),
            hidden=hidden.data_ptr(),
            features=features.data_ptr(),
            captured=_address(captured),
            num_captured=len(captured),
        )
        self._kernels.run(self._model, one_pass, stream)
        return hidden, list(features.unbind(1))


def _block(layer: Layer) -> BlockStruct:
    return BlockStruct(
        input_norm=layer.input_norm.data_ptr(),
        post_norm=layer.post_norm.data_ptr(),
        q_norm=None if layer.q_norm is None else layer.q_norm.data_ptr(),
        k_norm=None if layer.k_norm is None else layer.k_norm.data_ptr(),
        qkv=layer.qkv.struct,
        out=layer.out.struct,
        gate_up=layer.gate_up.struct,
        down=layer.down.struct,
    )


def _spans(plan: AttentionPlan) -> tuple[array[int], array[int]]:
    """Return ``Span`` structs of attention.h, flat, and the trees that they point into."""
    spans, parents, first_token = array("i"), array("i"), 0
    for span in plan.spans:
        offset = -1 if span.parents is None else len(parents)
        base = span.start if span.parents is None else span.tree_start
        spans.extend((span.row, span.start, span.count, base, span.prefix_row, span.prefix_len, first_token, offset))
        parents.extend(span.parents or ())
        first_token += span.count
    return spans, parents


def _kv_layers(store: KvStore, num_layers: int) -> array[int]:
    """Return ``KvLayer`` structs of attention.h, flat."""
    first = store.keys[0]
    row_bytes, head_bytes = first.stride(0) * first.itemsize, first.stride(1) * first.itemsize
    layers = array("q")
    for keys, values in zip(store.keys[:num_layers], store.values[:num_layers], strict=True):
        layers.extend((keys.data_ptr(), values.data_ptr(), row_bytes, head_bytes))
    return layers


def _address(items: array[int]) -> int:
    return items.buffer_info()[0]
