"""Reading keeps what a draft network has read of each sequence, so that what it must read first can be weighed.

A network reads a sequence's new tokens, and the first time its group's prompt, when it drafts for the sequence or
catches up. Rounds without drafts leave tokens unread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rollout.embedded.drafting import DraftContext, Drafter, Prefill
from rollout.embedded.request import Group, SampleState


class Reading:
    """Counts the tokens that ``drafter`` has read; one without a network has never anything to read."""

    def __init__(self, drafter: Drafter) -> None:
        self._reads = drafter.weights is not None
        self._reads_prompts_late = drafter.needs.any  # their features wait for the first draft
        self._num_read: dict[int, int] = {}  # tokens, by request
        self._read_prompts: set[int] = set()

    def backlog(self, sequence: SampleState) -> int:
        """Return the tokens that must be read before a draft, the root included; a group shares its prompt's."""
        group = sequence.group
        if not self._reads_prompts_late or group.key in self._read_prompts:
            return self.unread(sequence)
        return self.unread(sequence) + -(-group.num_prompt_tokens // max(1, group.num_unfinished))

    def unread(self, sequence: SampleState) -> int:
        """Return the tokens after its prompt that have not been read."""
        if not self._reads:
            return 0
        return len(sequence.token_ids) - self._num_read.get(sequence.key, sequence.group.num_prompt_tokens)

    def prefilled(self, prefills: Iterable[Prefill]) -> None:
        """Note tokens of sequences' own rows that were shown at once."""
        for prefill in prefills:
            if not prefill.shared:
                self._num_read[prefill.key] = prefill.start + len(prefill.token_ids)

    def drafted(self, sequences: Sequence[SampleState]) -> None:
        """Note that all tokens of these sequences have been read."""
        self._num_read |= {each.key: len(each.token_ids) for each in sequences}
        self._read_prompts.update(each.group.key for each in sequences)

    def caught_up(self, contexts: Iterable[DraftContext]) -> None:
        """Note that all tokens but the roots of these sequences have been read."""
        for context in contexts:
            self._num_read[context.request_key] = len(context.token_ids) - 1
            self._read_prompts.add(context.prompt_key)

    def forget(self, sequence: SampleState) -> None:
        self._num_read.pop(sequence.key, None)

    def forget_prompt(self, group: Group) -> None:
        self._read_prompts.discard(group.key)
