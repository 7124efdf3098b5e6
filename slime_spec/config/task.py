"""These settings say where prompts and rewards come from."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.algorithms import LOOKUP
from slime_spec.config.setting import CORES, MAX_WAIT_S, setting


@dataclass(frozen=True)
class TaskConfig:
    """Holds the settings of ``task``."""

    names: tuple[str, ...] = setting(
        ("arithmetic",), "Tasks in turn: built-in names or module:attribute.", flags=("--task",)
    )
    prompt_data: str | None = setting(
        None, "A jsonl (or parquet) file of prompts instead of built-in tasks; FILE@[0:100] takes some of its rows."
    )
    input_key: str = setting("prompt", "Key of the prompt in prompt_data.")
    label_key: str = setting("label", "Key of the answer in prompt_data.")
    advice_key: str | None = setting(
        None, f"Key of a text in prompt_data that the reply will resemble; {LOOKUP.name} drafts from it. Default: none."
    )
    reward: str = setting(
        "last_integer",
        "Reward of prompt_data: a built-in name, or your own as module:function.",
        flags=("--rm-type", "--custom-rm-path"),
    )
    reward_key: str | None = setting(
        None, "Key of the number in the dict that a reward of your own gives (default: score)."
    )
    reward_timeout_s: float = setting(
        60.0,
        "Longest call of a reward of your own, seconds; a longer call costs its sample.",
        flags=("--reward-timeout", "--rm-timeout"),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    reward_processes: int = setting(4, "Processes that call a reward of your own.", minimum=1, maximum=CORES)
    tool_key: str | None = setting(
        None, "Key of a list of tools (JSON schemas) in prompt_data, for the chat template. Default: none."
    )
    refuse_overlong_prompts: bool = setting(
        False,
        "Refuse a prompt of prompt_data that is longer than max_prompt_len. Default: leave it out, with a warning.",
    )
    system_prompt: str = setting(
        "", "System message put before every prompt (empty: the chat template decides).", may_be_empty=True
    )
    chat_date: str | None = setting(
        None, "Today (YYYY-MM-DD) for a chat template that asks. Default: its own date, or 2024-07-26; never the clock."
    )
    apply_chat_template: bool = setting(True, "Wrap prompts in the tokenizer's chat template.")
