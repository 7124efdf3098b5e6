"""A Judge calls a reward as the kind of function that it is, and makes a finite number or a reason of its answer.

    reward(prompt, reply) -> float                  this project's form
    async custom_rm(args, sample, **kwargs)         slime's, for one sample
    async batched_rm(args, samples, **kwargs)       slime's, for a prompt's whole group; gives a list
    compute_score(data_source, solution_str, ground_truth, extra_info=None)     verl's, called by these names

Each may be a coroutine function, and may give a dict, of which ``--reward-key`` names the number. Coroutines of a
group's replies run side by side.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from slime_spec.errors import RAISED_BY_FUNCTIONS, ConfigError, raised, shown
from slime_spec.files import shortened
from slime_spec.slime_sample import Sample as SlimeSample
from slime_spec.slime_sample import Status
from slime_spec.tasks.named_tasks import load_task
from slime_spec.tasks.rewards import is_named, load_named, load_reward
from slime_spec.types import GeneratedSample, Prompt

OURS, ONE, GROUP = "reward(prompt, reply)", "reward(args, sample, **kwargs)", "reward(args, samples, **kwargs)"
VERL = "compute_score(data_source, solution_str, ground_truth, extra_info)"
KNOWN = f"{OURS} -> float, or slime's {ONE} or {GROUP}, or verl's {VERL}"
VERLS_OWN = frozenset({"solution_str", "ground_truth"})  # parameters of no other form
DATA_SOURCE = "data_source"  # verl's column of a row's origin
TRLS_OWN = "completions"
TRL_REMEDY = (
    "Call it from one of them: def reward(args, samples): return {name}({calls}=[each.response for each in samples])"
)
DEFAULT_KEY = "score"
ROW_REWARD = "rm_type"  # the key of a row's metadata, as in slime
LONGEST_TOLD = 20_000  # letters of what a user's function raised: a message may hold a whole batch
LARGEST = 1e30  # a group's sums, in 64 bits, and its advantages, in the trainer's 32, are finite


@dataclass(frozen=True)
class Reply:
    """Holds a finished response and its text, as a reward gets it; ``own`` is the sample of a user's own function."""

    prompt: Prompt
    response: GeneratedSample
    text: str
    own: Any = None

    def for_ours(self) -> Prompt:
        """Return the prompt with copies of what a function may change: all replies of a group share one."""
        prompt = self.prompt
        return replace(prompt, label=_copied(prompt.label), metadata=_copied_values(prompt.metadata))

    def for_slime(self) -> Any:
        """Return the sample as slime's rewards get it, with copies of what a function may change."""
        if self.own is not None:
            return self.own
        prompt, response = self.prompt, self.response
        return SlimeSample(
            group_index=prompt.prompt_id,
            index=response.sample_index,
            prompt=prompt.rendered or prompt.text,
            tokens=[*prompt.token_ids, *response.token_ids],
            response=self.text,
            response_length=len(response.token_ids),
            label=prompt.answer if prompt.label is None else _copied(prompt.label),
            status=Status.TRUNCATED if response.finish_reason == "length" else Status.COMPLETED,
            metadata=_copied_values(prompt.metadata),
            rollout_log_probs=list(response.logprobs),
            weight_versions=[str(version) for _, version in response.spans],
        )


def _copied(value: Any) -> Any:
    try:
        return deepcopy(value)
    except Exception:  # noqa: BLE001 - an object of a user's own task, which samples share then
        return value


def _copied_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) for key, value in values.items()}


@dataclass(frozen=True)
class Verdict:
    """Holds a finite reward; or None and the reason, whose first line says what happened (a traceback may follow).

    ``is_answer`` is False where the reward gave no answer at all: it raised, hung or ended its process.
    """

    reward: float | None
    error: str = ""
    is_answer: bool = True


class Judging(Protocol):
    """Gives verdicts, each of which may take long.

    ``takes_groups`` says that all replies to a prompt shall come in one call; ``num_waits`` how many times the limit of
    one call such a call may take.
    """

    @property
    def takes_groups(self) -> bool: ...

    def num_waits(self, num_replies: int) -> int: ...

    def verdicts(self, replies: Sequence[Reply]) -> list[Verdict]: ...


