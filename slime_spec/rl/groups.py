"""Groups makes the samples of prompts, a group at a time, while a step decides which prompts it needs."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from slime_spec.agents.returned import Made
from slime_spec.config.speculation import reads_replies
from slime_spec.config.tree import Config
from slime_spec.interfaces import RunState
from slime_spec.request_feed import RequestFeed
from slime_spec.rl.reply_history import ReplyHistory
from slime_spec.rl.requests import group_requests
from slime_spec.types import GeneratedSample, Prompt


class Groups(Protocol):
    """Makes groups of samples; ``begin`` may be called from any thread."""

    def begin_step(self, feed: RequestFeed, state: RunState) -> None:
        """Ask through this feed from now on, for the step that ``state`` begins."""

    def begin(self, prompt: Prompt) -> Future[list[Made]]:
        """Begin a prompt's group."""

    def arrived(self, response: GeneratedSample) -> None:
        """Take what the engines generated; samples that nobody waits for any more are left out."""

    def check(self) -> None:
        """Raise where the groups cannot go on."""

    def end_step(self) -> None:
        """Give up every group that is not complete."""

    def close(self) -> None: ...


@dataclass
class _Group:
    prompt: Prompt
    num_samples: int
    made: Future[list[Made]]
    responses: list[GeneratedSample] = field(default_factory=list)


class EngineGroups:
    """Implements Groups by one request for each group, as a run without functions of the user's own makes it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._history = ReplyHistory() if reads_replies(config) else None
        self._open: dict[str, _Group] = {}

    def begin_step(self, feed: RequestFeed, state: RunState) -> None:
        self._feed = feed

    def begin(self, prompt: Prompt) -> Future[list[Made]]:
        speculative = self._config.speculative
        edit = speculative.edit and speculative.record.takes_advice
        (request,) = group_requests([prompt], self._config.rollout, self._config.run.seed, edit)
        if self._history is not None:
            request = replace(request, earlier=self._history.of(request.prompt_token_ids))
        group = _Group(prompt, len(request.seeds), Future())
        self._open[request.group_id] = group
        self._feed.put(request)
        return group.made

    def arrived(self, response: GeneratedSample) -> None:
        group = self._open.get(response.group_id)
        if group is None:
            return
        group.responses.append(response)
        if len(group.responses) == group.num_samples:
            self._open.pop(response.group_id, None)
            ordered = sorted(group.responses, key=lambda each: each.sample_index)
            if self._history is not None:
                self._history.note(group.prompt.token_ids, ordered)
            group.made.set_result([Made(group.prompt, each) for each in ordered])

    def check(self) -> None:
        """Do nothing: engines say themselves when they cannot go on."""

    def end_step(self) -> None:
        self._open = {}

    def close(self) -> None:
        """Do nothing: no thread was started."""
