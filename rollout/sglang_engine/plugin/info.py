"""The plug-in shows its state in /server_info: the main process's at the top, a scheduler's in its internal state."""

from __future__ import annotations

from typing import Any

from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.state import KEY, STATE


def show_main(global_state: Any) -> None:
    """SGLang answers with all that this dict holds."""
    global_state.scheduler_info[KEY] = STATE.shown()


def show_scheduler(output: Any, scheduler: Any, recv_req: Any) -> Any:
    output.internal_state[KEY] = STATE.shown_in_detail()
    return output


FEATURE = Feature(
    "info",
    "shows in /server_info what is active",
    (
        Contract(
            "0.5.15 to 0.5.23",
            (
                Hook(
                    Name("sglang.srt.entrypoints.http_server.set_global_state", ("global_state",)),
                    "before",
                    "main",
                    show_main,
                    only_where_loaded=True,
                ),
                Hook(
                    Name("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req")),
                    "after",
                    "scheduler",
                    show_scheduler,
                ),
            ),
        ),
    ),
)
