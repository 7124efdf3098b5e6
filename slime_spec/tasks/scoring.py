"""A Scorer makes scored samples of a prompt's responses; a reward that fails costs its samples, not the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slime_spec.errors import ConfigError
from slime_spec.tasks.judge import Judging, Reply, RewardName, Verdict
from slime_spec.tasks.reward_processes import RewardProcesses
from slime_spec.types import GeneratedSample, Prompt, Sample

logger = logging.getLogger(__name__)

PendingSamples = Callable[[], list[Sample]]  # waits for the rewards


class Scorer(Protocol):
    """Scores a prompt's finished responses, of which ``texts`` are the texts.

    ``owns`` are the samples that a function of the user's own made of them, if it did.
    """

    def score(
        self, prompt: Prompt, responses: Sequence[GeneratedSample], texts: Sequence[str], owns: Sequence[Any] = ()
    ) -> PendingSamples:
        """Begin to score; what is returned waits for a sample of each response, in order.

        Excluded samples have ``reward=None`` and the reason.
        """

    def close(self) -> None: ...


class DirectScorer:
    """Scores here and now: for rewards of this package, which end, and end nothing."""

    def __init__(self, judge: Judging) -> None:
        self._judge = judge

    def score(
        self, prompt: Prompt, responses: Sequence[GeneratedSample], texts: Sequence[str], owns: Sequence[Any] = ()
    ) -> PendingSamples:
        replies = _replies(prompt, responses, texts, owns)
        samples = _samples(replies, self._judge.verdicts([reply for reply in replies if _is_judged(reply)]))
        return lambda: samples

    def close(self) -> None:
        """Do nothing: no process was started."""


class ProcessScorer:
    """Scores in processes, beside the generation of other groups: for a user's own rewards, and slow ones."""

    def __init__(self, reward: RewardName, num_processes: int, limit_s: float) -> None:
        """Load the reward; raises ConfigError for one that cannot be called."""
        self._reward, self._judge = reward, reward.load()
        self._processes = RewardProcesses(reward, num_processes, limit_s)

    def try_on(self, prompt: Prompt) -> None:
        """Call the reward once, with an empty reply; raises ConfigError for an answer that can never be a reward.

        That it raises is a warning: an empty reply may be more than it can judge.
        """
        nothing = GeneratedSample(str(prompt.prompt_id), 0, (), (), "stop", 0, 0)
        (verdict,) = self._processes.verdicts([Reply(prompt, nothing, "")]).result()
        if verdict.reward is not None:
            return
        reason = verdict.error.partition("\n")[0]
        if verdict.is_answer:
            rule = f"must give a reward for an empty reply to the first prompt: {reason}"
            raise ConfigError(
                self._reward.setting, rule, self._reward.name, "Return a finite number, or a dict with one."
            )
        logger.warning("reward failed on an empty reply name=%s error=%s", self._reward.name, verdict.error)

    def score(
        self, prompt: Prompt, responses: Sequence[GeneratedSample], texts: Sequence[str], owns: Sequence[Any] = ()
    ) -> PendingSamples:
        replies = _replies(prompt, responses, texts, owns)
        judged = [reply for reply in replies if _is_judged(reply)]
        calls = [judged] if self._judge.takes_groups and judged else [[reply] for reply in judged]
        answers = [self._processes.verdicts(call, self._judge.num_waits(len(call))) for call in calls]
        return lambda: _samples(replies, [verdict for answer in answers for verdict in answer.result()])

    def close(self) -> None:
        self._processes.close()


def _replies(
    prompt: Prompt, responses: Sequence[GeneratedSample], texts: Sequence[str], owns: Sequence[Any]
) -> list[Reply]:
    return [Reply(prompt, *each) for each in zip(responses, texts, owns or [None] * len(texts), strict=True)]


def _is_judged(reply: Reply) -> bool:
    return reply.response.finish_reason != "abort"


def _samples(replies: Sequence[Reply], verdicts: Sequence[Verdict]) -> list[Sample]:
    """Return a sample of each reply, with the verdicts of those that were judged."""
    waiting = iter(verdicts)
    samples = []
    for reply in replies:
        verdict = Verdict(None, "the response was aborted before it finished")
        if _is_judged(reply):
            verdict = next(waiting)
            warn_of(reply, verdict)
        samples.append(Sample(reply.prompt, reply.response, reply.text, verdict.reward, verdict.error))
    return samples


def warn_of(reply: Reply, verdict: Verdict) -> None:
    """Log why a sample is excluded, if it is."""
    if verdict.reward is None:
        logger.warning(
            "excluded sample task=%s prompt_id=%d sample=%d error=%r",
            reply.prompt.task,
            reply.prompt.prompt_id,
            reply.response.sample_index,
            verdict.error.partition("\n")[0],
        )
