"""Decoder blocks in one native call: weights described once, a pass described per call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rollout.embedded.kernels.library import (
    DTYPE_CODES,
    BlocksStruct,
    BlockStruct,
    PassStruct,
    StreamStruct,
)
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import AttentionPlan
from slime_spec.checkpoints.model_spec import ModelSpec

if TYPE_CHECKING:
    from rollout.embedded.blocks import Layer
    from rollout.embedded.rope import RopeTable


class NativeBlocks:
    """What ``BlockStack`` runs where its weights are packed for the kernels; it keeps them alive."""

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
    """``Span`` structs of attention.h, flat, and the trees they point into."""
    spans, parents, first_token = array("i"), array("i"), 0
    for span in plan.spans:
        offset = -1 if span.parents is None else len(parents)
        base = span.start if span.parents is None else span.tree_start
        spans.extend((span.row, span.start, span.count, base, span.prefix_row, span.prefix_len, first_token, offset))
        parents.extend(span.parents or ())
        first_token += span.count
    return spans, parents


def _kv_layers(store: KvStore, num_layers: int) -> array[int]:
    """``KvLayer`` structs of attention.h, flat."""
    first = store.keys[0]
    row_bytes, head_bytes = first.stride(0) * first.itemsize, first.stride(1) * first.itemsize
    layers = array("q")
    for keys, values in zip(store.keys[:num_layers], store.values[:num_layers], strict=True):
        layers.extend((keys.data_ptr(), values.data_ptr(), row_bytes, head_bytes))
    return layers


def _address(items: array[int]) -> int:
    return items.buffer_info()[0]
