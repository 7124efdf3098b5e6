"""Prompts by id, and the tasks that are refused before anything heavy starts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from data_files import config, jsonl, row

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError, CustomFunctionError
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample
from tests.support.chat_templates import save_tokenizer


def test_a_resumed_run_draws_the_prompts_that_an_uninterrupted_one_would(tokenizer: Tokenizer) -> None:
    source = PromptSource(config(TaskConfig()), tokenizer)
    whole = source.take(24, start_prompt_id=0)
    resumed = PromptSource(config(TaskConfig()), tokenizer)
    assert resumed.take(8, start_prompt_id=16) == whole[16:]
    assert [prompt.prompt_id for prompt in whole] == list(range(24))


def test_another_seed_draws_other_prompts(tokenizer: Tokenizer) -> None:
    one, other = (PromptSource(config(TaskConfig(), seed), tokenizer).take(8, 0) for seed in (0, 1))
    assert [prompt.text for prompt in one] != [prompt.text for prompt in other]


def test_the_tasks_of_a_suite_and_of_a_list_take_turns(tokenizer: Tokenizer) -> None:
    suite = PromptSource(config(TaskConfig(names=("arithmetic",))), tokenizer).take(4, 0)
    assert [prompt.task for prompt in suite] == ["add10", "max4", "add10", "max4"]
    three = PromptSource(config(TaskConfig(names=("arithmetic", "sum_sentence"))), tokenizer).take(4, 0)
    assert [prompt.task for prompt in three] == ["add10", "max4", "sum_sentence", "add10"]


def test_the_chat_template_and_the_system_prompt_are_applied_as_configured(tokenizer: Tokenizer) -> None:
    def text(task: TaskConfig) -> str:
        (prompt,) = PromptSource(config(task), tokenizer).take(1, 0)
        return tokenizer.decode(prompt.token_ids).replace(prompt.text, "Q")

    assert text(TaskConfig()) == "u:Q;a:"
    assert text(TaskConfig(system_prompt="S")) == "s:S;u:Q;a:"
    assert text(TaskConfig(apply_chat_template=False)) == "Q"
    with pytest.raises(ConfigError, match=r"task\.system_prompt: needs the chat template"):
        text(TaskConfig(apply_chat_template=False, system_prompt="S"))


def test_a_template_without_a_system_turn_refuses_the_system_prompt_by_name(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, template))
    with pytest.raises(
        ConfigError, match=r"task\.system_prompt: problem 0 .* System role not supported.* Drop --system"
    ):
        PromptSource(config(TaskConfig(names=("add10",), system_prompt="S")), tokenizer)


def test_a_task_that_fails_or_exits_in_the_middle_of_a_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    """sys.exit() is no Exception: it would end the run without a word, with what it has not saved."""
    (tmp_path / "own_ending_task.py").write_text(
        "import sys\nfrom slime_spec.interfaces import Problem\n"
        "class Ending:\n"
        "    name = 'ending'\n"
        "    def problem(self, index, seed): return Problem('?', '1') if index < 2 else ends[index]()\n"
        "    def reward(self, problem, reply): return 0.0\n"
        "ends = {2: lambda: sys.exit(0), 3: lambda: 1 // 0}\n"
        "task = Ending()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = PromptSource(config(TaskConfig(names=("own_ending_task:task",))), tokenizer, is_scored=False)
    assert len(source.take(2, 0)) == 2
    with pytest.raises(CustomFunctionError, match="problem 2 of task ending raised SystemExit: 0"):
        source.take(1, 2)
    with pytest.raises(CustomFunctionError, match="problem 3 of task ending raised ZeroDivisionError"):
        source.take(1, 3)


def test_a_response_is_scored_by_the_task_of_its_prompt(tokenizer: Tokenizer) -> None:
    source = PromptSource(config(TaskConfig()), tokenizer)
    (prompt,) = source.take(1, 0)
    ids = tokenizer.encode(f"It is {prompt.answer}.")
    (sample,) = source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,) * len(ids), "stop", 0, 1)])()
    assert (sample.reward, sample.text) == (1.0, f"It is {prompt.answer}.")


def test_an_own_task_is_found_by_module_and_attribute_and_checked_for_what_it_lacks(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "from slime_spec.interfaces import Problem\n"
        "class Echo:\n"
        "    name = 'echo'\n"
        "    def problem(self, index, seed): return Problem(f'say {index}', str(index))\n"
        "    def reward(self, prompt, reply): return float(reply == prompt.answer)\n"
        "echo = Echo()\n"
        "class Half:\n"
        "    name = 'half'\n"
        "half = Half()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = PromptSource(config(TaskConfig(names=("add10", "my_tasks:echo"))), tokenizer)
    prompts = source.take(4, 0)
    assert [prompt.text for prompt in prompts][1::2] == ["say 0", "say 1"]
    ids = tokenizer.encode("1")
    replies = [GeneratedSample("3", 0, ids, (0.0,), "stop", 0, 1), GeneratedSample("3", 1, (), (), "stop", 0, 1)]
    with closing(source):
        assert [sample.reward for sample in source.score(prompts[3], replies)()] == [1.0, 0.0]
    with pytest.raises(ConfigError, match="It lacks problem, reward"):
        PromptSource(config(TaskConfig(names=("my_tasks:half",))), tokenizer)
    with pytest.raises(ConfigError, match="Name an instance"):
        PromptSource(config(TaskConfig(names=("my_tasks:Echo",))), tokenizer)


def test_unknown_empty_and_repeated_task_names_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'arithmetic'"):
        PromptSource(config(TaskConfig(names=("aritmetic",))), tokenizer)
    with pytest.raises(ConfigError, match="at least one task"):
        PromptSource(config(TaskConfig(names=())), tokenizer)
    with pytest.raises(ConfigError, match="add10 comes twice"):
        PromptSource(config(TaskConfig(names=("arithmetic", "add10"))), tokenizer)


def test_a_built_in_prompt_beyond_max_prompt_len_is_refused_at_once(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="problem 0 of task add10: the prompt must have at most 20 tokens"):
        PromptSource(config(TaskConfig(), max_prompt_len=20), tokenizer)


@pytest.mark.parametrize("part", ["text", "answer", "advice"])
def test_a_task_whose_texts_cannot_be_encoded_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Case reports/07."""
    (tmp_path / f"broken_{part}.py").write_text(
        "from slime_spec.interfaces import Problem\n"
        "class Broken:\n"
        "    name = 'broken'\n"
        f"    def problem(self, index, seed): return Problem(**{{'text': 'a', 'answer': '1', '{part}': '\\ud83d'}})\n"
        "    def reward(self, prompt, reply): return 0.0\n"
        "broken = Broken()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"problem 0 of task broken: its {part} must be a text that UTF-8 can encode"):
        PromptSource(config(TaskConfig(names=(f"broken_{part}:broken",))), tokenizer)


def test_the_first_prompt_is_shown_with_its_ids_from_both_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Case reports/01: what the template makes of a prompt is to be seen before anything is spent on it."""
    task = jsonl(tmp_path / "data.jsonl", row("2 + 3?", 5))
    ids = tokenizer.encode("u:2 + 3?;a:")
    assert PromptSource(config(task), tokenizer).first_shown() == (
        f"task=data tokens=11 text='u:2 + 3?;a:' ids={list(ids)}"
    )
    long = PromptSource(config(jsonl(tmp_path / "data.jsonl", row("y" * 2000, 5)), max_prompt_len=4000), tokenizer)
    shown = long.first_shown()
    assert "tokens=2005 " in shown
    assert f"text='u:{'y' * 298}...{'y' * 297};a:'" in shown
    assert shown.count(", ") == 24
