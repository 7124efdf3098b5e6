"""``PromptSource`` gives tokenised prompts by id: the same (seed, id) is the same prompt, so a run can resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.schema import by_flag
from slime_spec.config.tree import Config, TaskConfig
from slime_spec.errors import CheckpointError, ConfigError
from slime_spec.files import is_encodable, shortened
from slime_spec.interfaces import Problem, Task, unknown_choice
from slime_spec.tasks.builtin import SUITES, TASKS
from slime_spec.tasks.jsonl import JsonlTask
from slime_spec.tasks.judge import Judge, RewardName
from slime_spec.tasks.rewards import REWARDS, load_attribute
from slime_spec.tasks.scoring import DirectScorer, PendingSamples, ProcessScorer, Scorer
from slime_spec.types import GeneratedSample, Prompt

logger = logging.getLogger(__name__)
SHOWN_CHARACTERS, SHOWN_IDS = 600, 24  # of the first prompt, half from each end


class PromptSource:
    """Gives the run's prompts and scores their responses. Example::

    source = PromptSource(config, tokenizer)
    prompts = source.take(8, start_prompt_id=0)
    samples = source.score(prompts[0], responses)()
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, is_scored: bool = True) -> None:
        """Load the tasks and try them; raises ConfigError for data, a task or a reward that cannot work.

        ``is_scored`` is False for a source of prompts alone, whose rewards are not tried.
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
        self._tasks = load_tasks(config.task)
        for task in self._tasks:
            if isinstance(task, JsonlTask):
                self._drop_overlong(task)
        first = self.take(len(self._tasks), start_prompt_id=0)
        self._scorers: dict[str, Scorer] = {}
        with ExitStack() as opened:
            for task, prompt in zip(self._tasks, first, strict=True) if is_scored else ():
                self._scorers[task.name] = opened.enter_context(closing(_scorer(config, task, prompt)))
            self._opened = opened.pop_all()

    def take(self, n: int, start_prompt_id: int) -> tuple[Prompt, ...]:
        """Return the prompts ``start_prompt_id`` to ``start_prompt_id + n - 1``; tasks take turns."""
        return tuple(self._prompt(start_prompt_id + i) for i in range(n))

    def score(self, prompt: Prompt, responses: Sequence[GeneratedSample], owns: Sequence[Any] = ()) -> PendingSamples:
        """Begin to score a prompt's responses by its task's reward; call what is returned to wait for the samples.

        ``owns`` are the samples that a function of the user's own made of the responses, with their texts.
        """
        texts = [own.response for own in owns] or [self._tokenizer.decode(each.token_ids) for each in responses]
        return self._scorers[prompt.task].score(prompt, responses, texts, owns)

    def rows(self) -> tuple[Prompt, ...]:
        """Return the prompts of the data file's rows, once each and in the file's order, with their places as ids."""
        (task,) = self._tasks
        assert isinstance(task, JsonlTask), "built-in tasks have no rows"
        return tuple(self._made(number, task, *row) for number, row in enumerate(task.rows))

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
        index, turn = divmod(prompt_id, len(self._tasks))
        task = self._tasks[turn]
        where = f"problem {index} of task {task.name}"
        return self._made(prompt_id, task, where, task.problem(index, self._config.run.seed))

    def _made(self, prompt_id: int, task: Task, where: str, given: Problem) -> Prompt:
        """Return the prompt of a task's problem; raises ConfigError that names ``where`` the problem is."""
        problem = _checked(given, where)
        ids = self._token_ids(problem, where)
        if len(ids) > self._config.rollout.max_prompt_len:
            raise self._overlong(where, len(ids))
        # A user's task may give problems of its own class, which know nothing of advice.
        advice = self._tokenizer.encode(getattr(problem, "advice", ""), special=False)
        return Prompt(prompt_id, task.name, problem.text, ids, problem.answer, advice)

    def _drop_overlong(self, task: JsonlTask) -> None:
        """Leave out rows with more than ``max_prompt_len`` tokens, as slime does; tokenize every row for its errors."""
        longest, strict = self._config.rollout.max_prompt_len, self._config.task.refuse_overlong_prompts
        fitting = []
        for place, problem in task.rows:
            num_tokens = len(self._token_ids(problem, place))
            if num_tokens <= longest:
                fitting.append((place, problem))
            elif strict:
                raise self._overlong(place, num_tokens)
        num_dropped = len(task.rows) - len(fitting)
        if not fitting:
            raise ConfigError(
                "rollout.max_prompt_len",
                f"must let a prompt of {self._config.task.prompt_data} through: all {num_dropped} are longer",
                longest,
                "Pass a larger --rollout-max-prompt-len.",
            )
        if num_dropped:
            logger.warning(
                "left out overlong prompts file=%s dropped=%d kept=%d max_prompt_len=%d",
                self._config.task.prompt_data,
                num_dropped,
                len(fitting),
                longest,
            )
        task.keep(fitting)

    def _overlong(self, where: str, num_tokens: int) -> ConfigError:
        return ConfigError(
            "rollout.max_prompt_len",
            f"{where}: the prompt must have at most {self._config.rollout.max_prompt_len} tokens",
            num_tokens,
            "Shorten the prompt, or pass a larger --rollout-max-prompt-len.",
        )

    def _token_ids(self, problem: Problem, where: str) -> tuple[int, ...]:
        ids = self._chat(problem, where) if self._config.task.apply_chat_template else self._plain(problem, where)
        if not ids:
            raise ConfigError(
                "task.prompt_data", f"{where}: the prompt must have at least one token", 0, "Write a text."
            )
        return ids

    def _chat(self, problem: Problem, where: str) -> tuple[int, ...]:
        # A user's task may give problems of its own class, which know nothing of messages.
        messages: tuple[Mapping[str, Any], ...] = getattr(problem, "messages", ())
        tools: tuple[Mapping[str, Any], ...] = getattr(problem, "tools", ())
        system = self._config.task.system_prompt
        try:
            return self._tokenizer.chat(messages or problem.text, system, tools)
        except CheckpointError as error:
            if not messages and not tools and not system:
                raise
            setting, value = (
                ("task.system_prompt", shortened(system)) if system else ("task.prompt_data", len(messages))
            )
            remedy = "Drop --system-prompt, or write" if system else "Write"
            raise ConfigError(setting, f"{where}: {error.rule}", value, f"{remedy} messages that it takes.") from None

    def _plain(self, problem: Problem, where: str) -> tuple[int, ...]:
        if getattr(problem, "messages", ()) or getattr(problem, "tools", ()):
            raise ConfigError(
                "task.apply_chat_template",
                f"{where}: messages and tools need the chat template",
                False,
                "Drop --no-apply-chat-template, or write texts without tools.",
            )
        return self._tokenizer.encode(problem.text)


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


