"""``PromptSource`` gives tokenised prompts by id: the same (seed, id) is the same prompt, so a run can resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.schema import by_flag
from slime_spec.config.tree import Config, TaskConfig
from slime_spec.errors import (
    RAISED_BY_FUNCTIONS,
    CheckpointError,
    ConfigError,
    CustomFunctionError,
    raise_all,
    raised,
    refused_by,
)
from slime_spec.files import is_encodable, shortened
from slime_spec.interfaces import Problem, Task
from slime_spec.tasks.jsonl import Choose, JsonlTask, PlacedProblem, check_keys, every_problem
from slime_spec.tasks.judge import Judge, RewardName
from slime_spec.tasks.mix import DataSource, data_sources
from slime_spec.tasks.named_tasks import known_tasks, runs_elsewhere, tasks_named
from slime_spec.tasks.rewards import find_reward, is_named
from slime_spec.tasks.scoring import DirectScorer, PendingSamples, ProcessScorer, Scorer
from slime_spec.tasks.turns import Turns
from slime_spec.types import GeneratedSample, Prompt

logger = logging.getLogger(__name__)
SHOWN_CHARACTERS, SHOWN_IDS = 600, 24  # of the first prompt, half from each end
CHUNK = 1_024  # rows whose tokens are counted at once, on all cores
SAY_EVERY_S = 10.0


class PromptSource:
    """Gives the run's prompts and scores their responses. Example::

    source = PromptSource(config, tokenizer)
    prompts = source.take(8, start_prompt_id=0)
    samples = source.score(prompts[0], responses)()
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        is_scored: bool = True,
        may_lack: frozenset[str] = frozenset(),
    ) -> None:
        """Load the tasks and try them; raises ConfigError for data, a task or a reward that cannot work.

        ``is_scored`` is False for a source of prompts alone, whose rewards are not tried. ``may_lack`` are settings of
        keys that were chosen for other data too, and under which these data need not have anything.
        """
        if config.task.system_prompt and not config.task.apply_chat_template:
            raise ConfigError(
                "task.system_prompt",
                "needs the chat template",
                config.task.system_prompt,
                "Drop --no-apply-chat-template, or write the system prompt into the prompts.",
            )
        self._config = config
        self._tokenizer = tokenizer
        self._tasks = load_tasks(config.task, self._fitting, may_lack)
        self._turns = Turns(_weights(config.task, self._tasks))
        self._scorers: dict[str, Scorer] = {}
        first = [self._prompt(prompt_id) for prompt_id in self._turns.first_of_each()]
        with ExitStack() as opened:
            for task, prompt in zip(self._tasks, first, strict=True) if is_scored else ():
                self._scorers[task.name] = opened.enter_context(closing(_scorer(config, task, prompt)))
            self._opened = opened.pop_all()

    @property
    def num_rows(self) -> int | None:
        """Return the prompts of one epoch, over all sources of data; None for tasks, which never end."""
        rows = [len(task) for task in self._tasks if isinstance(task, JsonlTask)]
        return sum(rows) if rows else None

    def take(self, n: int, start_prompt_id: int) -> tuple[Prompt, ...]:
        """Return the prompts ``start_prompt_id`` to ``start_prompt_id + n - 1``; tasks take turns by their weights."""
        return tuple(self._prompt(start_prompt_id + i) for i in range(n))

    def rows(self) -> tuple[Prompt, ...]:
        """Return the prompts of all data, each once and in the order of its file, under ids of their own."""
        placed = [(task, each) for task in self._tasks if isinstance(task, JsonlTask) for each in task.problems]
        return tuple(self._made(number, task, f"row {number}", each) for number, (task, each) in enumerate(placed))

    def score(self, prompt: Prompt, responses: Sequence[GeneratedSample], owns: Sequence[Any] = ()) -> PendingSamples:
        """Begin to score a prompt's responses by its task's reward; call what is returned to wait for the samples.

        ``owns`` are the samples that a function of the user's own made of the responses, with their texts.
        """
        texts = [own.response for own in owns] or [self._tokenizer.decode(each.token_ids) for each in responses]
        return self._scorers[prompt.task].score(prompt, responses, texts, owns)

    def close(self) -> None:
        """End the processes of rewards."""
        self._opened.close()

    def first_shown(self) -> str:
        """Return the run's first prompt as a reader checks it: its number of tokens, its text, its token ids."""
        (prompt,) = self.take(1, start_prompt_id=0)
        ids = prompt.token_ids
        text = "".join(_first_and_last(self._tokenizer.decode(ids, skip_special=False), SHOWN_CHARACTERS))
        listed = ", ".join(_first_and_last([*map(str, ids)], SHOWN_IDS))
        return f"task={prompt.task} tokens={len(ids)} text={text!r} ids=[{listed}]"

    def _prompt(self, prompt_id: int) -> Prompt:
        turn, index = self._turns.at(prompt_id)
        task = self._tasks[turn]
        where = f"problem {index} of task {task.name}"
        try:
            given = task.problem(index, self._config.run.seed)
        except ConfigError:
            raise
        except RAISED_BY_FUNCTIONS as error:
            raise CustomFunctionError(f"{where} raised {raised(error)}") from error
        return self._made(prompt_id, task, where, given)

    def _made(self, prompt_id: int, task: Task, where: str, given: Problem) -> Prompt:
        """Return the prompt of a task's problem; raises ConfigError that names ``where`` the problem is."""
        problem = _checked(given, where)
        text = self._rendered(problem, where)
        ids = self._tokenizer.encode(text, special=self._adds_special)
        if len(ids) > self._config.rollout.max_prompt_len:
            raise self._overlong(where, len(ids))
        if not ids:
            raise self._empty(where)
        # A user's task may give problems of its own class, which know nothing of advice, labels and metadata.
        return Prompt(
            prompt_id,
            task.name,
            problem.text,
            ids,
            problem.answer,
            advice_token_ids=self._tokenizer.encode(getattr(problem, "advice", ""), special=False),
            label=getattr(problem, "label", None),
            metadata=getattr(problem, "metadata", {}),
            rendered=text,
        )

    def _fitting(self, source: DataSource, placed: Iterable[PlacedProblem]) -> list[Problem]:
        """Leave out problems with more than ``max_prompt_len`` tokens, as slime does; render each for its errors."""
        longest, strict = self._config.rollout.max_prompt_len, self._config.task.refuse_overlong_prompts
        fitting: list[Problem] = []
        num_rows, begun = 0, time.monotonic()
        said = begun
        for chunk in _chunks(placed):
            texts = [self._rendered(_checked(problem, place), place) for place, problem in chunk]
            counts = self._tokenizer.count_tokens(texts, special=self._adds_special)
            for (place, problem), num_tokens in zip(chunk, counts, strict=True):
                if num_tokens == 0:
                    raise self._empty(place)
                if num_tokens <= longest:
                    fitting.append(problem)
                elif strict:
                    raise self._overlong(place, num_tokens)
            num_rows += len(chunk)
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                logger.info("reading prompts file=%s rows=%d for_s=%.0f", source.path, num_rows, said - begun)
        if num_dropped := num_rows - len(fitting):
            self._tell_dropped(source, num_dropped, len(fitting))
        return fitting

    def _tell_dropped(self, source: DataSource, num_dropped: int, num_kept: int) -> None:
        longest = self._config.rollout.max_prompt_len
        if not num_kept:
            rule = f"must let a prompt of {source.path} through: all {num_dropped} are longer"
            raise ConfigError("rollout.max_prompt_len", rule, longest, "Pass a larger --rollout-max-prompt-len.")
        logger.warning(
            "left out overlong prompts file=%s dropped=%d kept=%d max_prompt_len=%d",
            source.path,
            num_dropped,
            num_kept,
            longest,
        )

    def _overlong(self, where: str, num_tokens: int) -> ConfigError:
        return ConfigError(
            "rollout.max_prompt_len",
            f"{where}: the prompt must have at most {self._config.rollout.max_prompt_len} tokens",
            num_tokens,
            "Shorten the prompt, or pass a larger --rollout-max-prompt-len.",
        )

    def _empty(self, where: str) -> ConfigError:
        return ConfigError("task.prompt_data", f"{where}: the prompt must have at least one token", 0, "Write a text.")

    @property
    def _adds_special(self) -> bool:
        """Return whether the tokenizer adds its own special tokens: a chat template writes them itself."""
        return not self._config.task.apply_chat_template

    def _rendered(self, problem: Problem, where: str) -> str:
        """Return the text of a problem that is tokenized."""
        # A user's task may give problems of its own class, which know nothing of messages.
        messages: tuple[Mapping[str, Any], ...] = getattr(problem, "messages", ())
        tools: tuple[Mapping[str, Any], ...] = getattr(problem, "tools", ())
        if self._adds_special:
            if messages or tools:
                raise ConfigError(
                    "task.apply_chat_template",
                    f"{where}: messages and tools need the chat template",
                    False,
                    "Drop --no-apply-chat-template, or write texts without tools.",
                )
            return problem.text
        system = self._config.task.system_prompt
        try:
            return self._tokenizer.chat_text(messages or problem.text, system, tools)
        except CheckpointError as error:
            if not messages and not tools and not system:
                raise
            setting, value = (
                ("task.system_prompt", shortened(system)) if system else ("task.prompt_data", len(messages))
            )
            remedy = "Drop --system-prompt, or write" if system else "Write"
            raise ConfigError(setting, f"{where}: {error.rule}", value, f"{remedy} messages that it takes.") from None


