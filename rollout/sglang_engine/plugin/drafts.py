"""A scheduler's draft has weights of its own, or those of an MTP head, which is part of the target's checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rollout.sglang_engine.plugin.state import logger

OWN, OF_THE_TARGET, NONE, UNKNOWN = "own weights", "part of the target", "no weights", "unknown"
ROUTES = {
    OWN: "only the target takes updates that name no side",
    OF_THE_TARGET: "target and draft take updates that name no side",
    NONE: "the target takes updates",
    UNKNOWN: "updates are left to SGLang",
}


class UnknownDraftError(LookupError):
    """A draft has its model runners under no name that is known."""


def draft_runners(updater: Any) -> list[Any]:
    """The model runners of a draft, by the names that SGLang 0.5.15 to 0.5.23 have for them; none for n-grams.

    Raises UnknownDraftError for a draft that has none by these names: taken for no draft, it would go stale in silence.
    """
    draft_worker = updater.draft_worker
    if draft_worker is None:
        return []
    if hasattr(draft_worker, "weight_update_runners"):
        return [runner for _, runner in draft_worker.weight_update_runners()]
    holder = holder_of(draft_worker)
    for name in ("draft_runners", "draft_runner_list"):
        if runners := getattr(holder, name, None):
            return list(runners)
    one = getattr(draft_worker, "draft_model_runner", None) or getattr(holder, "draft_runner", None)
    if one is not None:
        return [one]
    if drafts_without_weights(updater.tp_worker.model_runner.spec_algorithm):
        return []
    raise UnknownDraftError(f"{type(draft_worker).__name__} has its model runners under no known name")


def drafts_without_weights(algorithm: Any) -> bool:
    """N-grams have no model, and UNO (0.5.20 and newer) drafts with the target's."""
    is_uno = getattr(algorithm, "is_uno", None)
    return bool(algorithm.is_ngram() or (is_uno is not None and is_uno()))


def holder_of(draft_worker: Any) -> Any:
    """What of a draft's worker has its runners."""
    return getattr(draft_worker, "draft_worker", None) or getattr(draft_worker, "_draft_worker", None)


@dataclass(frozen=True)
class Draft:
    """A scheduler's draft as the server was started with it."""

    kind: str
    folder: str = ""  # of the checkpoint that it is of: an MTP head's is the target's
    problem: str = ""  # why it is unknown


class DraftKind:
    """The draft, found before the first update: updates from a folder change the paths that SGLang keeps."""

    def __init__(self) -> None:
        self.known: Draft | None = None

    def of(self, updater: Any) -> Draft:
        if self.known is None:
            self.known = found_draft(updater)
            kind = self.known.kind
            logger.warning("slime_spec plug-in: first update of weights draft=%r: %s", kind, ROUTES[kind])
        return self.known


def found_draft(updater: Any) -> Draft:
    """An MTP head is read from the target's own checkpoint; a model of its own that drafts (STANDALONE) may be too."""
    try:
        runners = draft_runners(updater)
    except UnknownDraftError as error:
        return Draft(UNKNOWN, problem=str(error))
    if not runners:
        return Draft(NONE)
    target, folder = updater.tp_worker.model_runner, folder_of(runners[0])
    of_target = not target.spec_algorithm.is_standalone() and {folder_of(each) for each in runners} == {
        folder_of(target)
    }
    return Draft(OF_THE_TARGET if of_target else OWN, folder)


def folder_of(runner: Any) -> str:
    """A folder's real path, or a hub's name as it is."""
    path = str(runner.model_config.model_path)
    return os.path.realpath(path) if os.path.isdir(path) else path


@contextmanager
def without_draft(updater: Any) -> Iterator[None]:
    """SGLang loads whatever arrives into the target alone, as on a server that does not speculate."""
    draft_worker, updater.draft_worker = updater.draft_worker, None
    try:
        yield
    finally:
        updater.draft_worker = draft_worker


def renew_copied_rows(updater: Any) -> None:
    """With a map of frequent tokens, EAGLE's head is a copy of rows of the target's, made when the server started."""
    target = updater.tp_worker.model_runner
    rows = getattr(holder_of(updater.draft_worker), "hot_token_id", None)
    if rows is None or not target.spec_algorithm.is_eagle() or target.spec_algorithm.is_eagle3():
        return
    _, head = target.model.get_embed_and_head()  # SGLang copied the rows from there
    if head is None:
        return
    for runner in draft_runners(updater):
        runner.model.lm_head.weight.data.copy_(head.data[rows])


@contextmanager
def with_draft_riding(updater: Any) -> Iterator[None]:
    """What the target's model loads, the draft's models load too; SGLang itself sees the target alone."""
    model = updater.tp_worker.model_runner.model
    load = model.load_weights
    drafts = [runner.model for runner in draft_runners(updater)]

    def load_in_all(weights: Any, *args: Any, **kwargs: Any) -> Any:
        weights = list(weights)
        loaded = load(weights, *args, **kwargs)
        for draft in drafts:
            draft.load_weights(weights)
        return loaded

    model.load_weights = load_in_all
    try:
        with without_draft(updater):
            yield
    finally:
        del model.load_weights
