"""SGLang's response metadata as speculative counters, whichever of its three generations of keys wrote it.

    from 0.5.12     spec_num_correct_drafts, spec_num_proposed_drafts, spec_correct_drafts_histogram
    0.5.11          spec_accepted_drafts, spec_proposed_drafts, spec_accept_histogram (0.5.12 to 0.5.20 write both)
    up to 0.5.10    spec_accept_token_num, spec_draft_token_num, and from 0.5.9 spec_accept_histogram
    all             spec_verify_ct

The generation is read from the response itself. No keys at all mean that no verify round ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from slime_spec.types import SpecCounters

ROUNDS = "spec_verify_ct"


@dataclass(frozen=True)
class Generation:
    """The names of one generation; ``histogram`` may be absent in its oldest versions."""

    correct: str
    proposed: str
    histogram: str


GENERATIONS = (
    Generation("spec_num_correct_drafts", "spec_num_proposed_drafts", "spec_correct_drafts_histogram"),
    Generation("spec_accepted_drafts", "spec_proposed_drafts", "spec_accept_histogram"),
    Generation("spec_accept_token_num", "spec_draft_token_num", "spec_accept_histogram"),
)


class UnknownMetadataError(ValueError):
    """Verify rounds were reported under keys of no known generation: counting them as zero would be a lie."""


def generation_of(meta_info: Mapping[str, Any]) -> Generation | None:
    """The newest generation whose counters the response has; None where no verify round ran."""
    if not meta_info.get(ROUNDS):
        return None
    for generation in GENERATIONS:
        if generation.correct in meta_info and generation.proposed in meta_info:
            return generation
    keys = sorted(key for key in meta_info if key.startswith("spec_"))
    raise UnknownMetadataError(f"{meta_info[ROUNDS]} verify rounds under unknown keys: {', '.join(keys)}")


def spec_counters(meta_info: Mapping[str, Any], num_steps: int = 0, fills_rounds: bool = True) -> SpecCounters:
    """The counters of one response.

    ``num_steps`` is the depth of a draft (SpecCounters.num_steps). ``fills_rounds`` says that the algorithm always
    drafts all it proposes; NGRAM does not, and SGLang does not tell how much of a round was padding.
    Example: ``spec_counters({"spec_verify_ct": 2, "spec_accepted_drafts": 3, "spec_proposed_drafts": 6}).num_correct``
    is 3.
    """
    generation = generation_of(meta_info)
    if generation is None:
        return SpecCounters()
    histogram = tuple(int(count) for count in meta_info.get(generation.histogram) or ())
    binned = sum(accepted * count for accepted, count in enumerate(histogram))
    proposed = int(meta_info[generation.proposed])
    return SpecCounters(
        num_rounds=int(meta_info[ROUNDS]),
        num_proposed=proposed,
        histogram=histogram,
        num_drafted=proposed if fills_rounds else 0,
        num_steps=num_steps,
        num_correct_unbinned=int(meta_info[generation.correct]) - binned,
    )


def pooled(counters: Iterable[SpecCounters]) -> SpecCounters:
    """The counters of several responses, or of the parts of one, as one: sums, never means of ratios."""
    listed = [each for each in counters if each.num_rounds]
    if len(listed) == 1:
        return listed[0]
    return SpecCounters(
        num_rounds=sum(each.num_rounds for each in listed),
        num_proposed=sum(each.num_proposed for each in listed),
        histogram=tuple(map(sum, zip_longest(*(each.histogram for each in listed), fillvalue=0))),
        num_drafted=sum(each.num_drafted for each in listed),
        num_empty_rounds=sum(each.num_empty_rounds for each in listed),
        num_steps=max((each.num_steps for each in listed), default=0),
        num_correct_unbinned=sum(each.num_correct_unbinned for each in listed),
    )
