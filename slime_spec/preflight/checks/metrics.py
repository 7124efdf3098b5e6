"""These checks are about the acceptance that servers and a finished run report."""

from __future__ import annotations

from slime_spec.algorithms import NONE
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, always, trap
from slime_spec.sglang.draft_shape import tree_pool_size

# RTP-LLM's advice for drafts: train until more than these shares of rounds accept the first, second and third token.
BAR = (0.8, 0.6, 0.4)


@trap(
    "metadata-keys",
    "The counters in a response's meta_info were renamed twice. Readers of one generation get 0.0 from another, which "
    "looks like a draft that is never right; this project reads all of them, dashboards and other tools may not.",
    "23530",
    "24081",
    "https://github.com/verl-project/verl/pull/7543",
)
def metadata_keys(facts: Facts) -> Sighting | None:
    keys = facts.release.metadata
    return Sighting(
        Severity.INFO,
        f"SGLang {facts.release.text} reports {keys.correct} and {keys.proposed}",
        "Nothing to do here; elsewhere read these names.",
    )


@trap(
    "acceptance-bar",
    "A draft position costs the same whether it is accepted or not. RTP-LLM's advice is to train a draft until more "
    "than 80 % of rounds accept its first token, 60 % the second and 40 % the third.",
    "https://github.com/alibaba/rtp-llm/blob/main/docs/backend/speculative_decoding.md",
    applies=always,
)
def acceptance_bar(facts: Facts) -> Sighting | None:
    if not facts.acceptance:
        return None
    # Only positions that this run drafts are judged.
    num_judged = min(len(BAR), facts.shape.num_steps if facts.speculates else len(BAR))
    judged = facts.acceptance[:num_judged]
    rates = ", ".join(f"{rate:.0%}" for rate in judged)
    num_kept = 0
    for rate, bar in zip(judged, BAR, strict=False):
        if rate <= bar:
            break
        num_kept += 1
    read = f"accepted by draft position in the finished run: {rates}; the bar: 80%, 60%, 40%"
    if num_kept == len(judged):
        return Sighting(Severity.INFO, read, "The draft pays its way.")
    if num_kept == 0:
        return Sighting(
            Severity.WARNING,
            read,
            f"Train the draft on this policy's samples, or pass --speculative-algorithm {NONE.name} at large batches.",
        )
    fix = _shallower(facts, num_kept)
    how = f": pass {' '.join(fix)}" if fix else ""
    return Sighting(
        Severity.WARNING,
        read,
        f"Draft no deeper than {num_kept}{how}; or train the draft on this policy's samples.",
        fix,
    )


def _shallower(facts: Facts, num_steps: int) -> tuple[str, ...]:
    """Return flags of the same drafts, cut to a depth; none for the n-gram worker, which has no depth."""
    shape = facts.shape
    if "num_steps" not in facts.config.speculative.record.reads:
        return ()
    is_chain = shape.topk == 1
    count = num_steps + 1 if is_chain else min(shape.num_draft_tokens, tree_pool_size(num_steps, shape.topk) + 1)
    topk = ("--speculative-eagle-topk", str(shape.topk)) if facts.config.speculative.record.has_numbers else ()
    return (
        *("--speculative-num-steps", str(num_steps), *topk),
        *("--speculative-num-draft-tokens", str(count)),
    )