def load_tasks(config: TaskConfig) -> tuple[Task, ...]:
    """Return the run's tasks in their turn: one jsonl file, or built-in names, suites and ``module:attribute``."""
    if config.prompt_data is not None:
        return (JsonlTask(config),)
    if not config.names:
        raise ConfigError("task.names", "must name at least one task", config.names, f"Choose of {_known()}.")
    tasks = tuple(task for name in config.names for task in _named(name))
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("task.names", f"must be distinct; {', '.join(repeated)} comes twice", names, "Drop one.")
    return tasks


def _scorer(config: Config, task: Task, first: Prompt) -> Scorer:
    """Return the scorer of a task's reward; tries a reward of the user's own once, on the task's first prompt."""
    name = _own_reward(config, task)
    if name is None:
        return DirectScorer(Judge(task.reward))
    scorer = ProcessScorer(name, config.task.reward_processes, config.task.reward_timeout_s)
    try:
        scorer.try_on(first)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _own_reward(config: Config, task: Task) -> RewardName | None:
    """Return the name of the reward, or of the task, that is a user's own; None for those of this package."""
    key, args = config.task.reward_key, by_flag(config)
    if isinstance(task, JsonlTask):
        return None if config.task.reward in REWARDS else RewardName(config.task.reward, key=key, args=args)
    own = (name for name in config.task.names if ":" in name and load_attribute("task.names", name) is task)
    return next((RewardName(name, is_task=True, key=key, args=args) for name in own), None)


def _named(name: str) -> tuple[Task, ...]:
    if name in SUITES:
        return tuple(TASKS[member] for member in SUITES[name])
    if name in TASKS:
        return (TASKS[name],)
    if ":" not in name:
        raise unknown_choice("task.names", [*TASKS, *SUITES], name)
    task = load_attribute("task.names", name)
    absent = [part for part in ("name", "problem", "reward") if not hasattr(task, part)]
    if absent or isinstance(task, type):
        raise ConfigError(
            "task.names",
            "must name an object with name, problem(index, seed) and reward(prompt, reply)",
            name,
            "Name an instance, not its class." if isinstance(task, type) else f"It lacks {', '.join(absent)}.",
        )
    own: Task = task
    return (own,)


def _known() -> str:
    return ", ".join([*TASKS, *SUITES])
