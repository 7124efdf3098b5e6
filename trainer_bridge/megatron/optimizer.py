"""This module builds gradient buckets and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from slime_spec.config.tree import TrainerConfig
from trainer_bridge.megatron.host_adamw import HostAdamW
from trainer_bridge.megatron.model import PolicyModel


def wrap_model(model: PolicyModel, trainer: TrainerConfig) -> DistributedDataParallel:
    """Wrap in Megatron's DDP: gradients gather in one float32 buffer and are summed over data parallel ranks.

    With a distributed optimizer parameters are views of one buffer, too.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=trainer.use_distributed_optimizer,
    )
    return DistributedDataParallel(model.config, ddp_config, model)


def build_optimizer(ddp: DistributedDataParallel, trainer: TrainerConfig) -> MegatronOptimizer:
    """Return AdamW with gradient clipping (and float32 master weights where parameters are bfloat16).

    With ``use_distributed_optimizer`` each data parallel rank has the states of its share of the parameters; with
    ``optimizer_cpu_offload`` AdamW's moments are in host memory.
    """
    model_config: Any = ddp.config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=trainer.lr,
            weight_decay=trainer.weight_decay,
            adam_beta1=trainer.adam_beta1,
            adam_beta2=trainer.adam_beta2,
            adam_eps=trainer.adam_eps,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=trainer.use_distributed_optimizer,
            # Megatron reports the norm only where it clips; an infinite limit reports and leaves gradients alone.
            clip_grad=trainer.clip_grad or math.inf,
        ),
        [ddp],
    )
    if trainer.optimizer_cpu_offload:
        for each in optimizer.chained_optimizers:
            each.optimizer = HostAdamW(each.param_groups)
    for group in optimizer.param_groups:
        # Megatron's scheduler multiplies these in its step, and there is none here: norms and biases do not decay.
        group["weight_decay"] *= group["wd_mult"]
    model_config.finalize_model_grads_func = finalize_model_grads
    model_config.grad_scale_func = optimizer.scale_loss
    return optimizer


def gradient_buffers(ddp: DistributedDataParallel) -> Iterator[torch.Tensor]:
    return (buffer.grad_data for buffer in chain(ddp.buffers, ddp.expert_parallel_buffers))


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Yield what the optimizer updates (masters, or the parameters themselves) and its moments so far.

    AdamW's counts of steps are left out: they are numbers on the CPU.
    """
    for each in optimizer.chained_optimizers:
        for group in each.param_groups:
            yield from group["params"]
        for state in each.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def clip_gradients(optimizer: MegatronOptimizer) -> float:
    """Ready the gradients for ``step_with_ready_grads`` and clip them; returns their norm before, same on all ranks.

    This is the first half of Megatron's ``step``, which gives no chance to look at the norm before weights change.
    Experts that are spread over ranks have an optimizer of their own: the norm is of all gradients together.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    for each in optimizer.chained_optimizers:
        if parameters := each.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, each.config.clip_grad, norm)
    return norm


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
