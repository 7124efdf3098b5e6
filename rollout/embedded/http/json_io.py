"""JSON in and out of a request, and what a refusal looks like."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from rollout.embedded.http.fields import bad_field

FAILED = "the server failed; its log says why"
# Beyond this a body is parsed on a thread, so that other requests are not kept waiting.
LARGE_BODY_BYTES = 1 << 20


async def read_json(request: web.Request, default: object = None) -> Any:
    """The body's JSON; ``default`` stands for an empty body where that may be."""
    body = await request.read()
    if not body and default is not None:
        return default
    try:
        if len(body) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(json.loads, body)
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
        raise bad_field("body", f"must be JSON: {error}", "?", "Send Content-Type: application/json.") from None


def refusal(status: int, message: str, kind: str = "invalid_request_error") -> web.Response:
    return web.json_response(error_body(status, message, kind), status=status)


def error_body(status: int, message: str, kind: str) -> dict[str, Any]:
    """``{"error": {"message": ...}}``, SGLang's shape."""
    return {"error": {"message": message, "type": kind, "code": status}}
