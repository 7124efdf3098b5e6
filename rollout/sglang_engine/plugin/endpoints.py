"""The plug-in's own paths on a server, under /slime_spec/: draft_weights, checksums, canary.

They answer JSON: 200 with ``success`` true, or 400 with false and a ``message``. With --admin-api-key they take that
key, as SGLang's own paths that change weights do.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from rollout.sglang_engine.plugin import draft_push
from rollout.sglang_engine.plugin.draft_safe import MANAGER, MESSAGES
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.sessions import Messages, sglang_messages
from rollout.sglang_engine.plugin.state import STATE, Detail, State

PREFIX = "/slime_spec/"
SERVER = "sglang.srt.entrypoints.http_server"
# What SGLang puts before the names of a draft's tensors, from its roles "draft" and "draft_step_0".
DRAFTS = ("draft.", "draft_step_")
SIDES = ("target", "draft", "all")
Answer = Callable[[Any, dict[str, Any]], Awaitable[dict[str, Any]]]
Mark = Callable[[Any], Any]  # marks a function by who may call it


class Refused(ValueError):
    """A request that is answered with 400 and these words."""


class Paths:
    """The answers of one server's paths."""

    def __init__(self, state: State = STATE, messages: Messages = sglang_messages) -> None:
        self._state, self._messages = state, messages
        self.shown: dict[str, str | None] = {"draft_version": None}  # of the last push
        self.answers: dict[str, Answer] = {
            "draft_weights": self.draft_weights,
            "checksums": self.checksums,
            "canary": self.canary,
        }

    async def draft_weights(self, manager: Any, body: dict[str, Any]) -> dict[str, Any]:
        """Replaces the draft's weights by a folder's, or by serialized tensors as SGLang's own update takes them."""
        if draft_push.NAME not in self._state.active:
            raise Refused(f"{draft_push.NAME} is not active: {self._state.inactive.get(draft_push.NAME)}")
        asked = self._messages().UpdateWeightsFromTensorReqInput(**push_fields(body))
        # SGLang's own method: this plug-in's hook around it is for updates of the target.
        update = inspect.unwrap(type(manager).update_weights_from_tensor)
        try:
            is_updated, message = await update(manager, asked, None)
        except AssertionError as error:  # SGLang's word for a server with data-parallel replicas
            raise Refused(str(error)) from error
        if not is_updated:
            raise Refused(message)
        version = body.get("draft_version")
        self.shown["draft_version"] = None if version is None else str(version)
        return {"message": message, **self.shown}

    async def checksums(self, manager: Any, body: dict[str, Any]) -> dict[str, Any]:
        """Gives each tensor's checksum, of one side or of both, as /weights_checker of SGLang 0.5.21 and newer does."""
        side = body.get("selector", "all")
        if side not in SIDES:
            raise Refused(f"selector must be one of {', '.join(SIDES)}")
        asked = self._messages().CheckWeightsReqInput(action="checksum")
        is_summed, message, ranks, _ = await manager.check_weights(asked, None)
        if not is_summed:
            raise Refused(message)
        return {"message": message, "ranks": [of_side(rank, side) for rank in ranks or []]}

    async def canary(self, manager: Any, body: dict[str, Any]) -> dict[str, Any]:
        """Generates a fixed prompt greedily with drafts and has the target judge it."""
        from rollout.sglang_engine.plugin import canary

        try:
            asked = canary.Asked.read(body, manager.model_config.vocab_size)
            return (await canary.run(manager, asked, messages=self._messages)).shown()
        except canary.NoCanary as error:
            raise Refused(str(error)) from error


