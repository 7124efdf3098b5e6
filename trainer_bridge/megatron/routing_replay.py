"""RoutingReplay makes a policy's routers choose the experts that the engine chose.

    PackedSegments.experts [T, layers, chosen] ── each call of a layer ──► its router: this rank's rows, this layer

Megatron's RouterReplay keeps what to replay in its instances, of which the process has one list: the first of several
microbatches whose backward passes come later (pipelines, recomputed layers) would find the experts of the last. Here a
layer is given the experts with the rows that they belong to, so that every call has its own, a recomputed one as well,
and a reference model in the same process routes by itself. Megatron's router then weighs the given experts: by its own
scores, through which the gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from slime_spec.checkpoints.block_parts import Experts
from trainer_bridge.megatron.attention import PackedSegments
from trainer_bridge.megatron.model import PolicyModel
from trainer_bridge.microbatch import OWN_CHOICE

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RoutingReplay:
    """Makes the routers of one rank replay, and counts over all ranks how often they would have chosen otherwise."""

    def __init__(self, model: PolicyModel, experts: Experts) -> None:
        config = model.config
        places = {layer: place for place, layer in enumerate(experts.layers(config.num_layers))}
        offset = get_transformer_layer_offset(config)
        self._routers: list[RouterChoice] = []
        for index, layer in enumerate(model.decoder.layers):
            if not isinstance(layer.mlp, MoELayer):
                continue
            router = RouterChoice(places[offset + index], config.sequence_parallel)
            layer.mlp.router.router_replay = router
            layer.register_forward_pre_hook(router.before_layer, with_kwargs=True)
            self._routers.append(router)

    def disagreement(self) -> float | None:
        """Return the share of choices replayed since the last call that the routers would have made otherwise.

        A collective over all ranks, each of which has other rows or other layers; None where nothing was replayed.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for router in self._routers:
            counts += router.counts.to(device)
            router.counts = torch.zeros(2, dtype=torch.float64)
        dist.all_reduce(counts)
        num_replayed, num_others = counts.tolist()
        return num_others / num_replayed if num_replayed else None


class RouterChoice:
    """Takes the place of Megatron's RouterReplay in one router; ``place`` is its layer's among those with experts."""

    def __init__(self, place: int, sequence_parallel: bool) -> None:
        self._place, self._sequence_parallel = place, sequence_parallel
        self._given: torch.Tensor | None = None  # [rows, chosen], of the layer's call in progress
        self.counts = torch.zeros(2, dtype=torch.float64)  # choices replayed, and of them other than the router's

    def before_layer(self, layer: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Note the experts of the rows that the layer is called with."""
        packed: PackedSegments = kwargs["packed_seq_params"]
        given = None if packed.experts is None else packed.experts[:, self._place]
        if given is not None and self._sequence_parallel:
            given = given.chunk(mpu.get_tensor_model_parallel_world_size())[mpu.get_tensor_model_parallel_rank()]
        self._given = given

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the given experts' scores and ids, both [rows, topk]; a row that was given none has its own choice."""
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._given is None:
            return own_scores, own
        given = self._given.long()
        is_given = given[:, 0] != OWN_CHOICE
        differs = (given.sort(dim=-1).values != own.sort(dim=-1).values).any(dim=-1) & is_given
        self.counts = self.counts.to(scores.device) + torch.stack([is_given.sum(), differs.sum()])
        chosen = torch.where(is_given.unsqueeze(1), given, own)
        return scores.gather(1, chosen), chosen
