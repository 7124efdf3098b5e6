"""The server describes itself: /openapi.json has every route and the fields of its body, /docs shows it to people.

A route's summary is the first sentence of its handler's docstring. FIELDS says which fields a body may have: what the
handlers read is looked up here, so a field is served and described, or neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from inspect import getdoc
from typing import Any

from aiohttp import web

Schema = Mapping[str, Any]
TEXT: Schema = {"type": "string"}
SWITCH: Schema = {"type": "boolean"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
TEXTS: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT}]}
IDS: Schema = {"type": "array", "items": WHOLE}
SELECTOR: Schema = {"type": "string", "enum": ["target", "draft", "all"]}
UNUSED: Schema = {"description": "changes nothing here"}

_TAGS = {"tags": TEXTS}
# What SGLang's requests carry that changes nothing here: there is no cache across requests, and no CUDA graph to redo.
_UPDATE: dict[str, Schema] = {"selector": SELECTOR, "weight_version": TEXT, "abort_all_requests": SWITCH}
_UPDATE |= dict.fromkeys(
    ("flush_cache", "torch_empty_cache", "recapture_cuda_graph", "keep_pause", "is_async", "token_step"), UNUSED
)
FIELDS: dict[str, dict[str, Schema]] = {
    "/abort_request": {"rid": TEXT, "abort_all": SWITCH, "abort_message": UNUSED, "finished_reason": UNUSED},
    "/pause_generation": {"mode": {"type": "string", "enum": ["abort", "retract", "in_place"]}},
    "/continue_generation": {"torch_empty_cache": UNUSED},
    "/release_memory_occupation": _TAGS,
    "/resume_memory_occupation": _TAGS,
    "/begin_weight_update": {"selector": SELECTOR},
    "/end_weight_update": {},
    "/update_weights_from_tensor": {"serialized_named_tensors": TEXTS, "load_format": TEXT, **_UPDATE},
    "/update_weights_from_disk": {"model_path": TEXT, "load_format": TEXT, **_UPDATE},
    "/update_weight_version": {"new_version": TEXT, "abort_all_requests": SWITCH},
    "/weights_checker": {
        "action": {"type": "string", "enum": ["checksum"]},
        "selector": SELECTOR,
        "skip_tensor_list": TEXTS,
        "allow_quant_error": UNUSED,
    },
}
SAMPLING: dict[str, Schema] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), NUMBER),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "repetition_penalty"), NUMBER),
    **dict.fromkeys(("top_k", "n", "sampling_seed", "max_new_tokens", "min_new_tokens", "stream_interval"), WHOLE),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "no_stop_trim"), SWITCH),
    "stop": TEXTS,
    "stop_token_ids": IDS,
    "logit_bias": {"type": "object", "additionalProperties": NUMBER},
    "custom_params": {"type": "object", "properties": {"return_top_p_token_ids": SWITCH}},
}
_LISTED = "one value for all prompts, or a list"
GENERATE: dict[str, Schema] = {
    "text": TEXTS,
    "input_ids": {"anyOf": [IDS, {"type": "array", "items": IDS}]},
    "sampling_params": {"type": "object", "properties": SAMPLING, "description": _LISTED},
    "rid": TEXTS,
    "stream": SWITCH,
    "return_logprob": {**SWITCH, "description": _LISTED},
    "logprob_start_len": {**WHOLE, "description": "-1: none of the prompt"},
    "top_logprobs_num": {**WHOLE, "description": _LISTED},
    "token_ids_logprob": {"anyOf": [IDS, {"type": "array", "items": IDS}], "description": "tokens to score besides"},
    "return_sampling_mask": {**SWITCH, "description": "the tokens that top_k, top_p and min_p kept at each place"},
    "sampling_logprobs_mode": {"type": "string", "enum": ["selected"]},
    "return_text_in_logprobs": SWITCH,
    "return_prompt_token_ids": SWITCH,
    "extra_config": {"type": "object", "description": "RTP-LLM's fields"},
    "aux_info": SWITCH,
}
FIELDS["/generate"] = GENERATE
SHARED = "#/components/schemas/{model}"
REFUSALS = {"400": "The body cannot be served as it is.", "503": "There is no room now, or the engine has ended."}
PAGE = """<!doctype html><meta charset="utf-8"><title>slime_spec serve</title>
<style>body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code{background:#eee;padding:0 .2em}
td{vertical-align:top;padding-right:1em}summary{cursor:pointer}</style>
<h1>slime_spec serve</h1><p><a href="openapi.json">openapi.json</a> describes the same to programs.</p>
"""


class Description:
    """Describes an application's routes; ``bodies`` has whole schemas of bodies, by path, beside those of FIELDS.

    A part that several bodies share is a ``$defs`` of each, referred to as ``SHARED``.
    """

    def __init__(self, app: web.Application, version: str, bodies: Mapping[str, Schema], has_key: bool) -> None:
        self._app, self._version, self._has_key = app, version, has_key
        self._shared = {name: schema for body in bodies.values() for name, schema in body.get("$defs", {}).items()}
        self._bodies = {path: {name: body[name] for name in body if name != "$defs"} for path, body in bodies.items()}

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/openapi.json", self._openapi), web.get("/docs", self._docs)]

    async def _openapi(self, request: web.Request) -> web.Response:
        """Describe every endpoint in OpenAPI's format."""
        return web.json_response(self.openapi())

    async def _docs(self, request: web.Request) -> web.Response:
        """Show every endpoint on a page that needs nothing from the network."""
        return web.Response(text=PAGE + "".join(self._sections()), content_type="text/html")

    def openapi(self) -> dict[str, Any]:
        """Return the description of all routes."""
        paths: dict[str, dict[str, Any]] = {}
        for method, path, handler in self._routes():
            paths.setdefault(path, {})[method.lower()] = self._operation(method, path, handler)
        components: dict[str, Any] = {"schemas": dict(self._shared)}
        if self._has_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return {
            "openapi": "3.1.0",
            "info": {"title": "slime_spec serve", "version": self._version},
            "paths": paths,
            "components": components,
            "security": [{"key": []}] if self._has_key else [],
        }

    def _routes(self) -> Iterable[tuple[str, str, Any]]:
        for route in self._app.router.routes():
            if route.resource is not None and route.method != "HEAD":
                yield route.method, route.resource.canonical, route.handler

    def _operation(self, method: str, path: str, handler: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "summary": summary_of(handler),
            "responses": {"200": {"description": "Done."}},
        }
        if "{model}" in path:
            made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
        schema = self._schema(path)
        if method != "GET" and schema is not None:
            made["requestBody"] = {"content": {"application/json": {"schema": schema}}}
            made["responses"] |= {status: {"description": meaning} for status, meaning in REFUSALS.items()}
        return made

    def _schema(self, path: str) -> Schema | None:
        if path in self._bodies:
            return self._bodies[path]
        return {"type": "object", "properties": FIELDS[path]} if path in FIELDS else None

    def _sections(self) -> Iterable[str]:
        for method, path, handler in self._routes():
            title = f"<code>{method} {escape(path)}</code> {escape(summary_of(handler))}"
            schema = self._schema(path) if method != "GET" else None
            if not schema or not schema.get("properties"):
                yield f"<p>{title}</p>"
                continue
            rows = "".join(_row(name, each) for name, each in schema["properties"].items())
            yield f"<details><summary>{title}</summary><table>{rows}</table></details>"


def _row(name: str, schema: Schema) -> str:
    meaning = schema.get("description", "")
    return f"<tr><td><code>{escape(name)}</code><td>{escape(kind_of(schema))}<td>{escape(meaning)}"


def summary_of(handler: Any) -> str:
    """Return the first sentence of a handler's docstring."""
    doc = getdoc(handler)
    assert doc, f"{handler} is described by its docstring"
    return doc.partition("\n")[0]


def kind_of(schema: Schema) -> str:
    """Return a schema's type in words: ``integer or null``."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind_of, schema["anyOf"])))
    kind: str = schema.get("type", schema.get("$ref", "any").rpartition("/")[2])
    return f"{kind} of {kind_of(schema['items'])}" if "items" in schema else kind
