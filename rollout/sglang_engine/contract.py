"""A contract says how a server takes weights; it is read from the server's request fields, never from its version.

    none       tensors go to the draft's runner and to the target's
    flag       the same, unless disable_draft_model is set; from a group they go to the target alone
    selector   every call names its side, inside a session that must be opened and ended

``slime_spec/sglang/releases.py`` says which release has which contract.
The fields are in the server's openapi.json. A server that hides them is asked to end a session that was never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout.sglang_engine.client import ServerRefused, SglangClient
from slime_spec.errors import PushError
from slime_spec.sglang.releases import DISABLE_DRAFT, FAN_OUT, SELECTOR, Style, since
from slime_spec.weights.messages import Side

TENSOR, END, CHECKER = "/update_weights_from_tensor", "/end_weight_update", "/weights_checker"


@dataclass(frozen=True)
class Contract:
    """Says how a server takes weights; with ``has_checksums``, /weights_checker reports each tensor's checksum by side.

    Example: ``Contract("selector", has_checksums=True)``
    """

    style: Style
    has_checksums: bool

    @property
    def has_session(self) -> bool:
        return self.style == "selector"

    def tensor_fields(self, side: Side, has_draft: bool) -> dict[str, Any]:
        """Return the fields with which an update from tensors changes only ``side``; raises PushError where none do."""
        if self.style == "selector":
            return {str(SELECTOR.field): side}
        if side == "draft":
            raise PushError(
                "this SGLang has no way to update the draft alone: its weights stay as they are. "
                f"Use SGLang {since(SELECTOR)} or newer ({SELECTOR.field}), "
                "or restart the engines with the new draft's folder."
            )
        if not has_draft:
            return {}
        if self.style == "flag":
            return {str(DISABLE_DRAFT.field): True}
        raise PushError(
            "this SGLang loads tensors into the draft too and would overwrite it. "
            f"Pass --sglang-weight-transport distributed, or use SGLang {since(DISABLE_DRAFT)} or newer."
        )

    def group_fields(self, side: Side) -> dict[str, Any]:
        """Return the fields for an update from a process group, which older servers give to the target alone."""
        if self.style == "selector":
            return {str(SELECTOR.field): side}
        if side == "draft":
            return self.tensor_fields(side, has_draft=True)  # raises
        return {}


def contract_of(openapi: Mapping[str, Any]) -> Contract:
    """Read the contract from a server's openapi.json; raises PushError where the server has no weight updates."""
    fields = request_fields(openapi, TENSOR)
    if fields is None:
        raise PushError(f"the server has no {TENSOR}: it is no SGLang that can be trained")
    style: Style = FAN_OUT.style
    if SELECTOR.field in fields and request_fields(openapi, END) is not None:
        style = SELECTOR.style
    elif DISABLE_DRAFT.field in fields:
        style = DISABLE_DRAFT.style
    checker = request_fields(openapi, CHECKER)
    return Contract(style, has_checksums=checker is not None and SELECTOR.field in checker)


def request_fields(openapi: Mapping[str, Any], path: str) -> frozenset[str] | None:
    """Return the names in the JSON body of a path's POST; None where there is no such path."""
    post = openapi.get("paths", {}).get(path, {}).get("post")
    if post is None:
        return None
    content = post.get("requestBody", {}).get("content", {}).get("application/json", {})
    return frozenset(_names(content.get("schema", {}), openapi))


def _names(schema: Mapping[str, Any], openapi: Mapping[str, Any]) -> set[str]:
    found = set(schema.get("properties", {}))
    if "$ref" in schema:
        node: Any = openapi
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        found |= _names(node, openapi)
    for part in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("oneOf", ())):
        found |= _names(part, openapi)
    return found


async def detect(client: SglangClient) -> Contract:
    """Ask the server for its contract."""
    try:
        return contract_of(await client.get("/openapi.json"))
    except ServerRefused:
        pass
    try:
        await client.post(END)
    except ServerRefused as error:
        # 400: it knows sessions and none is open. 404: it knows none, and nothing shows whether it knows the flag.
        is_selector = error.status == 400
        return Contract("selector" if is_selector else "none", has_checksums=is_selector)
    return Contract("selector", has_checksums=True)  # it has just ended a session that someone else left open
