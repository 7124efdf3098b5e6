"""Checkpoints that may replace the weights of the draft being served."""

from __future__ import annotations

from dataclasses import replace

import torch

from slime_spec.checkpoints.draft_choice import ChosenDraft, choose_draft
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.config.tree import Config
from slime_spec.errors import CheckpointError

ANEW = "Restart the server with this draft."


class DraftFolders:
    """Reads drafts of the served one's kind; the vocabulary that a draft was cut to is fixed when serving starts."""

    def __init__(self, config: Config, target: ModelSpec) -> None:
        self._config, self._target = config, target
        self._served = choose_draft(config, target)
        self._hot_token_ids = None if self._served is None else _read(self._served)[1]

    def read(self, folder: str) -> dict[str, torch.Tensor]:
        """The draft's weights; raises CheckpointError for a draft of another kind, naming what differs."""
        speculative = replace(self._config.speculative, draft_model_path=folder)
        draft = choose_draft(replace(self._config, speculative=speculative), self._target)
        assert draft is not None, "asked only where a draft is served"
        assert self._served is not None, "asked only where a draft is served"
        if draft.spec != self._served.spec:
            served, found = vars(self._served.spec), vars(draft.spec)
            name = next(name for name in found if found[name] != served.get(name))
            raise CheckpointError(
                f"{folder}: {name}", f"must be {served.get(name)!r} as in the draft being served", found[name], ANEW
            )
        tensors, hot_token_ids = _read(draft)
        if not _same_ids(hot_token_ids, self._hot_token_ids):
            raise CheckpointError(f"{folder}: d2t", "must be that of the draft being served", "another", ANEW)
        return tensors


def _read(draft: ChosenDraft) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The weights under the names of a push, and the target ids of a reduced vocabulary."""
    if isinstance(draft.spec, ModelSpec):
        return load_tensors(draft.folder, draft.spec), None
    checkpoint = load_draft(draft.folder, draft.spec)
    return checkpoint.tensors, checkpoint.hot_token_ids


def _same_ids(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours, theirs)
