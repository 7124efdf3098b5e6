"""A Client asks the engines for the turns of one sample, in tokens: what was generated is never tokenised again.

    turn = await client.generate(sample.tokens)      any tokens: the reply's tokens, logprobs, text
    turn = await client.turn(sample)                 the reply after the sample's tokens, appended to the sample
    client.insert(sample, "<result>5</result>")      a tool's result: loss_mask 0, logprob 0
    client.reply(sample, {"role": "user", ...})      messages as the chat template writes them after a reply

A turn's seed derives from (run seed, prompt id, sample index, turn), so that a rerun gives the same samples. The first
turn has the seed that the sample has without a function of the user's own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import Any

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import as_earlier
from slime_spec.preflight.requests import RequestLimits, check_request
from slime_spec.rl.requests import turn_seed
from slime_spec.sglang.metadata import meta_info
from slime_spec.slime_sample import Sample
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, Prompt, SamplingParams

Submit = Callable[[GroupRequest], "Future[GeneratedSample]"]

# What slime passes besides, which says how SGLang writes texts: a turn's text is its tokens, stop strings included.
WRITING = frozenset(("skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens"))
MOST_SAID = 32  # turns, the latest: what one request carries of them
SETTABLE = frozenset(each.name for each in fields(SamplingParams)) - {"advice_token_ids", "edit", "logit_bias"}


@dataclass(frozen=True)
class Turn:
    """Holds what the policy said in one turn; ``meta_info`` is SGLang's, for ``Sample.append_response_tokens``.

    ``finish_reason`` is "stop", "length" (also where the context has no room: then there are no tokens) or "abort".
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    meta_info: dict[str, Any]


@dataclass(frozen=True)
class MadeTurn:
    """Records a turn: the tokens that the engines were given, and what they generated."""

    prompt_token_ids: tuple[int, ...]
    response: GeneratedSample


@dataclass(frozen=True)
class TurnSettings:
    """Holds what all samples' turns have in common."""

    tokenizer: Tokenizer
    params: SamplingParams
    limits: RequestLimits
    run_seed: int
    submit: Submit
    clock: Callable[[], float]


class SaidInGroup:
    """Holds what the turns of a prompt's samples said, for engines to draft the others' turns from."""

    def __init__(self) -> None:
        self._replies: deque[EarlierReply] = deque(maxlen=MOST_SAID)

    def note(self, response: GeneratedSample, sample_index: int) -> None:
        if response.token_ids:
            self._replies.append(replace(as_earlier(response), sample_index=sample_index))

    def by_others(self, sample_index: int) -> tuple[EarlierReply, ...]:
        """Return the replies of the other samples: a sample's own are in its prompts."""
        return tuple(each for each in self._replies if each.sample_index != sample_index)


