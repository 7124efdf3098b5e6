"""A process joins torch.distributed and Megatron's parallel groups as one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from trainer_bridge.layout import Layout
from trainer_bridge.megatron.cpu_shim import cpu_shim


def join_process_groups(layout: Layout, rank: int, init_method: str, seed: int) -> None:
    """Meet the other ranks at ``init_method`` (``tcp://host:port``); gloo on CPU, nccl for CUDA tensors."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)  # each rank is given one visible GPU
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=init_method, rank=rank, world_size=layout.world_size
    )
    with cpu_shim():
        mpu.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        torch.manual_seed(seed)
        # Without CUDA there is no device generator to fork; Megatron's inference tracker forks nothing.
        tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not cuda, force_reset_rng=True)


def is_first_of_stage() -> bool:
    """Return whether this rank is its pipeline stage's first: it speaks for the stage where one must."""
    return bool(mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0)


def leave_process_groups() -> None:
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def process_groups(layout: Layout, rank: int, init_method: str, seed: int) -> Iterator[None]:
    join_process_groups(layout, rank, init_method, seed)
    try:
        yield
    finally:
        leave_process_groups()
