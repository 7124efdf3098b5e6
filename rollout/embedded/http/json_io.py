"""The server reads JSON bodies field by field, and middleware turns errors into JSON refusals.

Every complaint about a body is a ConfigError that names the field.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from hmac import compare_digest
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Middleware

from rollout.embedded.http.clients import CLIENTS, MAX_TEXT_BODY_BYTES, Busy
from rollout.embedded.http.described import FIELDS
from rollout.embedded.http.generations import EngineEnded
from rollout.embedded.loop_thread import LoopEnded, Refused
from slime_spec.errors import ConfigError, GenerationError, PushError
from slime_spec.files import parse_json, shortened
from slime_spec.suggest import did_you_mean

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Choice = TypeVar("Choice", bound=str)
LONGEST_NAME = 4096  # characters of a name: of a folder, a version, a request
MOST_TEXTS = 1024
MAX_COUNT = 2**53  # JSON numbers are whole up to here in every language
RETRY_AFTER_S = "1"
OPEN_PATHS = ("/health", "/metrics")  # probes and scrapers have no key
INVALID = "invalid_request_error"
FAILED = "the server failed; its log says why"
# Beyond this a body is parsed on a thread, so that other requests are not kept waiting.
LARGE_BODY_BYTES = 1 << 20


def as_object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(name, "must be a JSON object", value, "Send {...}.")
    return value


class Fields:
    """Reads the fields of one JSON object. ``null`` and an absent field both mean the default, as they do for SGLang.

    Example: ``Fields({"top_p": 0.9}, "sampling_params.").number("top_p", 1.0) == 0.9``
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        self._data, self._prefix = data, prefix

    def check_names(self, known: Collection[str]) -> None:
        """Refuse the first name that is none of ``known``, but with null: routers spell out what is absent."""
        names = sorted(known)
        for name, value in self._data.items():
            if name not in known and value is not None:
                short = shortened(name)
                raise ConfigError(
                    self._prefix + short,
                    "is not a field of this request",
                    value,
                    f"{did_you_mean(short, names)}The fields are {', '.join(names)}.",
                )

    def raw(self, name: str) -> Any:
        return self._data.get(name)

    def number(self, name: str, default: float) -> float:
        value = self._data.get(name)
        if value is None:
            return default
        if (number := finite(value)) is None:
            raise self._bad(name, "must be a finite number", value)
        return number

    def whole(self, name: str, default: int) -> int:
        value = self._data.get(name)
        if value is None:
            return default
        if not is_whole(value):
            raise self._bad(name, "must be a whole number", value)
        return int(value)

    def count(self, name: str, default: int, minimum: int = 1) -> int:
        """Return a number of things, which is never so large that it could not be added up and shown."""
        value = self.whole(name, default)
        if not minimum <= value <= MAX_COUNT:
            raise self._bad(name, f"must be a whole number from {minimum} to {MAX_COUNT}", value)
        return value

    def switch(self, name: str, default: bool = False) -> bool:
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(name, "must be true or false", value)
        return value

    def text(self, name: str, default: str = "", longest: int = LONGEST_NAME) -> str:
        value = self._data.get(name)
        if value is None:
            return default
        if not is_text(value) or len(value) > longest:
            raise self._bad(name, f"must be a text of at most {longest} characters", value)
        return value

    def choice(self, name: str, choices: Sequence[Choice], default: Choice) -> Choice:
        value = self.text(name, default)
        for choice in choices:
            if choice == value:
                return choice
        raise self._bad(name, f"must be one of {', '.join(choices)}", value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a text or a list of texts."""
        value = self._data.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > MOST_TEXTS or not all(map(is_text, values)):
            raise self._bad(name, f"must be a text or a list of at most {MOST_TEXTS} texts", value)
        return tuple(values)

    def wholes(self, name: str) -> tuple[int, ...]:
        value = self._data.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(map(is_whole, value)):
            raise self._bad(name, "must be a list of whole numbers", value)
        return tuple(value)

    def _bad(self, name: str, rule: str, value: object) -> ConfigError:
        return ConfigError(self._prefix + name, rule, value, "Correct the field or leave it out.")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Return whether the value is a string of whole characters: JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def finite(value: object) -> float | None:
    """Return the number as a float, None for what is no number or no finite one (JSON's may have any size)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


async def read_fields(request: web.Request, max_bytes: int = MAX_TEXT_BODY_BYTES) -> Fields:
    """Return the fields of the body, which must be a JSON object of the route's names; an empty body has none."""
    body = await request.app[CLIENTS].body(request, max_bytes)
    if not body:
        return Fields({})
    data = await asyncio.to_thread(parsed, body) if len(body) > LARGE_BODY_BYTES else parsed(body)
    fields = Fields(as_object(data, "body"))
    fields.check_names(FIELDS[request.path])
    return fields


def parsed(body: bytes) -> Any:
    remedy = "Send JSON, with Content-Type: application/json."
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("body", f"must be UTF-8 text: byte {error.start} is not", "?", remedy) from None
    return parse_json(text, "body", remedy=remedy, finite=True)


def written(answer: object) -> str:
    """Return the JSON of an answer; every answer is written here, and none can hold NaN, which is no JSON."""
    return json.dumps(answer, allow_nan=False)


def json_response(answer: object, status: int = 200) -> web.Response:
    return web.json_response(answer, status=status, dumps=written)


def busy(message: str) -> web.Response:
    """Answer that the same request may succeed later, as SGLang does when its queue is full."""
    response = refusal(503, message, "unavailable_error")
    response.headers["Retry-After"] = RETRY_AFTER_S
    return response


def refusal(status: int, message: str, kind: str = INVALID) -> web.Response:
    return json_response(error_body(status, message, kind), status)


def error_body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return ``{"error": {"message": ...}}``, the shape of OpenAI's errors and SGLang's; ``param`` names the field."""
    named = {} if param is None else {"param": param}
    return {"error": {"message": message, "type": kind, **named, "code": status}}


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 400 for errors that the client can correct, 503 for what the server refuses now; never a traceback.

    An answer that has started cannot become another one: its connection is closed, so that it does not look complete.
    """
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client is gone
    except ConfigError as error:
        return json_response(error_body(400, str(error), INVALID, error.setting), 400)
    except PushError as error:
        return refusal(400, str(error))
    except (Busy, Refused) as error:
        return busy(str(error))
    except (EngineEnded, LoopEnded) as error:
        return refusal(503, str(error), "unavailable_error")
    except GenerationError as error:
        return refusal(500, str(error), "internal_error")
    except web.HTTPException as error:
        return refusal(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception:
        if request.writer.output_size:
            raise  # aiohttp logs it and closes the connection
        logger.exception("request failed method=%s path=%s", request.method, request.path)
        return refusal(500, FAILED, "internal_error")


def api_key_required(api_key: str) -> Middleware:
    """Return middleware: 401 without ``Authorization: Bearer KEY``; probes and metrics need none, as with SGLang."""

    @web.middleware
    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        allowed = scheme.lower() == "bearer" and compare_digest(_key_bytes(key.strip()), _key_bytes(api_key))
        if allowed or request.path.startswith(OPEN_PATHS):
            return await handler(request)
        return refusal(401, "send Authorization: Bearer KEY with this server's API key", "authentication_error")

    return checked


def _key_bytes(key: str) -> bytes:
    return key.encode(errors="surrogateescape")  # as aiohttp decodes the bytes of a header
