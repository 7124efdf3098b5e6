"""Every response has its counters under the keys of every generation of SGLang, so that each framework finds its own.

slime, miles and verl read the keys of SGLang 0.5.10 and older, which no release since writes; RTP-LLM's clients read
the accepted drafts per position.
"""

from __future__ import annotations

from typing import Any

from rollout.sglang_engine.plugin.draft_safe import MANAGER
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.state import STATE, Detail, logger

UNKNOWN = "responses_with_unknown_counters"


class Completion:
    """The hook after SGLang has counted a response's drafts, and how many responses it could not read."""

    def __init__(self) -> None:
        self.counts = {UNKNOWN: 0}

    def complete(self, result: None, manager: Any, meta_info: dict[str, Any], recv_obj: Any, i: int) -> None:
        """Adds what the response lacks; SGLang's own values stay as they are.

        What cannot be read is counted, and said once: raised, it would end SGLang's loop of responses.
        """
        from slime_spec.sglang.metadata import in_every_generation

        num_steps = getattr(manager.server_args, "speculative_num_steps", None) or 0
        try:
            meta_info.update(in_every_generation(meta_info, num_steps))
        except (KeyError, TypeError, ValueError) as error:  # among them counters under unknown keys
            self.counts[UNKNOWN] += 1
            if self.counts[UNKNOWN] == 1:
                logger.error("slime_spec plug-in: responses keep SGLang's own keys only: %r", error)


COMPLETION = Completion()
STATE.details["metadata"] = Detail("main", lambda: COMPLETION.counts)
FEATURE = Feature(
    "metadata",
    "adds the counters of speculation under the keys of every generation",
    (
        Contract(
            "0.5.15 to 0.5.23",
            (
                Hook(
                    Name(f"{MANAGER}._calculate_spec_decoding_metrics", ("self", "meta_info", "recv_obj", "i")),
                    "after",
                    "main",
                    COMPLETION.complete,
                ),
            ),
        ),
    ),
)
