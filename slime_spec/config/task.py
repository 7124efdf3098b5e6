"""These settings say where prompts and rewards come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.algorithms import LOOKUP
from slime_spec.config.setting import CORES, MAX_WAIT_S, setting
from slime_spec.files import parse_json_object

TEMPLATE_VALUES = 'Write {"enable_thinking": false}.'


@dataclass(frozen=True)
class TaskConfig:
    """Holds the settings of ``task``."""

    names: tuple[str, ...] = setting(
        ("arithmetic",), "Tasks in turn: built-in names or module:attribute.", flags=("--task",)
    )
    prompt_data: str | None = setting(
        None,
        "Prompts instead of built-in tasks: a jsonl or parquet file, a folder of parquet files, or a folder of Hugging "
        "Face datasets (save_to_disk); @[0:100] takes some rows, @test and @test[0:100] those of a split.",
    )
    prompt_data_mix: tuple[str, ...] = setting(
        (), "Several files or folders as in prompt_data, each as NAME=WEIGHT:PATH; prompts come in these proportions."
    )
    input_key: str = setting("prompt", "Key of the prompt in prompt_data; a.b is the key b in the object under a.")
    label_key: str = setting("label", "Key of the answer in prompt_data.")
    metadata_key: str | None = setting(
        "metadata",
        "Key of an object in prompt_data for rewards and custom functions; its rm_type is the row's reward. "
        "null: read none.",
    )
    advice_key: str | None = setting(
        None, f"Key of a text in prompt_data that the reply will resemble; {LOOKUP.name} drafts from it. Default: none."
    )
    reward: str = setting(
        "last_integer",
        "Reward of prompt_data: a built-in name (docs/prompts.md), or your own as module:function.",
        flags=("--rm-type", "--custom-rm-path"),
    )
    reward_key: str | None = setting(None, "Key of the number in the dict that a reward gives (default: score).")
    group_rm: bool = setting(
        False, "Call a reward of your own once for all replies to a prompt: reward(args, samples), which gives a list."
    )
    rm_url: str | None = setting(None, "Address of the server that --rm-type remote_rm asks.")
    reward_timeout_s: float = setting(
        60.0,
        "Longest call of a reward that runs in processes, seconds; a longer call costs its sample.",
        flags=("--reward-timeout", "--rm-timeout"),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    reward_processes: int = setting(
        4, "Processes that call a reward of your own, and math's.", minimum=1, maximum=CORES
    )
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
    chat_template_kwargs: str = setting(
        "{}",
        'JSON object of names that the chat template reads, such as {"enable_thinking": false}.',
        flags=("--apply-chat-template-kwargs",),
    )
    shuffle: bool = setting(
        True,
        "Draw another order of prompt_data's rows for every epoch; without, they come in the file's order.",
        flags=("--rollout-shuffle",),
    )
    chat_date: str | None = setting(
        None, "Today (YYYY-MM-DD) for a chat template that asks. Default: its own date, or 2024-07-26; never the clock."
    )
    apply_chat_template: bool = setting(True, "Wrap prompts in the tokenizer's chat template.")

    @property
    def reads_data(self) -> bool:
        """Return whether prompts come from data rather than from tasks."""
        return self.prompt_data is not None or bool(self.prompt_data_mix)

    @property
    def template_values(self) -> Mapping[str, Any]:
        """Return the names of chat_template_kwargs; raises ConfigError for a text that is no JSON object."""
        return parse_json_object(self.chat_template_kwargs, "task.chat_template_kwargs", remedy=TEMPLATE_VALUES)