def _checked(problem: Problem, where: str) -> Problem:
    """Return the problem of a task; raises ConfigError for a text that no file or tokenizer accepts."""
    for name in ("text", "answer", "advice"):
        # A user's task may give problems of its own class, which know nothing of advice.
        value = getattr(problem, name, "")
        if not (is_encodable(value) if isinstance(value, str) else name == "answer"):
            raise ConfigError(
                "task.names",
                f"{where}: its {name} must be a text that UTF-8 can encode",
                shortened(ascii(value)),
                "Correct the task.",
            )
    return problem


def _first_and_last(items: Sequence[str], count: int) -> list[str]:
    half = count // 2
    return [*items] if len(items) <= count else [*items[:half], "...", *items[-half:]]


def _chunks(placed: Iterable[PlacedProblem]) -> Iterator[list[PlacedProblem]]:
    rest = iter(placed)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def load_tasks(
    config: TaskConfig, choose: Choose = every_problem, may_lack: frozenset[str] = frozenset()
) -> tuple[Task, ...]:
    """Return the run's tasks in their turn: sources of data, or built-in names, suites and ``module:attribute``."""
    if config.reads_data:
        sources = tuple(JsonlTask(config, source, choose) for source in data_sources(config))
        check_keys(config, sources, may_lack)
        return sources
    if not config.names:
        raise ConfigError("task.names", "must name at least one task", config.names, f"Choose of {known_tasks()}.")
    tasks = tuple(task for name in config.names for task in tasks_named(name))
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("task.names", f"must be distinct; {', '.join(repeated)} comes twice", names, "Drop one.")
    return tasks


