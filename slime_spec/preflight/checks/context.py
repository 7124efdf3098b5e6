"""These checks are about context lengths: drafts are trained on shorter sequences than their targets."""

from __future__ import annotations

from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, on_sglang, speculating, trap

OVERWRITE = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"


def _draft_context(facts: Facts) -> int | None:
    return facts.draft.context_length if facts.draft is not None and facts.draft is not facts.target else None


@trap(
    "draft-context",
    "A draft's rotary table ends at its own max_position_embeddings. Before 0.5.1 a server started all the same and "
    "read beyond it (illegal memory access); since then it refuses to start, unless SGLANG_ALLOW_OVERWRITE_LONGER_"
    "CONTEXT_LEN=1, which from 0.5.3 on stretches the draft over positions it was never trained on.",
    "9388",
    "3574",
    "10787",
)
def draft_context(facts: Facts) -> Sighting | None:
    draft, context = _draft_context(facts), facts.context_length
    if draft is None or context is None or draft >= context:
        return None
    is_allowed = facts.environ.get(OVERWRITE, "").lower() in ("1", "true") and facts.release.does(
        "widens_rotary_tables"
    )
    reaction = "refuses to start" if facts.release.does("refuses_longer_draft_context") else "crashes past it"
    given = "--sglang-context-length" if facts.config.engine.context_length else "the target's max_position_embeddings"
    return Sighting(
        Severity.WARNING if is_allowed else Severity.ERROR,
        f"the draft has max_position_embeddings {draft}, the server {context} ({given}); SGLang {facts.release.text} "
        + (f"stretches the draft ({OVERWRITE} is set)" if is_allowed else reaction),
        f"Pass --sglang-context-length {draft} and keep prompts plus responses below it.",
        ("--sglang-context-length", str(draft)),
    )


@trap(
    "draft-length",
    "Beyond the positions a draft was trained on ever fewer of its tokens are accepted.",
    "6783",
    applies=speculating,
)
def draft_length(facts: Facts) -> Sighting | None:
    draft = _draft_context(facts)
    if draft is None or facts.config.rollout.longest <= draft:
        return None
    response = draft - facts.config.rollout.max_prompt_len - facts.shape.num_draft_tokens
    fits = response >= 1
    return Sighting(
        Severity.WARNING,
        f"prompt plus response may have {facts.config.rollout.longest} tokens, the draft {draft} positions",
        f"Pass --rollout-max-response-len {response}, which also leaves room for the last round's "
        f"{facts.shape.num_draft_tokens} drafted tokens, or a draft for longer sequences."
        if fits
        else "Lower --rollout-max-prompt-len, or pass a draft for longer sequences.",
        ("--rollout-max-response-len", str(response)) if fits else (),
    )


@trap(
    "context-length",
    "A server refuses a context beyond its model's, unless SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1, and refuses "
    "each longer request one by one.",
    "9388",
    applies=on_sglang,
)
def context_length(facts: Facts) -> Sighting | None:
    own, asked = facts.target.context_length, facts.config.engine.context_length
    if own is None or max(asked or 0, facts.config.longest) <= own:
        return None
    if facts.environ.get(OVERWRITE, "").lower() in ("1", "true"):
        return None
    return Sighting(
        Severity.ERROR,
        f"the target has max_position_embeddings {own}; the context is {asked or own}, the longest sequence "
        f"{facts.config.longest}",
        f"Pass --sglang-context-length {own}, and prompt and response lengths below it.",
        ("--sglang-context-length", str(own)),
    )
