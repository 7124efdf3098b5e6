"""Receivers of ``bench device``'s part ipc that fail; a process of their own imports this file, so it is light."""

import os
import time
from multiprocessing.connection import Connection

from slime_spec.bench.device.ipc import COPIED, SUM


def dies(connection: Connection, num_bytes: int, device: str) -> None:
    connection.send(COPIED)
    connection.recv()
    os._exit(7)


def hangs(connection: Connection, num_bytes: int, device: str) -> None:
    connection.send(COPIED)
    time.sleep(600)


def loses(connection: Connection, num_bytes: int, device: str) -> None:
    """Answer every piece without copying it."""
    connection.send(COPIED)
    while True:
        try:
            connection.send(0 if connection.recv() == SUM else COPIED)
        except (EOFError, OSError):
            return