def check_data(config: Config, with_reward: bool = True, may_lack: frozenset[str] = frozenset()) -> None:
    """Raise ConfigError for data, tasks and, ``with_reward``, a reward that cannot be loaded, all at once.

    PromptSource, whose ``may_lack`` this is, says more, and needs a tokenizer. A reward's module is imported into this
    process.
    """
    checks: list[Callable[[], object]] = [partial(load_tasks, config.task, may_lack=may_lack)]
    if config.task.reads_data and with_reward:
        checks.append(_reward_of_data(config).load)
    raise_all(refused_by(*checks))


def _weights(config: TaskConfig, tasks: Sequence[Task]) -> list[Fraction]:
    return [source.weight for source in data_sources(config)] if config.reads_data else [Fraction(1)] * len(tasks)


def _scorer(config: Config, task: Task, first: Prompt) -> Scorer:
    """Return the scorer of a task's reward; one that runs in processes is tried once, on the task's first prompt."""
    name = _reward_name(config, task)
    if name is None:
        return DirectScorer(Judge(task.reward))
    if isinstance(task, JsonlTask) and is_named(name.name):
        names = {name.name, *task.reward_names}
        if all(find_reward(name.setting, each).is_quick for each in names):
            return DirectScorer(name.load())
    scorer = ProcessScorer(name, config.task.reward_processes, config.task.reward_timeout_s)
    try:
        scorer.try_on(first)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _reward_name(config: Config, task: Task) -> RewardName | None:
    """Return the name of the reward of data, or of a task that is not of this package; None for those that are."""
    if isinstance(task, JsonlTask):
        return _reward_of_data(config)
    own = (name for name in config.task.names if runs_elsewhere(name) and task in tasks_named(name))
    return next((_made_reward(config, name, is_task=True) for name in own), None)


def _reward_of_data(config: Config) -> RewardName:
    settings = config.task
    return _made_reward(config, settings.reward, is_grouped=settings.group_rm and not is_named(settings.reward))


def _made_reward(config: Config, name: str, is_task: bool = False, is_grouped: bool = False) -> RewardName:
    settings = config.task
    return RewardName(
        name, is_task, settings.reward_key, by_flag(config), is_grouped, limit_s=settings.reward_timeout_s
    )
