"""The plug-in shows its state in /server_info: the main process's at the top, a scheduler's in its internal state."""

from __future__ import annotations

from typing import Any

from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.state import KEY, STATE


def show_main(global_state: Any) -> None:
    """SGLang answers with what this dict holds by then: the features that count here show the dicts they count in."""
    global_state.scheduler_info[KEY] = STATE.shown("main")


def show_scheduler(output: Any, scheduler: Any, recv_req: Any) -> Any:
    output.internal_state[KEY] = STATE.shown("scheduler")
    return output


SERVER = "sglang.srt.entrypoints.http_server"
FEATURE = Feature(
    "info",
    "shows in /server_info what is active",
    (
        Contract(
            "0.5.15 to 0.5.23",
            (
                Hook(
                    Name(f"{SERVER}.set_global_state", ("global_state",), only_where_loaded=True),
                    "before",
                    "main",
                    show_main,
                ),
                Hook(
                    Name("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req")),
                    "after",
                    "scheduler",
                    show_scheduler,
                ),
            ),
            (
                Name(f"{SERVER}._GlobalState", members=("scheduler_info",), only_where_loaded=True),
                Name("sglang.srt.managers.io_struct.GetInternalStateReqOutput", members=("internal_state",)),
            ),
        ),
    ),
)
