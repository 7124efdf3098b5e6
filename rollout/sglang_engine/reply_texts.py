"""ReplyTexts holds what a corpus is made of: the replies to the prompts of the groups in progress.

It is plain data: a group begins with the replies that come with its request, hears of others, and ends with its last
sample. SGLang searches one corpus for all requests, so texts of other prompts would only be in the way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from slime_spec.types import EarlierReply, GroupRequest

CONTEXT_TOKENS = 16  # of a prompt's end, by which a server finds the first tokens of its replies
MAX_AGE_VERSIONS = 64  # replies of older weights than so many versions before the newest are left out
MAX_CORPUS_TOKENS = 100_000  # a server tokenises them in a second, before it answers anything else


@dataclass(eq=False)
class GroupTexts:
    """Holds the replies to one group's prompt."""

    context: tuple[int, ...]
    num_unfinished: int
    replies: list[EarlierReply] = field(default_factory=list)


class ReplyTexts:
    """Holds the texts of every group in progress; ``max_tokens`` bounds what ``take`` returns. Example::

    texts.begin(group, request)
    texts.learn(group, replies)
    documents = texts.take()
    texts.sample_ended(group)       # once for each of its samples
    """

    def __init__(self, max_tokens: int = MAX_CORPUS_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._groups: dict[Hashable, GroupTexts] = {}
        self.num_fresh = 0  # tokens that came since the last ``take``
        self.num_taken = 0  # tokens that the last ``take`` returned

    def begin(self, group: Hashable, request: GroupRequest) -> None:
        self._groups[group] = GroupTexts(request.prompt_token_ids[-CONTEXT_TOKENS:], len(request.seeds))
        self.learn(group, request.earlier)

    def learn(self, group: Hashable, replies: Iterable[EarlierReply]) -> None:
        """Note replies to the prompt of a group; those of a group that has ended are dropped."""
        if (texts := self._groups.get(group)) is not None:
            new = [reply for reply in replies if reply.token_ids]
            texts.replies += new
            self.num_fresh += sum(len(reply.token_ids) for reply in new)

    def sample_ended(self, group: Hashable) -> None:
        texts = self._groups[group]
        texts.num_unfinished -= 1
        if not texts.num_unfinished:
            del self._groups[group]

    def take(self) -> list[tuple[int, ...]]:
        """Return each reply behind the end of its prompt, those of the newest weights last.

        Of several continuations a server takes the latest in its corpus first. Where there are too many tokens, the
        replies of the oldest weights are left out, and a group's own samples are the last to be.
        """
        texts = [(reply, group.context) for group in self._groups.values() for reply in group.replies]
        newest = max((reply.weight_version for reply, _ in texts), default=0)
        texts = [each for each in texts if each[0].weight_version > newest - MAX_AGE_VERSIONS]
        texts.sort(key=lambda each: (each[0].is_sibling, each[0].weight_version))
        taken: list[tuple[int, ...]] = []
        self.num_fresh = self.num_taken = 0
        for reply, context in reversed(texts):
            if self.num_taken + len(context) + len(reply.token_ids) > self._max_tokens:
                break
            taken.append((*context, *reply.token_ids))
            self.num_taken += len(taken[-1])
        return taken[::-1]

    def lose(self) -> None:
        """Count all texts as fresh: what was taken is lost."""
        self.num_taken = 0
        self.num_fresh = sum(len(reply.token_ids) for each in self._groups.values() for reply in each.replies)
