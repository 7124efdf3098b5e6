"""The access log has one line for every request: what was asked, by whom, how it ended, and how long it took."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from time import perf_counter

from aiohttp import web

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LONGEST_PATH = 200
WITHOUT_ANSWER = "closed"  # the client went, or was cut off, before its answer was whole


@web.middleware
async def access_logged(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log a request when its answer is whole; no header and no query is shown, for keys may stand there."""
    start_s = perf_counter()
    status: int | str = WITHOUT_ANSWER
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        logger.info(
            "request method=%s path=%s status=%s seconds=%.3f client=%s",
            request.method,
            request.rel_url.raw_path[:LONGEST_PATH],
            status,
            perf_counter() - start_s,
            request.remote,
        )
