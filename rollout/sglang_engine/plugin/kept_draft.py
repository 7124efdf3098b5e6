"""A draft outlives release_memory_occupation: SGLang gives its memory away with the target's, and restores neither.

The trainer pushes the target after each resume, and often has no draft to push: from then on every draft is refused,
and nothing says so (sglang#31674). The draft is copied to host memory before the release, and back once its memory is
there again. By the same report --enable-draft-weights-cpu-backup does not help: it saves segments of the allocator,
which the draft shares with what is not saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rollout.sglang_engine.plugin.draft_safe import ALGORITHM, UPDATER
from rollout.sglang_engine.plugin.drafts import UnknownDraftError, draft_runners
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.state import STATE, Detail, State, logger

if TYPE_CHECKING:
    from rollout.sglang_engine.plugin.draft_copy import Copy

NAME = "kept_draft"
WEIGHTS = "weights"  # SGLang's tag of memory; a request without tags is for all of them


class KeptDraft:
    """The hooks around one scheduler's releases of memory, with the copies of its draft while it has none."""

    def __init__(self, state: State = STATE) -> None:
        self._state = state
        self._copies: list[Copy] = []
        self.num_kept = self.num_put_back = 0

    def keep(self, original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
        """Copies the draft before its memory is given away; without a memory saver nothing is given away."""
        from rollout.sglang_engine.plugin.draft_copy import Copy

        is_there = WEIGHTS not in updater.offload_tags
        if of_weights(recv_req) and is_there and updater.memory_saver_adapter.enabled:
            target = updater.tp_worker.model_runner.model
            try:
                self._copies = [Copy(runner.model, target) for runner in draft_runners(updater)]
            except UnknownDraftError as error:
                self._state.leave_out(NAME, str(error))
            self.num_kept += bool(self._copies)
        return original(updater, recv_req)

    def put_back(self, original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
        output = original(updater, recv_req)
        if of_weights(recv_req) and self._copies:
            for copy in self._copies:
                copy.put_back()
            num_tensors = sum(copy.num_tensors for copy in self._copies)
            logger.info("slime_spec plug-in: put back the draft tensors=%d", num_tensors)
            self._copies = []
            self.num_put_back += 1
        return output

    def shown(self) -> dict[str, int]:
        return {"num_kept": self.num_kept, "num_put_back": self.num_put_back}


def of_weights(recv_req: Any) -> bool:
    return not recv_req.tags or WEIGHTS in recv_req.tags


def of_memory(name: str, function: Callable[..., Any]) -> Hook:
    return Hook(Name(f"{UPDATER}.{name}_memory_occupation", ("self", "recv_req")), "around", "scheduler", function)


KEPT = KeptDraft()
STATE.details[NAME] = Detail("scheduler", KEPT.shown)
FEATURE = Feature(
    NAME,
    "keeps the draft over release_memory_occupation and resume_memory_occupation",
    (
        Contract(
            "0.5.15 to 0.5.23",
            (of_memory("release", KEPT.keep), of_memory("resume", KEPT.put_back)),
            (Name(UPDATER, members=("tp_worker", "draft_worker", "memory_saver_adapter", "offload_tags")), ALGORITHM),
        ),
    ),
)
