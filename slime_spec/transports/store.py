"""Processes that form a group of torch.distributed meet at a store."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world


def store_on(host: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Return a store that listens on a free port of ``host`` alone; by itself it would listen on every interface."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        port = listening.getsockname()[1]
        return dist.TCPStore(
            host, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def form_group(
    store: dist.Store, rank: int, world_size: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Meet the other members as SGLang's servers do: beside the default group, which this process need not have."""
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        backend_options=None,
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group
