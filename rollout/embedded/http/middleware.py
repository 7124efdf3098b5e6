"""What stands before every handler: the key, and errors as JSON."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from hmac import compare_digest

from aiohttp import web
from aiohttp.typedefs import Middleware

from rollout.embedded.http.generations import EngineEnded
from rollout.embedded.http.json_io import FAILED, refusal
from rollout.embedded.loop_thread import LoopEnded, Refused
from slime_spec.errors import ConfigError, PushError

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """400 for what the client can correct, 503 for what the engine will not do now; never a traceback.

    An answer that has begun cannot become another one: its connection is closed, so that it does not look complete.
    """
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client is gone
    except (ConfigError, PushError) as error:
        return refusal(400, str(error))
    except (Refused, EngineEnded, LoopEnded) as error:
        return refusal(503, str(error), "unavailable_error")
    except web.HTTPException as error:
        return refusal(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception:
        if request.writer.output_size:
            raise  # aiohttp logs it and closes the connection
        logger.exception("request failed method=%s path=%s", request.method, request.path)
        return refusal(500, FAILED, "internal_error")


def api_key_required(api_key: str) -> Middleware:
    """401 without ``Authorization: Bearer KEY``; probes of health need none, as with SGLang."""

    @web.middleware
    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        allowed = scheme.lower() == "bearer" and compare_digest(key.strip().encode(), api_key.encode())
        if allowed or request.path.startswith("/health"):
            return await handler(request)
        return refusal(401, "send Authorization: Bearer KEY with this server's API key", "authentication_error")

    return checked
