"""The plug-in opens sessions of updates for clients that know none, and closes them before anything decodes.

SGLang 0.5.21 and newer loads tensors only between begin_weight_update and end_weight_update. Each rank's scheduler has
the session, and opening and closing are collective: all ranks do so at the same requests, and none by its own clock.
The clock is the main process's, which then sends a request to all of them.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from rollout.sglang_engine.plugin.state import logger

# Seconds after which a session is closed that its client has left open.
SESSION_S = "SLIME_SPEC_PLUGIN_SESSION_S"
DEFAULT_SESSION_S = 300.0
OURS = "slime_spec_plugin: "  # in a request's id, before the reason: so a scheduler knows the main process's request
Messages = Callable[[], Any]  # returns the module of SGLang's messages between its processes


def sglang_messages() -> Any:
    return importlib.import_module("sglang.srt.managers.io_struct")


def in_attention_groups() -> bool:
    """Whether groups of ranks have requests of their own (DP attention); updates are for all ranks."""
    return bool(importlib.import_module("sglang.srt.runtime_context").get_parallel().attn_dp_size > 1)


class LazySession:
    """The session that the plug-in has opened in this scheduler, if it is open, and the hooks that close it."""

    def __init__(
        self, messages: Messages = sglang_messages, in_groups: Callable[[], bool] = in_attention_groups
    ) -> None:
        self._messages, self._in_groups = messages, in_groups
        self.is_open = False
        self.num_opened = 0
        self.closed_by: dict[str, int] = {}

    def open(self, updater: Any, selector: str) -> None:
        updater.begin_weight_update(self._messages().BeginWeightUpdateReqInput(selector=selector))
        self.is_open = True
        self.num_opened += 1

    def close(self, updater: Any, reason: str) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self.closed_by[reason] = self.closed_by.get(reason, 0) + 1
        updater.end_weight_update(self._messages().EndWeightUpdateReqInput())
        if reason in ("error", "timeout"):
            logger.warning("slime_spec plug-in: closed a session of weight updates reason=%s: it was cut short", reason)

    def shown(self) -> dict[str, Any]:
        return {"is_open": self.is_open, "num_opened": self.num_opened, "closed_by": dict(self.closed_by)}

    def begin(self, original: Any, updater: Any, recv_req: Any) -> Any:
        """A client's own session takes the place of one that an earlier client left open."""
        self.close(updater, "begin_weight_update")
        return original(updater, recv_req)

    def end(self, original: Any, updater: Any, recv_req: Any) -> Any:
        """A client that ends what it never began has its session closed; the main process closes no client's."""
        rid = str(recv_req.rid)
        if not rid.startswith(OURS):
            self.is_open = False
            return original(updater, recv_req)
        self.close(updater, rid.removeprefix(OURS))
        return self._messages().EndWeightUpdateReqOutput(success=True, message="Success")

    def before_continue(self, scheduler: Any, recv_req: Any) -> None:
        self.close(scheduler.weight_updater, "continue_generation")

    def before_flush(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Clients that pause nothing flush after their last bucket; groups of ranks each flush once they are idle."""
        if self.is_open and not self._in_groups():  # SGLang flushes before it has an updater
            self.close(scheduler.weight_updater, "flush_cache")

    def before_generate(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """A paused scheduler only queues what arrives; with DP attention not all ranks are here (``Watch``)."""
        if self.is_open and not scheduler._engine_paused and not self._in_groups():
            self.close(scheduler.weight_updater, "generate")

    def before_release(self, updater: Any, recv_req: Any) -> None:
        self.close(updater, "release_memory_occupation")


def session_s(environment: Mapping[str, str] = os.environ) -> float:
    """The variable's seconds; what is no number of seconds is said and not used."""
    text = environment.get(SESSION_S, "")
    if not text:
        return DEFAULT_SESSION_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        logger.error(
            "slime_spec plug-in: %s=%r is no number of seconds above 0: using %g", SESSION_S, text, DEFAULT_SESSION_S
        )
        return DEFAULT_SESSION_S
    return seconds


class Watch:
    """The main process's clock: it starts anew with each bucket. What closes a session goes to all ranks."""

    def __init__(
        self,
        after_s: float,
        messages: Messages = sglang_messages,
        in_groups: Callable[[], bool] = in_attention_groups,
    ) -> None:
        self._after_s, self._messages, self._in_groups = after_s, messages, in_groups
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Future[None] | None = None

    async def watched(self, original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
        self._stop()
        try:
            return await original(manager, *args, **kwargs)
        finally:
            self._start(manager)

    async def before_request(self, original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
        """With DP attention, has the session closed that a bucket may have opened, before any request goes on."""
        if (self._timer is not None or self._asking is not None) and self._in_groups():
            if self._timer is not None and not manager.is_pause:
                self._stop()
                self._ask(manager, "generate")
            if self._asking is not None:
                await asyncio.shield(self._asking)  # a request that is given up ends for itself alone
        return await original(manager, *args, **kwargs)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, manager: Any) -> None:
        self._stop()
        self._timer = asyncio.get_running_loop().call_later(self._after_s, self._ask, manager, "timeout")

    def _ask(self, manager: Any, reason: str) -> None:
        self._timer = None
        self._asking = asyncio.ensure_future(self._close(manager, reason))  # a loop holds its tasks weakly

    async def _close(self, manager: Any, reason: str) -> None:
        """Asks the schedulers, past the lock of updates: for that, requests in flight would have to end first."""
        try:
            asked = self._messages().EndWeightUpdateReqInput(rid=f"{OURS}{reason}")
            await manager.end_weight_update_communicator(asked)
        except Exception:  # noqa: BLE001 - nobody awaits a clock, and a request must go on
            logger.exception("slime_spec plug-in: could not close a session of weight updates reason=%s", reason)
