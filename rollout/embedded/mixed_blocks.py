"""Mixed blocks have latent attention, experts or partly rotated heads; torch's operators compute them on any device.

    x ── norm ── grouped or latent attention ── + ── norm ── MLP or experts ── +

Latent attention is computed expanded: the cache holds a key and a value for every head, values padded with zeros to the
keys' width, so that the cache and ``attend`` are those of plain blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rollout.embedded.attention import attend
from rollout.embedded.blocks import BlockStack, gated_mlp, grouped_attention, rms_norm
from rollout.embedded.experts import ExpertMlps, GatedMlp
from rollout.embedded.layer import Layer, Weights
from rollout.embedded.linear import PackedLinear
from rollout.embedded.plan import AttentionPlan
from rollout.embedded.rope import RopeTable, rotate
from slime_spec.checkpoints.block_parts import LATENT_EPS
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import Yarn

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import DevicePass


@dataclass
class GroupedLinears(Weights):
    """Holds the weights of grouped-query attention; q, k and v are one matrix."""

    qkv: PackedLinear
    out: PackedLinear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass
class LatentLinears(Weights):
    """Holds the weights of latent attention: down to the latents and up to all heads.

    Without a latent of queries ``q_up`` reads the hidden state.
    """

    q_up: PackedLinear
    kv_down: PackedLinear
    kv_norm: torch.Tensor
    kv_up: PackedLinear
    out: PackedLinear
    q_down: PackedLinear | None = None
    q_norm: torch.Tensor | None = None


@dataclass
class MixedLayer(Weights):
    """Holds a block's weights by its parts."""

    input_norm: torch.Tensor
    attention: GroupedLinears | LatentLinears
    post_norm: torch.Tensor
    mlp: GatedMlp | ExpertMlps


AnyLayer = Layer | MixedLayer


class MixedBlocks:
    """Runs successive mixed blocks; block i keeps its keys and values in layer i of the plan's store."""

    def __init__(self, spec: ModelSpec, rope: RopeTable, layers: Sequence[MixedLayer]) -> None:
        self._spec, self.rope, self.layers = spec, rope, list(layers)

    def run(
        self,
        x: torch.Tensor,
        plan: AttentionPlan | DevicePass,
        capture: Sequence[int] = (),
        attention_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See ``BlockStack.run``."""
        assert isinstance(plan, AttentionPlan), "a GPU's kernels compute plain blocks alone"
        captured: dict[int, torch.Tensor] = {}
        angles = self.rope.at(plan.positions)
        for index, layer in enumerate(self.layers):
            ready = attention_input if index == 0 else None
            inputs = self._norm(x, layer.input_norm) if ready is None else ready
            x = x + self._attention(inputs, layer.attention, index, angles, plan)
            x = x + self._mlp(self._norm(x, layer.post_norm), layer.mlp, index, plan)
            if index in capture:
                captured[index] = x
        return x, [captured[index] for index in capture]

    def _attention(
        self,
        inputs: torch.Tensor,
        part: GroupedLinears | LatentLinears,
        index: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
    ) -> torch.Tensor:
        if isinstance(part, GroupedLinears):
            return grouped_attention(inputs, part, self._spec, index, angles, plan)
        return self._latent_attention(inputs, part, index, angles, plan)

    def _mlp(self, x: torch.Tensor, part: GatedMlp | ExpertMlps, index: int, plan: AttentionPlan) -> torch.Tensor:
        if isinstance(part, GatedMlp):
            return gated_mlp(x, part)
        out, chosen = part(x)
        if index in plan.store.experts:
            plan.store.write_experts(index, *plan.places, chosen)
        return out

    def _latent_attention(
        self,
        inputs: torch.Tensor,
        part: LatentLinears,
        index: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
    ) -> torch.Tensor:
        latent, heads, (cos, sin) = self._spec.latent, self._spec.num_heads, angles
        assert latent is not None, "the block has latent attention"
        reads = inputs
        if part.q_down is not None and part.q_norm is not None:
            reads = rms_norm(part.q_down(inputs), part.q_norm, LATENT_EPS)
        query = part.q_up(reads).view(-1, heads, latent.key_dim)
        low, shared = part.kv_down(inputs).split([latent.latent_rank, latent.rope_dim], dim=-1)
        raised = part.kv_up(rms_norm(low, part.kv_norm, LATENT_EPS)).view(len(inputs), heads, -1)
        keys, values = raised.split([latent.nope_dim, latent.value_dim], dim=-1)
        turned_key = rotate(shared.unsqueeze(1), cos, sin, latent.interleaved).expand(-1, heads, -1)
        still, turning = query.split([latent.nope_dim, latent.rope_dim], dim=-1)
        query = torch.cat([still, rotate(turning, cos, sin, latent.interleaved)], dim=-1) * self._score_factor
        keys = torch.cat([keys, turned_key], dim=-1)
        out = attend(index, query, keys, F.pad(values, (0, latent.key_dim - latent.value_dim)), plan)
        return part.out(out.view(-1, heads, latent.key_dim)[..., : latent.value_dim].flatten(1))

    @property
    def _score_factor(self) -> float:
        scaling = self._spec.rope_scaling
        return scaling.score_factor if isinstance(scaling, Yarn) else 1.0

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._spec.rms_norm_eps)


def stack_of(spec: ModelSpec, rope: RopeTable, layers: Sequence[AnyLayer]) -> BlockStack | MixedBlocks:
    """Return what runs these blocks, which are all plain or all mixed."""
    if spec.has_plain_blocks:
        return BlockStack(spec, rope, plain(layers))
    return MixedBlocks(spec, rope, [layer for layer in layers if isinstance(layer, MixedLayer)])


def plain(layers: Sequence[AnyLayer]) -> list[Layer]:
    """Return layers of which all are plain, as such."""
    assert all(isinstance(layer, Layer) for layer in layers), "some blocks are mixed"
    return [layer for layer in layers if isinstance(layer, Layer)]
