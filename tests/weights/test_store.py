"""The process group of a push meets at a store, which nobody outside the push's network reaches."""

from __future__ import annotations

from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from slime_spec.transports.store import store_on


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_store_of_a_push_listens_on_its_host_alone(host: str) -> None:
    store = store_on(host, 2, timedelta(seconds=20))
    mine = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert [address.ip for address in mine if address.port == store.port] == [host]
    other = dist.TCPStore(host, store.port, 2, is_master=False, timeout=timedelta(seconds=20), wait_for_workers=False)
    store.set("asked", "answered")
    assert other.get("asked") == b"answered"
