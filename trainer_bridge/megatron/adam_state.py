"""Adam's state in a checkpoint has the shapes of the parameters, however the run that wrote it had split it.

    optimizer.state.exp_avg.NAME, optimizer.state.exp_avg_sq.NAME     float32, as the parameter NAME
    optimizer.state.fp32_param.NAME                                   the float32 master of a bfloat16 parameter

A distributed optimizer's shards are joined on the first data parallel rank when they are saved, and each rank takes its
own when they are loaded: a checkpoint resumes with any layout, with and without the distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from trainer_bridge.megatron.host_adamw import HostAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"
OnHost = Callable[[torch.Tensor], torch.Tensor]
Place = Any  # a ShardedTensor, or the factory of several, with a parameter or a part of its state as its data


@dataclass(frozen=True)
class _Shard:
    """Holds the part of a parameter that this rank's optimizer updates: elements ``start`` to ``stop``, flattened."""

    main: torch.Tensor
    start: int
    stop: int


def to_save(model_state: dict[str, Any], optimizer: Any, on_host: OnHost) -> dict[int, dict[str, Place]]:
    """Return the state to save; empty on ranks whose shards another has joined. Collective over data parallel ranks."""
    saved = {}
    for index, place in enumerate(_places(model_state)):
        owner = _owner(optimizer, place.data)
        shard, names = _shard(owner, place.data), _names(place.data)
        parts = {} if shard is None else {name: on_host(_tensor(owner, shard.main, name)) for name in names}
        is_first = True
        if isinstance(owner, DistributedOptimizer):
            group = _copies(place.data)
            parts = {name: _joined(parts.get(name), shard, place.data.shape, group) for name in names}
            is_first = group.rank() == 0
        if is_first:
            saved[index] = {name: _at(place, name, part) for name, part in parts.items()}
    return saved


def to_load(model_state: dict[str, Any]) -> dict[int, dict[str, Place]]:
    """Return what a checkpoint must give, with room for it on the host."""
    return {
        index: {
            name: _at(place, name, torch.empty(place.data.shape, dtype=torch.float32)) for name in _names(place.data)
        }
        for index, place in enumerate(_places(model_state))
    }


def take(
    model_state: dict[str, Any], optimizer: Any, loaded: dict[int, dict[str, torch.Tensor]], num_steps: int
) -> None:
    """Fill the optimizer with a checkpoint's state; hyperparameters stay those of this run's configuration."""
    for index, place in enumerate(_places(model_state)):
        owner = _owner(optimizer, place.data)
        shard = _shard(owner, place.data)
        if shard is None:
            continue
        parts = {name: whole.flatten()[shard.start : shard.stop] for name, whole in loaded[index].items()}
        if MASTER in parts:
            shard.main.data.copy_(parts[MASTER].view_as(shard.main))
        device = "cpu" if isinstance(owner.optimizer, HostAdamW) else shard.main.device
        owner.optimizer.state[shard.main] = {
            "step": torch.tensor(float(num_steps)),
            **{name: parts[name].view_as(shard.main).to(device, copy=True) for name in MOMENTS},
        }


@torch.no_grad()
def fill_masters(optimizer: Any, weights: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give the float32 masters of bfloat16 parameters, each beside its exact values, what rounding has taken from them.

    Megatron makes masters of the rounded parameters, in the middle of what rounds to them: a weight of 0.13 would then
    stay as it is until its updates add up to 5e-4, which may be all that a run moves it. Parameters are left alone.
    """
    for weight, exact in weights:
        shard = None if weight.dtype == torch.float32 else _shard(_owner(optimizer, weight), weight)
        if shard is not None:
            shard.main.copy_(exact.flatten()[shard.start : shard.stop].view_as(shard.main))


def _owner(optimizer: Any, parameter: torch.Tensor) -> Any:
    """Return the optimizer that updates the parameter: of several the last one has the experts."""
    return optimizer.chained_optimizers[-1 if _is_spread(parameter) else 0]


def _copies(parameter: torch.Tensor) -> dist.ProcessGroup:
    """Return the ranks that hold the same part of the model as this one, as far as the parameter goes."""
    return mpu.get_expert_data_parallel_group() if _is_spread(parameter) else mpu.get_data_parallel_group()


def _is_spread(parameter: torch.Tensor) -> bool:
    """Return whether the parameter is of experts that are spread over ranks; Megatron marks them for the others."""
    return not getattr(parameter, "allreduce", True)


def _places(model_state: dict[str, Any]) -> Iterator[Place]:
    """Yield where each parameter of the model is in a checkpoint, with the parameter as its data.

    Their keys are not unique: layers are one tensor in a checkpoint.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return (each for each in nested_values(tensors) if isinstance(each.data, torch.nn.Parameter))


def _names(parameter: torch.Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def _shard(optimizer: Any, parameter: torch.Tensor) -> _Shard | None:
    """Return what this rank's optimizer updates of the parameter; None where that is other ranks' alone."""
    if not isinstance(optimizer, DistributedOptimizer):
        return _Shard(getattr(parameter, "main_param", parameter), 0, parameter.numel())
    if parameter not in optimizer.model_param_group_index_map:
        return None
    group, index = optimizer.model_param_group_index_map[parameter]
    own = optimizer._get_model_param_range_map(parameter)["param"]
    return _Shard(optimizer.optimizer.param_groups[group]["params"][index], own.start, own.end)


def _tensor(optimizer: Any, main: torch.Tensor, name: str) -> torch.Tensor:
    tensor: torch.Tensor = main.detach() if name == MASTER else optimizer.optimizer.state[main][name]
    return tensor


def _joined(
    part: torch.Tensor | None, shard: _Shard | None, shape: torch.Size, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the whole tensor on the group's first rank, where each rank has put its own elements."""
    whole = torch.zeros(shape, dtype=torch.float32)
    if part is not None and shard is not None:
        whole.view(-1)[shard.start : shard.stop] = part.cpu().flatten()
    dist.reduce(whole, dist.get_global_rank(group, 0), group=group)
    return whole


def _at(place: Place, name: str, tensor: torch.Tensor) -> Place:
    """Return the place in a checkpoint of this part of a parameter's state."""
    key = f"optimizer.state.{name}.{place.key}"
    if isinstance(place, ShardedTensorFactory):
        return replace(place, key=key, data=tensor)
    return replace(place, key=key, data=tensor, dtype=tensor.dtype)
