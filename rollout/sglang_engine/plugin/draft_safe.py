"""Weight updates reach the target alone, whatever the client sends; an MTP head of the target's checkpoint takes part.

A client that names no side sends the target's weights. SGLang loads them into the draft too: a draft of the target's
shape is overwritten, and one with a vocabulary of its own ends the server.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from rollout.sglang_engine.plugin.drafts import (
    OF_THE_TARGET,
    OWN,
    UNKNOWN,
    DraftKind,
    renew_copied_rows,
    with_draft_riding,
    without_draft,
)
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.ranks import told_by_all
from rollout.sglang_engine.plugin.sessions import LazySession, Watch, session_s
from rollout.sglang_engine.plugin.state import STATE, Detail, State

NAME = "weights"
UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
MESSAGES = "sglang.srt.managers.io_struct"
BUCKETS = ("tensor", "distributed")
FOLDERS = ("disk", "ipc")


class DraftSafeUpdates:
    """The hooks around one scheduler's updates."""

    def __init__(
        self,
        session: LazySession,
        state: State = STATE,
        told_by_all: Callable[[str, Any], list[str]] = told_by_all,
    ) -> None:
        self.session, self.draft = session, DraftKind()
        self._state, self._told_by_all = state, told_by_all

    def from_folder_or_handles(self, original: Any, updater: Any, recv_req: Any) -> Any:
        """A checkpoint's folder and a checkpoint engine's handles: SGLang has no sides and no sessions for these."""
        self.session.close(updater, "another update")
        return self._into_target(original, updater, recv_req)

    def bucket_in_session(self, original: Any, updater: Any, recv_req: Any) -> Any:
        """A bucket from 0.5.21 on. A client that names the draft has a session, or SGLang says that it needs one."""
        if recv_req.selector == "draft":
            self.session.close(updater, "another update")
            return original(updater, recv_req)
        kind = self._kind(updater)
        if updater._session is None and kind != UNKNOWN:
            self.session.open(updater, "target" if kind == OWN else recv_req.selector)
        output = self._into_target(original, updater, recv_req)
        if self.session.is_open:
            self._close_where_one_failed(updater, output)
        return output

    def bucket(self, original: Any, updater: Any, recv_req: Any) -> Any:
        """A bucket up to 0.5.20, where broadcasts leave out an MTP head, and tensors one of several layers."""
        if getattr(recv_req, "disable_draft_model", None):
            return original(updater, recv_req)
        of_tensors = hasattr(recv_req, "disable_draft_model")
        takes_part = of_tensors and hasattr(updater.draft_worker, "update_weights_from_tensor")
        if self._kind(updater) != OF_THE_TARGET or takes_part:
            return self._into_target(original, updater, recv_req)
        with with_draft_riding(updater):
            output = original(updater, recv_req)
        renew_copied_rows(updater)
        return output

    def shown(self) -> dict[str, Any]:
        known = self.draft.known
        return {"draft": known and known.kind, "session": self.session.shown()}

    def _kind(self, updater: Any) -> str:
        draft = self.draft.of(updater)
        if draft.kind == UNKNOWN:
            self._state.leave_out(NAME, draft.problem)
        return draft.kind

    def _into_target(self, original: Any, updater: Any, recv_req: Any) -> Any:
        """What brings no side is the target's; where the draft is unknown, it is what SGLang makes of it."""
        kind = self._kind(updater)
        if kind == UNKNOWN:
            return original(updater, recv_req)
        with nullcontext() if kind == OF_THE_TARGET else without_draft(updater):
            output = original(updater, recv_req)
        renew_copied_rows(updater)
        return output

    def _close_where_one_failed(self, updater: Any, output: Any) -> None:
        """One rank may fail alone, and closing is for all; the client hears one rank, and hears of any that failed."""
        problem = "" if output.success else output.message or "not loaded"
        if problems := self._told_by_all(problem, updater.tp_cpu_group):
            self.session.close(updater, "error")
            output.success, output.message = False, "; ".join(problems)


def feature(updates: DraftSafeUpdates, watch: Watch) -> Feature:
    return Feature(
        NAME,
        "keeps weight updates out of a draft that has weights of its own, and opens the sessions that they need",
        (with_sessions(updates, watch), without_sessions(updates)),
    )