@dataclass
class Client:
    """Asks for the turns of one sample, and remembers them: see the module's head.

    ``said`` is there where the algorithm drafts from replies of other samples; it changes no turn.
    """

    settings: TurnSettings
    prompt: Prompt
    sample_index: int
    turns: list[MadeTurn] = field(default_factory=list)
    said: SaidInGroup | None = None
    waited_s: float = 0.0
    _num_asked: int = 0
    _num_waiting: int = 0
    _since: float = 0.0

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, of special tokens in it too, without any that the tokenizer adds by itself."""
        return list(self.settings.tokenizer.encode(text, special=False))

    def decode(self, token_ids: Sequence[int], skip_special: bool = False) -> str:
        return self.settings.tokenizer.decode(token_ids, skip_special=skip_special)

    async def generate(self, token_ids: Sequence[int], sampling_params: Mapping[str, Any] | None = None) -> Turn:
        """Return what the policy says after ``token_ids``; at most what is left of the context.

        ``sampling_params`` stand above the run's. Raises ConfigError for a request that can never run.
        """
        prompt = tuple(int(each) for each in token_ids)
        params = params_of(sampling_params or {}, self.settings.params)
        params = replace(params, advice_token_ids=self.prompt.advice_token_ids)
        room = self.settings.limits.context_length - len(prompt)
        number, self._num_asked = self._num_asked, self._num_asked + 1
        if room < 1:
            return self._turn(_no_room(self._group_id(number), self.sample_index, prompt))
        if params.max_new_tokens > room:
            params = replace(params, max_new_tokens=room, min_new_tokens=min(params.min_new_tokens, room))
        seed = turn_seed(self.settings.run_seed, self.prompt.prompt_id, self.sample_index, number)
        near = self.turns[-1].response.engine if self.turns else None
        earlier = () if self.said is None else self.said.by_others(self.sample_index)
        request = GroupRequest(self._group_id(number), prompt, (seed,), params, near=near, earlier=earlier)
        check_request(request, self.settings.limits)
        made = MadeTurn(prompt, await self._answered(request))
        self.turns.append(made)
        if self.said is not None:
            self.said.note(made.response, self.sample_index)
        return self._turn(made.response)

    async def turn(self, sample: Sample, sampling_params: Mapping[str, Any] | None = None) -> Turn:
        """Have the policy go on after the sample's tokens, and append what it says."""
        turn = await self.generate(sample.tokens, sampling_params)
        sample.append_response_tokens(
            tokens=turn.token_ids, log_probs=turn.logprobs, meta_info=turn.meta_info, text=turn.text
        )
        return turn

    def insert(self, sample: Sample, text: str) -> None:
        """Append a text that no policy said, such as a tool's result: it does not count in the loss."""
        ids = self.encode(text)
        sample.append_response_tokens(tokens=ids, trainable=False, text=self.decode(ids, skip_special=True))

    def reply(self, sample: Sample, *messages: Mapping[str, Any]) -> None:
        """Append messages as the chat template writes them after the assistant's, up to the opening of its next turn.

        Raises ConfigError where the template writes something else before them than it does without them.
        """
        ended = bool(sample.tokens) and sample.tokens[-1] in self.settings.tokenizer.end_token_ids
        self.insert(sample, self.settings.tokenizer.after_assistant(messages, ended))

    def _group_id(self, number: int) -> str:
        return f"{self.prompt.prompt_id}/{self.sample_index}/{number}"

    async def _answered(self, request: GroupRequest) -> GeneratedSample:
        """Wait for an answer; on whatever event loop the user's function runs."""
        clock = self.settings.clock
        if not self._num_waiting:
            self._since = clock()
        self._num_waiting += 1
        try:
            response = await asyncio.wrap_future(self.settings.submit(request))
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self.waited_s += clock() - self._since
        return response

    def _turn(self, response: GeneratedSample) -> Turn:
        text = self.decode(response.token_ids, skip_special=True)
        info = meta_info(response)
        return Turn(list(response.token_ids), list(response.logprobs), text, response.finish_reason, info)


def params_of(given: Mapping[str, Any], run: SamplingParams) -> SamplingParams:
    """Return the run's parameters with those that are given; raises ConfigError for a name that has no meaning here."""
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name in WRITING or value is None:
            continue
        if name not in SETTABLE:
            known = ", ".join(sorted(SETTABLE))
            raise ConfigError(f"sampling_params.{name}", f"must be one of {known}", value, "Leave it out.")
        chosen[name] = tuple([value] if isinstance(value, str) else value) if name.startswith("stop") else value
    if chosen.get("temperature", run.temperature) != run.temperature:
        rule = f"must be the run's ({run.temperature:g}): training compares logprobs at that temperature"
        raise ConfigError("sampling_params.temperature", rule, chosen["temperature"], "Set --rollout-temperature.")
    return replace(run, **chosen)


def _no_room(group_id: str, sample_index: int, prompt: tuple[int, ...]) -> GeneratedSample:
    return GeneratedSample(group_id, sample_index, (), (), "length", 0, len(prompt))
