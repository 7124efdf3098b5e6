"""Random decoder blocks, KV stores and passes over them: what tests of the forward pass are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rollout.embedded.blocks import BlockStack
from rollout.embedded.kernels.library import Kernels
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.layer import Layer
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.plan import AttentionPlan, RowSpan, make_plan
from rollout.embedded.rope import RopeTable
from slime_spec.checkpoints.model_spec import ModelSpec

CPU = torch.device("cpu")


def block_spec(heads: int, kv_heads: int, head_dim: int, hidden: int = 48, intermediate: int = 80) -> ModelSpec:
    return ModelSpec.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": 8,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
        }
    )


@dataclass(frozen=True)
class RandomBlocks:
    """Weights in fp32 from which stacks of any dtype and packing are made; ``dtype`` holds all of them exactly."""

    spec: ModelSpec
    weights: list[dict[str, torch.Tensor]]

    @classmethod
    def make(cls, spec: ModelSpec, dtype: torch.dtype, biased: bool = False, normed: bool = False) -> RandomBlocks:
        generator = torch.Generator().manual_seed(0)
        width = spec.num_heads * spec.head_dim
        qkv = width + 2 * spec.num_kv_heads * spec.head_dim

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        weights = []
        for _ in range(spec.num_layers):
            layer = {
                "qkv": 3 * draw(qkv, spec.hidden_size),
                "out": draw(spec.hidden_size, width),
                "gate_up": 2 * draw(2 * spec.intermediate_size, spec.hidden_size),
                "down": draw(spec.hidden_size, spec.intermediate_size),
                "input_norm": 1 + draw(spec.hidden_size),
                "post_norm": 1 + draw(spec.hidden_size),
            }
            if biased:
                layer["bias"] = draw(qkv)
            if normed:
                layer |= {"q_norm": 1 + draw(spec.head_dim), "k_norm": 1 + draw(spec.head_dim)}
            weights.append({name: tensor.to(dtype).float() for name, tensor in layer.items()})
        return cls(spec, weights)

    def stack(self, dtype: torch.dtype, packing: Packing, library: Kernels | None = None) -> BlockStack:
        layers = []
        for weights in self.weights:
            typed = {name: tensor.to(dtype) for name, tensor in weights.items()}
            bias = typed.pop("bias", None)
            parts: dict[str, Any] = {
                name: PackedLinear(tensor, bias if name == "qkv" else None, packing, library)
                if tensor.dim() == 2
                else tensor
                for name, tensor in typed.items()
            }
            layers.append(Layer(**parts))
        return BlockStack(self.spec, RopeTable(self.spec, 1024, dtype, CPU), layers)


@dataclass(frozen=True)
class RandomCache:
    """An own and a prefix store full of random keys and values, so that a token that sees too much is noticed.

    ``source_dtype`` holds all of them exactly.
    """

    spec: ModelSpec
    source_dtype: torch.dtype
    rows: int = 5
    capacity: int = 340

    def plan(self, spans: Sequence[RowSpan], dtype: torch.dtype) -> AttentionPlan:
        """A plan over fresh stores with the same numbers every time."""
        stores = []
        generator = torch.Generator().manual_seed(1)
        for rows, capacity in ((self.rows, self.capacity), (3, 64)):
            store = KvStore(self.spec, dtype, CPU)
            store.resize(rows, capacity)
            for tensor in (*store.keys, *store.values):
                tensor.copy_(torch.randn(tensor.shape, generator=generator).to(self.source_dtype))
            stores.append(store)
        group = self.spec.num_heads // self.spec.num_kv_heads
        prefixes = stores[1] if any(span.prefix_row >= 0 for span in spans) else None
        return make_plan(stores[0], spans, group, dtype, CPU, prefixes)


def inputs(spec: ModelSpec, spans: Sequence[RowSpan], dtype: torch.dtype) -> torch.Tensor:
    """The residual stream that enters the first block, one row per token."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sum(span.count for span in spans), spec.hidden_size, generator=generator).to(dtype)