def with_sessions(updates: DraftSafeUpdates, watch: Watch) -> Contract:
    session = updates.session
    hooks = (
        *around_updates(updates.from_folder_or_handles, FOLDERS),
        *around_updates(updates.bucket_in_session, BUCKETS),
        Hook(Name(f"{UPDATER}.begin_weight_update", ("self", "recv_req")), "around", "scheduler", session.begin),
        Hook(Name(f"{UPDATER}.end_weight_update", ("self", "recv_req")), "around", "scheduler", session.end),
        *(
            Hook(Name(target, ("self", *parameters)), "before", "scheduler", function)
            for target, parameters, function in (
                (f"{UPDATER}.release_memory_occupation", ("recv_req",), session.before_release),
                (f"{SCHEDULER}.continue_generation", ("recv_req",), session.before_continue),
                (f"{SCHEDULER}.flush_cache", ("empty_cache",), session.before_flush),
                (f"{SCHEDULER}.handle_generate_request", ("recv_req", "mm_input_error"), session.before_generate),
            )
        ),
        *(
            Hook(
                Name(f"{MANAGER}.update_weights_from_{origin}", ("self", "obj", "request")),
                "around",
                "main",
                watch.watched,
            )
            for origin in BUCKETS
        ),
        *(
            Hook(Name(f"{MANAGER}.{name}", ("self", parameter)), "around", "main", watch.before_request)
            for name, parameter in (("_send_one_request", "tokenized_obj"), ("_send_batch_request", "tokenized_objs"))
        ),
    )
    needs = (
        Name(UPDATER, members=("tp_worker", "draft_worker", "tp_cpu_group", "_session")),
        Name(SCHEDULER, attributes=("weight_updater", "_engine_paused")),
        Name(MANAGER, attributes=("end_weight_update_communicator", "is_pause")),
        Name("sglang.srt.runtime_context.get_parallel"),
        Name("sglang.srt.arg_groups.fields.parallel.Parallel", members=("attn_dp_size",)),
        RUNNERS,
        Name(f"{MESSAGES}.UpdateWeightsFromTensorReqInput", members=("selector",)),
        Name(f"{MESSAGES}.UpdateWeightsFromDistributedReqInput", members=("selector",)),
        Name(f"{MESSAGES}.BeginWeightUpdateReqInput", members=("selector",)),
        Name(f"{MESSAGES}.EndWeightUpdateReqInput", members=("rid",)),
        Name(f"{MESSAGES}.EndWeightUpdateReqOutput", members=("success", "message")),
        Name(f"{MESSAGES}.UpdateWeightsFromTensorReqOutput", members=("success", "message")),
        Name(f"{MESSAGES}.UpdateWeightsFromDistributedReqOutput", members=("success", "message")),
        ALGORITHM,
    )
    return Contract("0.5.21 to 0.5.23", hooks, needs)


def without_sessions(updates: DraftSafeUpdates) -> Contract:
    return Contract(
        "0.5.15 to 0.5.20",
        (
            *around_updates(updates.from_folder_or_handles, FOLDERS),
            *around_updates(updates.bucket, BUCKETS),
        ),
        (
            Name(UPDATER, members=("tp_worker", "draft_worker")),
            Name(f"{MESSAGES}.UpdateWeightsFromTensorReqInput", members=("disable_draft_model",)),
            ALGORITHM,
        ),
    )


def around_updates(function: Callable[..., Any], origins: tuple[str, ...]) -> tuple[Hook, ...]:
    return tuple(
        Hook(Name(f"{UPDATER}.update_weights_from_{origin}", ("self", "recv_req")), "around", "scheduler", function)
        for origin in origins
    )


ALGORITHM = Name(
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm",
    members=("is_standalone", "is_eagle", "is_eagle3", "is_ngram"),
)
RUNNERS = Name("sglang.srt.speculative.base_spec_worker.BaseSpecWorker", members=("weight_update_runners",))
UPDATES = DraftSafeUpdates(LazySession())
STATE.details[NAME] = Detail("scheduler", UPDATES.shown)
FEATURE = feature(UPDATES, Watch(session_s()))
