"""These endpoints change weights or compare them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any

from aiohttp import web

from rollout.embedded.http.json_io import Fields, json_response, read_fields
from rollout.embedded.http.serving import Serving
from rollout.embedded.http.weight_session import SELECTORS, SIDES, WeightUpdates
from slime_spec.errors import ConfigError, PushError
from slime_spec.weights.checksums import combined_checksum

Handler = Callable[[web.Request], Awaitable[web.Response]]
DISK_FORMATS = ("auto", "safetensors")
INSTEAD = "Use update_weights_from_disk, or update_weights_from_tensor with load_format safetensors."
UNSERVED_TRANSPORTS = (
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/update_weights_from_ipc",
)


class WeightRoutes:
    """Handles the weight endpoints; each answers ``{"success": ..., "message": ...}``, and a refusal has status 400."""

    def __init__(self, serving: Serving, updates: WeightUpdates) -> None:
        self._engine, self._generations, self._control = serving.engine, serving.generations, serving.control
        self._updates = updates

    def routes(self) -> list[web.RouteDef]:
        posts: dict[str, Handler] = {
            "/begin_weight_update": self._begin,
            "/end_weight_update": self._end,
            "/update_weights_from_tensor": self._from_tensor,
            "/update_weights_from_disk": self._from_disk,
            "/update_weight_version": self._rename,
            "/weights_checker": self._check,
        }
        posts |= dict.fromkeys(UNSERVED_TRANSPORTS, _refuse_transport)
        routes = [web.post(path, _answering_success(handler)) for path, handler in posts.items()]
        return [*routes, web.get("/weights_checker", _answering_success(self._check))]

    async def _begin(self, request: web.Request) -> web.Response:
        """Open a session of weight updates."""
        fields = await read_fields(request)
        selector = fields.choice("selector", SELECTORS, "all")
        await self._control.run(lambda: self._updates.begin(selector))
        return _success("Success")

    async def _end(self, request: web.Request) -> web.Response:
        """Use the tensors of the session, all or none."""
        await read_fields(request)
        await self._control.run(self._updates.end)
        return _success("Success")

    async def _from_tensor(self, request: web.Request) -> web.Response:
        """Hold tensors, as safetensors, for the end of the session."""
        fields = await read_fields(request, sys.maxsize)  # the server's own bound of a body
        selector = None if fields.raw("selector") is None else fields.choice("selector", SELECTORS, "all")
        version_name = fields.text("weight_version") or None
        if fields.text("load_format") != "safetensors":
            raise ConfigError(
                "load_format",
                "must be safetensors: this server never unpickles what comes over a network",
                fields.raw("load_format"),
                "Send serialized_named_tensors as [base64 of safetensors.torch.save(tensors)].",
            )
        await self._abort_if_asked(fields)
        encoded = fields.texts("serialized_named_tensors")
        await self._control.run(lambda: self._updates.add(encoded, selector, version_name))
        return _success("Success")

    async def _from_disk(self, request: web.Request) -> web.Response:
        """Use the weights of a checkpoint folder from the next round on."""
        fields = await read_fields(request)
        folder, selector = fields.text("model_path"), fields.choice("selector", SELECTORS, "target")
        version_name = fields.text("weight_version") or None
        fields.choice("load_format", DISK_FORMATS, "auto")
        await self._abort_if_asked(fields)
        await self._control.run(lambda: self._updates.from_disk(folder, selector, version_name))
        message = "Succeeded to update model weights."
        if version_name is not None:
            message += f" Weight version updated to {version_name}."
        return _success(message, num_paused_requests=0)

    async def _rename(self, request: web.Request) -> web.Response:
        """Give the weights in use another version name."""
        fields = await read_fields(request)
        name = fields.text("new_version")
        if not name:
            raise ConfigError("new_version", "must be a text that is not empty", name, "Send the new version.")
        await self._abort_if_asked(fields, default=True)
        await self._control.run(lambda: self._updates.rename(name))
        return _success(f"Weight version updated to {name}", new_version=name)

    async def _check(self, request: web.Request) -> web.Response:
        """Answer the checksum of every tensor in use."""
        fields = await read_fields(request)
        fields.choice("action", ("checksum",), "checksum")
        selector, skipped = fields.choice("selector", SELECTORS, "all"), fields.texts("skip_tensor_list")
        checksums: dict[str, str] = {}
        for side in SIDES[selector]:
            found = await self._control.run(partial(self._engine.tensor_checksums, side))
            prefix = "" if side == "target" else "draft."
            checksums |= {prefix + name: f"{value:016x}" for name, value in found.items()}
        kept = {name: value for name, value in checksums.items() if not any(each in name for each in skipped)}
        total = combined_checksum((name, int(value, 16)) for name, value in kept.items())
        rank = {"checksums": kept, "per_gpu_checksum": total, "parallelism_info": [_alone(s) for s in SIDES[selector]]}
        engine_checksum = hashlib.sha256(total.encode()).hexdigest()
        return _success("Success", ranks=[rank], per_engine_checksum=engine_checksum)

    async def _abort_if_asked(self, fields: Fields, default: bool = False) -> None:
        if fields.switch("abort_all_requests", default):
            await self._generations.abort_all()


async def _refuse_transport(request: web.Request) -> web.Response:
    """Refuse, for this server has no process group to receive through."""
    raise ConfigError(request.path, "this server has no process group to receive through", "?", INSTEAD)


def _alone(side: str) -> dict[str, Any]:
    ranks = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1, "rank": 0, "size": 1}
    return {"role": side, **ranks}


def _success(message: str, **more: Any) -> web.Response:
    return json_response({"success": True, "message": message, **more})


def _answering_success(handler: Handler) -> Handler:
    """Wrap a handler, so that its refusals also say ``"success": false`` as SGLang's do."""

    @wraps(handler)
    async def answered(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except (ConfigError, PushError) as error:
            message = str(error)
            return json_response(
                {"success": False, "message": message, "error": {"message": message, "code": 400}}, status=400
            )

    return answered
