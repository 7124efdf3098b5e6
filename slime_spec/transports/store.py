"""Processes that form a group of torch.distributed meet at a store."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist


def store_on(host: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Return a store that listens on a free port of ``host`` alone; by itself it would listen on every interface."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        port = listening.getsockname()[1]
        return dist.TCPStore(
            host, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
        )