def push_fields(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of SGLang's request by which the schedulers know a push of the draft."""
    known = {"path", "serialized_named_tensors", "draft_version", "flush_cache"}
    if unknown := sorted(body.keys() - known):
        raise Refused(f"unknown: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    path, tensors = body.get("path"), body.get("serialized_named_tensors")
    if (path is None) == (tensors is None):
        raise Refused("send either path, the folder of a draft, or serialized_named_tensors")
    if path is not None and not (isinstance(path, str) and path):
        raise Refused("path must be the folder of a draft")
    if tensors is not None and not (isinstance(tensors, list) and tensors and all(isinstance(t, str) for t in tensors)):
        raise Refused("serialized_named_tensors must be a list of base64 texts")
    return {
        "serialized_named_tensors": tensors or [],
        "load_format": draft_push.MARK if path is None else f"{draft_push.MARK}={path}",
        "flush_cache": bool(body.get("flush_cache", True)),
    }


def of_side(rank: dict[str, Any], side: str) -> dict[str, Any]:
    """Returns a rank's sums of one side, with their overall sum as SGLang makes it."""
    if side == "all":
        return rank
    sums = {name: each for name, each in rank["checksums"].items() if name.startswith(DRAFTS) == (side == "draft")}
    overall = hashlib.sha256("".join(name + sums[name] for name in sorted(sums)).encode()).hexdigest()
    return {**rank, "checksums": sums, "per_gpu_checksum": overall}


def add_paths(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Adds the paths once the server's manager is made; an engine without HTTP has no server to add them to."""
    server = sys.modules.get(SERVER)
    if server is None:
        return
    auth = importlib.import_module("sglang.srt.utils.auth")
    server.app.router.routes += routes(manager, PATHS, auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL))


def routes(manager: Any, paths: Paths, mark: Mark) -> list[Any]:
    """Returns the routes of starlette, which SGLang serves with; it asks for a key by a function's mark."""
    route = importlib.import_module("starlette.routing").Route
    return [
        route(PREFIX + name, mark(responder(manager, answer)), methods=["POST"])
        for name, answer in paths.answers.items()
    ]


def responder(manager: Any, answer: Answer) -> Callable[[Any], Awaitable[Any]]:
    json_response = importlib.import_module("starlette.responses").JSONResponse

    async def respond(request: Any) -> Any:
        try:
            body = await request.json() if await request.body() else {}
            if not isinstance(body, dict):
                raise Refused("the body must be a JSON object")
            return json_response({"success": True, **await answer(manager, body)})
        except ValueError as error:  # Refused, and a body that is no JSON
            return json_response({"success": False, "message": str(error)}, status_code=400)

    return respond


def used(*parameters: str) -> tuple[tuple[Hook, ...], tuple[Name, ...]]:
    """The hook, around a manager that is made with these parameters too, and the other names."""
    made = Name(f"{MANAGER}.__init__", ("self", "server_args", "port_args", *parameters))
    generated = (
        *("rid", "input_ids", "sampling_params", "return_logprob"),
        *("logprob_start_len", "top_logprobs_num", "extra_key"),
    )
    needs = (
        Name(f"{MANAGER}.generate_request", ("self", "obj", "request")),
        Name(f"{MANAGER}.check_weights", ("self", "obj", "request")),
        Name(f"{MANAGER}.update_weights_from_tensor", ("self", "obj", "request")),
        Name(f"{MESSAGES}.CheckWeightsReqInput", members=("action",)),
        Name(f"{MESSAGES}.GenerateReqInput", members=generated),
        Name(MANAGER, attributes=("is_pause", "model_config")),
        Name("sglang.srt.utils.auth.auth_level", ("level",)),
        Name("sglang.srt.utils.auth.AuthLevel", members=("ADMIN_OPTIONAL",)),
    )
    return (Hook(made, "after", "main", add_paths),), needs


PATHS = Paths()
STATE.details["endpoints"] = Detail("main", lambda: PATHS.shown)
FEATURE = Feature(
    "endpoints",
    f"answers on {PREFIX}draft_weights, {PREFIX}checksums and {PREFIX}canary",
    (
        Contract("0.5.17 to 0.5.23", *used("start_pd_bootstrap_service")),
        Contract("0.5.15 to 0.5.16", *used()),
    ),
)
