"""The one thread that the server's control calls run on, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class ControlThread:
    """An engine takes all but generate from one thread at a time; what has begun ends, also when its client leaves."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="http-control")

    async def run(self, command: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, command)

    def close(self) -> None:
        self._executor.shutdown()
