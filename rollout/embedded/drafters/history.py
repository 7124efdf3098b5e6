"""HISTORY drafts what followed the latest tokens in texts of the same prompt, finished replies before all others.

    siblings   the group's samples that have finished, each added whole when it ends, and those that came with the
               request because another engine, or an earlier step, finished them
    earlier    replies of other steps, which come with the request; they halve in weight every HALF_LIFE_VERSIONS
    reply      the sample itself
    prompt

Each source is searched for the longest suffix of the sequence, of 2 to 8 tokens. An earlier source stands before a
later one, unless the later one's match is longer by more than ``NEAR``. The draft is a chain: token after token the
continuation of most weight among the places of the match; places that went on otherwise drop out.

Each node says what is expected of it (Draft.expected; drafters/calibration.py), by how drafts alike compared with the
tokens that the sequence went on with, whether they were verified or not: a token has the target's probability of being
either accepted or emitted. A chain ends where it is less than ``LEAST_REACH`` likely to be reached, but its first token
is always drafted.
The target's noise and logits are never looked at: the drafts are chosen tokens, and every verification rule is exact
for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.calibration import Calibration, bucket_of
from rollout.embedded.drafters.occurrences import LONGEST_MATCH, Match, Occurrences
from rollout.embedded.drafting import DraftContext, WeightlessDrafter
from slime_spec.config.tree import SpeculativeConfig

NUM_SOURCES = 4
NEAR = 1
LEAST_REACH = 0.1
HALF_LIFE_VERSIONS = 16.0
MAX_INDEXED_TOKENS = 65_536  # of one prompt and source, some 200 bytes each


@dataclass(eq=False)
class PromptTexts:
    """Holds what all samples of a prompt draft from."""

    siblings: Occurrences = field(default_factory=Occurrences)
    earlier: Occurrences = field(default_factory=Occurrences)
    prompt: Occurrences = field(default_factory=Occurrences)


@dataclass(eq=False)
class Reply:
    """Holds a running sample's own text, from the end of its prompt on, and the last draft that was made for it."""

    text: Occurrences = field(default_factory=Occurrences)
    num_seen: int = 0  # tokens of the sequence, prompt included
    drafted: list[int] = field(default_factory=list)  # tokens, after ``num_before`` tokens of the sequence
    buckets: list[int] = field(default_factory=list)
    num_before: int = 0

    def read(self, context: DraftContext) -> None:
        """Index what the sequence has more than it had."""
        tokens, num_context = context.token_ids, 0
        if not self.num_seen:
            self.num_seen = _context_start(context.num_prompt_tokens)
            num_context = context.num_prompt_tokens - self.num_seen
        self.text.extend(tokens[self.num_seen :], num_context=num_context)
        self.num_seen = len(tokens)


class HistoryDrafter(WeightlessDrafter):
    """Drafts chains from a prompt's finished and earlier replies, from the reply itself and from the prompt."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._prompts: dict[int, PromptTexts] = {}
        self._replies: dict[int, Reply] = {}
        self._calibration = Calibration(NUM_SOURCES)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [self._propose(context) for context in contexts]

    def forget(self, request_key: int) -> None:
        self._replies.pop(request_key, None)

    def finished(self, prompt_key: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        _add(self._texts(prompt_key).siblings, token_ids, num_prompt_tokens)

    def ended(self, prompt_key: int) -> None:
        self._prompts.pop(prompt_key, None)

    def _propose(self, context: DraftContext) -> Draft:
        texts, reply = self._texts(context.prompt_key), self._reply(context)
        if not len(texts.prompt):
            _read(texts, context)
        sources = texts.siblings, texts.earlier, reply.text, texts.prompt
        found = _best_match(sources, reply, context)
        if found is None:
            return NO_DRAFT
        source, (length, places) = found
        chain: list[int] = []
        expected: list[float] = []
        reach = 1.0
        limit = min(context.max_draft_tokens, context.max_depth)
        for each in sources[source].continuations(places, limit):
            bucket = bucket_of(source, length, each)
            expectation = self._calibration.expected(bucket, each)
            reach *= expectation
            if chain and reach < LEAST_REACH:
                break
            chain.append(each.token_id)
            expected.append(expectation)
            reply.buckets.append(bucket)
            length = min(length + 1, LONGEST_MATCH)
        reply.drafted = chain
        return Draft.chain(chain, expected=tuple(expected))

    def _texts(self, prompt_key: int) -> PromptTexts:
        texts = self._prompts.get(prompt_key)
        if texts is None:
            texts = self._prompts[prompt_key] = PromptTexts()
        return texts

    def _reply(self, context: DraftContext) -> Reply:
        """Return the sample's text, and learn from how the last draft compares with the tokens since."""
        reply = self._replies.get(context.request_key)
        if reply is None:
            reply = self._replies[context.request_key] = Reply()
        elif reply.drafted:
            emitted = context.token_ids[reply.num_before : reply.num_before + len(reply.drafted)]
            pairs = zip(reply.drafted, emitted, strict=False)
            num_right = next((depth for depth, (ours, theirs) in enumerate(pairs) if ours != theirs), len(emitted))
            self._calibration.note(reply.buckets[: len(emitted)], num_right)
        reply.drafted, reply.buckets, reply.num_before = [], [], len(context.token_ids)
        return reply


def _best_match(sources: Sequence[Occurrences], reply: Reply, context: DraftContext) -> tuple[int, Match] | None:
    """Return the source to draft from and its match: the first source's, unless a later one's is far longer.

    The reply is indexed when it is searched: a sample that follows its siblings never pays for that.
    """
    tail = list(context.token_ids[-LONGEST_MATCH:])
    best: tuple[int, Match] | None = None
    for source, texts in enumerate(sources):
        if texts is reply.text:
            reply.read(context)
        match = texts.longest(tail)
        if match is not None and (best is None or match.length > best[1].length + NEAR):
            best = source, match
        if best is not None and best[1].length + NEAR >= len(tail):
            break
    return best


def _read(texts: PromptTexts, context: DraftContext) -> None:
    """Index the prompt and the replies that came with the request."""
    prompt = context.token_ids[: context.num_prompt_tokens]
    texts.prompt.add(prompt)
    newest = max((reply.weight_version for reply in context.earlier), default=0)
    for reply in context.earlier:
        weight = 0.5 ** ((newest - reply.weight_version) / HALF_LIFE_VERSIONS)
        source = texts.siblings if reply.is_sibling else texts.earlier
        _add(source, [*prompt, *reply.token_ids], len(prompt), weight)


def _add(texts: Occurrences, token_ids: Sequence[int], num_prompt_tokens: int, weight: float = 1.0) -> None:
    """Index a whole sequence's reply, unless the prompt has too many."""
    start = _context_start(num_prompt_tokens)
    if len(texts) + len(token_ids) - start <= MAX_INDEXED_TOKENS:
        texts.add(token_ids[start:], weight, num_prompt_tokens - start)


def _context_start(num_prompt_tokens: int) -> int:
    """Return where the tokens of a prompt begin that the first tokens of its replies are matched by."""
    return max(0, num_prompt_tokens - LONGEST_MATCH)
