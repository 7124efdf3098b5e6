"""A candidate says what the nodes of a draft are worth: by what the draft tells, or by what drafts brought lately."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

from rollout.embedded.unread import AnyDraft
from slime_spec.speculation.controller import Controller
from slime_spec.speculation.recent_drafts import NO_CANDIDATE, Candidate


def tells_worth(draft: AnyDraft, has_network: bool) -> bool:
    """Return whether a draft's nodes can be told apart by what each is worth.

    A network's that do not tell their confidence cannot: a device is not waited for to say more.
    """
    return draft.is_confident or (draft.num_tokens > 0 and (draft.is_of_text or not has_network))


def candidate(draft: AnyDraft, controller: Controller, has_network: bool) -> Candidate:
    """Return what the draft itself says of its nodes, or else what the running acceptance says.

    Whether sampled tokens are judged must not depend on them: such drafts are verified whole.
    """
    if not draft.num_tokens and not draft.is_confident:
        return NO_CANDIDATE
    if not tells_worth(draft, has_network):
        return Candidate(tuple(controller.acceptance.chain(draft.num_tokens)), num_fixed=draft.num_tokens)
    read = draft.read()
    if read.expected is not None:
        return Candidate(tuple(accumulate(read.expected, mul)), of_text=True)
    if read.confidence is not None:
        fixed = read.num_tokens if draft.is_sampled or read.num_tokens < len(read.confidence) else None
        return Candidate(controller.calibration.chances(read.confidence), num_fixed=fixed)
    return Candidate(tuple(controller.acceptance.chances(read.parents)))
