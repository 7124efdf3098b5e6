"""A Judge calls a reward as the kind of function that it is, and makes a finite number or a reason of its answer.

    reward(prompt, reply) -> float                  this project's form
    async custom_rm(args, sample, **kwargs)         slime's, for one sample
    async batched_rm(args, samples, **kwargs)       slime's, for a prompt's whole group; gives a list

Each may be a coroutine function, and may give a dict, of which ``--reward-key`` names the number.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from slime_spec.errors import ConfigError, shown
from slime_spec.files import shortened
from slime_spec.slime_sample import Sample as SlimeSample
from slime_spec.slime_sample import Status
from slime_spec.tasks.rewards import load_attribute, load_reward
from slime_spec.types import GeneratedSample, Prompt

OURS, ONE, GROUP = "reward(prompt, reply)", "reward(args, sample, **kwargs)", "reward(args, samples, **kwargs)"
DEFAULT_KEY = "score"
LARGEST = 1e30  # a group's sums, in 64 bits, and its advantages, in the trainer's 32, are finite


@dataclass(frozen=True)
class Reply:
    """Holds a finished response and its text, as a reward gets it; ``own`` is the sample of a user's own function."""

    prompt: Prompt
    response: GeneratedSample
    text: str
    own: Any = None

    def for_slime(self) -> Any:
        if self.own is not None:
            return self.own
        ids = [*self.prompt.token_ids, *self.response.token_ids]
        status = Status.TRUNCATED if self.response.finish_reason == "length" else Status.COMPLETED
        index, length = self.response.sample_index, len(self.response.token_ids)
        prompt = self.prompt
        return SlimeSample(
            group_index=prompt.prompt_id,
            index=index,
            prompt=prompt.text,
            tokens=ids,
            response=self.text,
            response_length=length,
            label=prompt.answer,
            status=status,
        )


@dataclass(frozen=True)
class Verdict:
    """Holds a finite reward; or None and the reason, whose first line says what happened (a traceback may follow).

    ``is_answer`` is False where the reward gave no answer at all: it raised, hung or ended its process.
    """

    reward: float | None
    error: str = ""
    is_answer: bool = True


@dataclass(frozen=True)
class RewardName:
    """Names a reward of a user's own, so that another process can load it. E.g. ``RewardName("my_rewards:f")``

    ``is_task`` says that ``name`` names a Task, whose method ``reward`` it is. ``args`` are what slime's rewards get as
    ``args``: the settings by the names of their flags.
    """

    name: str
    is_task: bool = False
    key: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        return "task.names" if self.is_task else "task.reward"

    def load(self) -> Judge:
        """Import the reward; raises ConfigError for one that is not there or takes other arguments."""
        if self.is_task:
            function = load_attribute(self.setting, self.name).reward
        else:
            function = load_reward(self.setting, self.name)
        return Judge(function, form_of(function, self.setting, self.name), self.key, SimpleNamespace(**self.args))


@dataclass(frozen=True)
class Judge:
    """Judges replies by one reward function, called in the form that ``form_of`` found."""

    function: Callable[..., Any]
    form: str = OURS
    key: str | None = None
    args: SimpleNamespace = field(default_factory=SimpleNamespace)

    def verdicts(self, replies: Sequence[Reply]) -> list[Verdict]:
        """Return a verdict for each of ``replies``: of one call for a group's form, of a call each otherwise."""
        if self.form == GROUP:
            given = self._given([reply.for_slime() for reply in replies])
            if isinstance(given, Verdict):
                return [given] * len(replies)
            if not isinstance(given, Sequence) or len(given) != len(replies):
                text = f"the reward must be a list of {len(replies)} rewards, it was {shown(given)}"
                return [Verdict(None, text)] * len(replies)
            return [verdict_of(each, self.key) for each in given]
        return [
            verdict_of(self._given(reply.for_slime() if self.form == ONE else reply), self.key) for reply in replies
        ]

    def _given(self, judged: Any) -> Any:
        """Return what the function gives, awaited; a Verdict where it raises (or exits: SystemExit is no reward)."""
        arguments = (judged.prompt, judged.text) if self.form == OURS else (self.args, judged)
        try:
            given = self.function(*arguments)
            return self._loop.run_until_complete(given) if inspect.isawaitable(given) else given
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - it is a user's function
            text = f"the reward raised {type(error).__name__}: {error}\n{users_traceback(error, __file__)}"
            return Verdict(None, text, is_answer=False)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop of all calls: what a coroutine keeps open (an HTTP session) belongs to its loop."""
        return asyncio.new_event_loop()


def verdict_of(given: Any, key: str | None = None) -> Verdict:
    """Return the verdict of what a reward gave; of a dict, of what ``key`` names."""
    if isinstance(given, Verdict):
        return given
    key = key or DEFAULT_KEY
    if isinstance(given, Mapping):
        if key not in given:
            keys = ", ".join(map(repr, given)) or "none"
            return Verdict(None, f"the reward must have the key {key!r} (--reward-key), it has {shortened(keys)}")
        given = given[key]
    number = _finite(given)
    if number is not None and abs(number) <= LARGEST:
        return Verdict(number)
    rule = "a finite number" if number is None else f"a number between -{LARGEST:g} and {LARGEST:g}"
    return Verdict(None, f"the reward must be {rule}, it was {shown(given)}")


def form_of(function: Callable[..., Any], setting: str, name: str) -> str:
    """Return how ``function`` is called, by its parameters; raises ConfigError for parameters of no known form."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function that does not say
        return OURS
    names = [
        each.name
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if names[:2] == ["args", "sample"]:
        return ONE
    if names[:2] == ["args", "samples"]:
        return GROUP
    try:
        signature.bind("prompt", "reply")
    except TypeError:
        rule = f"must name a function {OURS} -> float, or slime's {ONE} or {GROUP}"
        raise ConfigError(setting, rule, f"{name}{signature}", "Write a function of one of these forms.") from None
    return OURS


def _finite(given: object) -> float | None:
    """Return a number, a bool, or a scalar of numpy or torch as a float.

    None for anything else (a text is not a number).
    """
    if not hasattr(given, "__float__"):
        return None
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array or tensor of several numbers
        return None
    return number if math.isfinite(number) else None


def users_traceback(error: BaseException, *callers: str) -> str:
    """Format the traceback from the user's first frame on: after those of the files that call, and of asyncio."""
    ours = {*callers, asyncio.base_events.__file__}
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
