"""What is reported about acceptance, and what it says."""

from __future__ import annotations

from slime_spec.launch.doctor.facts import Facts
from slime_spec.launch.doctor.finding import Severity, Sighting, always, trap

# RTP-LLM's advice: the k-th draft position pays where more than this share of rounds accepts it.
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
    correct, proposed = facts.release.metadata_keys
    return Sighting(
        Severity.INFO,
        f"SGLang {facts.release.text} reports {correct} and {proposed}",
        "Nothing to do here; elsewhere read these names.",
    )


@trap(
    "acceptance-bar",
    "A draft position costs the same whether it is accepted or not. RTP-LLM keeps the first where more than 80 % of "
    "rounds accept it, the second above 60 %, the third above 40 %.",
    "https://github.com/alibaba/rtp-llm/blob/main/docs/backend/speculative_decoding.md",
    applies=always,
)
def acceptance_bar(facts: Facts) -> Sighting | None:
    if not facts.acceptance:
        return None
    rates = ", ".join(f"{rate:.0%}" for rate in facts.acceptance[: len(BAR)])
    num_kept = 0
    for rate, bar in zip(facts.acceptance, BAR, strict=False):
        if rate <= bar:
            break
        num_kept += 1
    read = f"accepted by draft position in the finished run: {rates}; the bar: 80%, 60%, 40%"
    if num_kept == min(len(BAR), len(facts.acceptance)):
        return Sighting(Severity.INFO, read, "The draft pays its way.")
    if num_kept == 0:
        return Sighting(
            Severity.WARNING,
            read,
            "Train the draft on this policy's samples, or pass --speculative-algorithm NONE at large batches.",
        )
    return Sighting(
        Severity.WARNING,
        read,
        f"Pass --speculative-num-steps {num_kept} and --speculative-num-draft-tokens {num_kept + 1}, or train the "
        "draft on this policy's samples.",
        (
            *("--speculative-num-steps", str(num_kept), "--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", str(num_kept + 1)),
        ),
    )
