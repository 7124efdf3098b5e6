"""verl's decorator of methods that a caller may await or call (verl/utils/ray_utils.py, v0.7.1)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def auto_await(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        coroutine = method(*args, **kwargs)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(coroutine)
        frame = inspect.currentframe()
        assert frame is not None
        caller = frame.f_back
        assert caller is not None
        assert caller.f_code.co_flags & inspect.CO_COROUTINE, "a caller in a loop that does not await"
        return coroutine

    return called
