"""These checks refuse settings of prompts and rewards that cannot work together."""

from __future__ import annotations

from datetime import date

from slime_spec.config.tree import Config, TaskConfig
from slime_spec.errors import ConfigError

OF_DATA = (
    *("reward", "input_key", "label_key", "metadata_key", "advice_key", "tool_key", "refuse_overlong_prompts"),
    *("shuffle", "group_rm", "rm_url"),
)
# What apply_chat_template takes itself, and what this project passes to the template.
TAKEN_BY_TRANSFORMERS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs", "strftime_now"),
}


def check_task(config: Config) -> None:
    """Raise ConfigError for settings of prompts and rewards that contradict each other."""
    task = config.task
    _check_sources(task, bool(config.eval.prompt_data or config.eval.config))
    _check_template_values(task)
    _check_chat_date(task)
    if config.run.num_epoch is not None and not task.reads_data:
        rule = "needs --prompt-data: the built-in tasks have no end"
        raise ConfigError("run.num_epoch", rule, config.run.num_epoch, "Pass --num-rollout instead.")
    if task.rm_url is not None and not task.rm_url.startswith(("http://", "https://")):
        raise ConfigError("task.rm_url", "must be an http address", task.rm_url, "Write http://HOST:PORT/PATH.")


def _check_sources(task: TaskConfig, evaluates_data: bool) -> None:
    if task.prompt_data is not None and task.prompt_data_mix:
        raise ConfigError(
            "task.prompt_data_mix",
            f"a run has one source of prompts or a mix, and task.prompt_data is {task.prompt_data}",
            task.prompt_data_mix,
            "Put the file into --prompt-data-mix, or drop one of the two.",
        )
    if task.reads_data and task.names not in ((), TaskConfig().names):
        raise ConfigError(
            "task.prompt_data",
            f"a run has one source of prompts, and task.names is {', '.join(task.names)}",
            task.prompt_data or task.prompt_data_mix,
            "Drop --task (write task.names=[] where an experiment sets it), or drop --prompt-data.",
        )
    if not task.reads_data and not task.names:
        raise ConfigError(
            "task.names", "needs at least one task", task.names, "Pass --task NAME or --prompt-data FILE.jsonl."
        )
    if not task.reads_data and not evaluates_data:  # whose prompts and rewards default to the run's
        for name in OF_DATA:
            if getattr(task, name) != getattr(TaskConfig(), name):
                raise ConfigError(
                    f"task.{name}",
                    "belongs to task.prompt_data: built-in tasks have their own prompts and rewards",
                    getattr(task, name),
                    "Pass --prompt-data FILE.jsonl, or leave it out.",
                )


def _check_template_values(task: TaskConfig) -> None:
    text = task.chat_template_kwargs
    if taken := sorted(task.template_values.keys() & TAKEN_BY_TRANSFORMERS):
        rule = f"must hold names that only the template reads, not {', '.join(taken)}"
        raise ConfigError("task.chat_template_kwargs", rule, text, "Drop them: other settings say what they say.")


def _check_chat_date(task: TaskConfig) -> None:
    try:
        if task.chat_date is not None:
            date.fromisoformat(task.chat_date)
    except ValueError:
        raise ConfigError(
            "task.chat_date", "must be a date as YYYY-MM-DD", task.chat_date, "Pass --chat-date 2025-01-31."
        ) from None
