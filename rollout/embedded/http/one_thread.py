"""A thread for what must not keep the server's event loop waiting, and must run one thing at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class OneThread:
    """Runs commands in the order in which they came; what has begun ends, also when its client leaves."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, command: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, command)

    def close(self) -> None:
        self._executor.shutdown()