@dataclass(frozen=True)
class RewardName:
    """Names a reward, so that another process can load it. E.g. ``RewardName("my_rewards:f")``, ``RewardName("math")``

    ``is_task`` says that ``name`` names a Task, whose method ``reward`` it is. ``args`` are what slime's rewards get as
    ``args``: the settings by the names of their flags. With ``is_grouped`` a function of the user's own gets a prompt's
    whole group. ``limit_s`` is the longest that one coroutine may take.
    """

    name: str
    is_task: bool = False
    key: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    is_grouped: bool = False
    limit_s: float | None = None

    @property
    def setting(self) -> str:
        return "task.names" if self.is_task else "task.reward"

    def load(self) -> Judging:
        """Import the reward; raises ConfigError for one that is not there or takes other arguments."""
        if not self.is_task and is_named(self.name):
            load_named(self.setting, self.name)
            return JudgeByName(self)
        return self.judge(load_task(self.name).reward if self.is_task else load_reward(self.setting, self.name))

    def judge(self, function: Callable[..., Any]) -> Judge:
        """Make the judge of a function that was loaded."""
        form = form_of(function, self.setting, self.name, self.is_grouped)
        return Judge(function, form, self.key, SimpleNamespace(**self.args), self.limit_s)


class JudgeByName:
    """Judges each reply by the named reward of its row, ``metadata["rm_type"]``, or by the run's."""

    def __init__(self, reward: RewardName) -> None:
        self._reward = reward
        self._judges: dict[str, Judge] = {}

    @property
    def takes_groups(self) -> bool:
        return self._judge(self._reward.name).takes_groups

    def num_waits(self, num_replies: int) -> int:
        return num_replies

    def verdicts(self, replies: Sequence[Reply]) -> list[Verdict]:
        names = [reply.prompt.metadata.get(ROW_REWARD) or self._reward.name for reply in replies]
        verdicts: dict[int, Verdict] = {}
        for name in dict.fromkeys(names):
            places = [place for place, each in enumerate(names) if each == name]
            judged = self._judge(name).verdicts([replies[place] for place in places])
            verdicts |= dict(zip(places, judged, strict=True))
        return [verdicts[place] for place in range(len(replies))]

    def _judge(self, name: str) -> Judge:
        if name not in self._judges:
            self._judges[name] = replace(self._reward, is_grouped=False).judge(load_named(self._reward.setting, name))
        return self._judges[name]


@dataclass(frozen=True)
class Judge:
    """Judges replies by one reward function, called in the form that ``form_of`` found."""

    function: Callable[..., Any]
    form: str = OURS
    key: str | None = None
    args: SimpleNamespace = field(default_factory=SimpleNamespace)
    limit_s: float | None = None

    @property
    def takes_groups(self) -> bool:
        call = getattr(self.function, "__call__", None)  # noqa: B004 - an object whose call is a coroutine function
        return self.form == GROUP or inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def num_waits(self, num_replies: int) -> int:
        # A coroutine that never gives way holds up the others: each has the limit to itself.
        return 1 if self.form == GROUP else num_replies

    def verdicts(self, replies: Sequence[Reply]) -> list[Verdict]:
        """Return a verdict for each of ``replies``: of one call for a group's form, of a call each otherwise."""
        if self.form == GROUP:
            (given,) = self._given([[reply.for_slime() for reply in replies]])
            if isinstance(given, Verdict):
                return [given] * len(replies)
            if hasattr(given, "tolist"):  # an array or a tensor
                given = given.tolist()
            if not isinstance(given, Sequence) or len(given) != len(replies):
                text = f"the reward must be a list of {len(replies)} rewards, it was {shown(given)}"
                return [Verdict(None, text)] * len(replies)
            return [verdict_of(each, self.key) for each in given]
        judged = [reply.for_slime() if self.form == ONE else reply for reply in replies]
        return [verdict_of(given, self.key) for given in self._given(judged)]

    def _given(self, judged: Sequence[Any]) -> list[Any]:
        """Return what the function gives for each, awaited together; a Verdict where it raises."""
        called = [self._called(each) for each in judged]
        waiting = [place for place, given in enumerate(called) if inspect.isawaitable(given)]
        if waiting:
            awaited = self._loop.run_until_complete(self._together([called[place] for place in waiting]))
            for place, given in zip(waiting, awaited, strict=True):
                called[place] = given
        return called

    def _called(self, judged: Any) -> Any:
        try:
            if self.form == VERL:
                return self.function(**{name: value for name, value in verls(judged).items() if name in self._takes})
            return self.function(*((judged.for_ours(), judged.text) if self.form == OURS else (self.args, judged)))
        except RAISED_BY_FUNCTIONS as error:
            return _raised(error)

    async def _together(self, given: Sequence[Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*map(self._awaited, given))

    async def _awaited(self, given: Awaitable[Any]) -> Any:
        limit = asyncio.timeout(None if self.form == GROUP else self.limit_s)
        try:
            async with limit:
                return await given
        except RAISED_BY_FUNCTIONS as error:
            if limit.expired():
                return Verdict(None, f"the reward gave no answer within {self.limit_s:g} s (--reward-timeout)", False)
            return _raised(error)

    @cached_property
    def _takes(self) -> frozenset[str]:
        """Return which of verl's arguments the function takes: all, where it takes any keyword."""
        parameters = inspect.signature(self.function).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        return frozenset({*VERLS_OWN, DATA_SOURCE, "extra_info"} if takes_any else parameters)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop of all calls: what a coroutine keeps open (an HTTP session) belongs to its loop."""
        return asyncio.new_event_loop()


def verls(reply: Reply) -> dict[str, Any]:
    """Return the arguments of verl's rewards, which has a reply's text without its prompt as ``solution_str``."""
    prompt = reply.prompt
    return {
        DATA_SOURCE: prompt.metadata.get(DATA_SOURCE, prompt.task),
        "solution_str": reply.text,
        "ground_truth": prompt.answer if prompt.label is None else _copied(prompt.label),
        "extra_info": _copied_values(prompt.metadata),
    }


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


def form_of(function: Callable[..., Any], setting: str, name: str, is_grouped: bool = False) -> str:
    """Return how ``function`` is called, by its parameters; raises ConfigError for parameters of no known form.

    slime's take ``args`` first; what comes next is the group where it is called ``samples``, or by ``is_grouped``.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function that does not say
        return OURS
    names = [
        each.name
        for each in signature.parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    named = set(signature.parameters)
    if named >= VERLS_OWN and not is_grouped:
        return VERL
    if TRLS_OWN in named:
        rule = f"must name a function {KNOWN}; TRL's takes columns of its data"
        remedy = TRL_REMEDY.format(name=name.replace(":", ".").rpartition(".")[2], calls=TRLS_OWN)
        raise ConfigError(setting, rule, f"{name}{signature}", remedy)
    if names[:1] == ["args"] and len(names) > 1:
        return GROUP if is_grouped or names[1] == "samples" else ONE
    if is_grouped:
        rule = f"must name a function {GROUP}, as task.group_rm asks for"
        raise ConfigError(setting, rule, f"{name}{signature}", "Drop --group-rm, or take args and samples.")
    try:
        signature.bind("prompt", "reply")
    except TypeError:
        rule = f"must name a function {KNOWN}"
        raise ConfigError(setting, rule, f"{name}{signature}", "Write a function of one of these forms.") from None
    return OURS


def _finite(given: object) -> float | None:
    """Return a number, a bool, or a scalar of numpy or torch as a float.

    None for anything else (a text is not a number, and of a complex number only a half would be).
    """
    if not hasattr(given, "__float__") or isinstance(given, np.complexfloating):
        return None
    try:
        number = float(given)
    except Exception:  # noqa: BLE001 - an array or tensor of several numbers; a class of a user's own
        return None
    return number if math.isfinite(number) else None


def _raised(error: BaseException) -> Verdict:
    return Verdict(None, f"the reward raised {told_of(error, __file__)}", is_answer=False)


def told_of(error: BaseException, *callers: str) -> str:
    """Return what a user's function raised, with the traceback from the user's first frame on.

    That is after the frames of the files that call, and of asyncio.
    """
    ours = {*callers, asyncio.base_events.__file__, asyncio.tasks.__file__}
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    trace = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    return shortened(f"{shortened(raised(error), LONGEST_TOLD // 4)}\n{trace}", LONGEST_TOLD)
