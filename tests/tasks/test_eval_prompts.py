"""The prompts of an evaluation set: all rows in order, problems of a task that training does not draw, clear errors."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_files import config, jsonl, row

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.eval_sets import eval_sets
from slime_spec.config.evaluation import EvalConfig
from slime_spec.config.tree import Config, TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.tasks.eval_prompts import EvalPrompts
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample


def asked(*words: str, task: TaskConfig | None = None, **settings: Any) -> Config:
    made = config(task or TaskConfig(), max_prompt_len=40)
    return replace(made, eval=EvalConfig(interval=1, prompt_data=words, **settings))


def loaded(chosen: Config, tokenizer: Tokenizer) -> EvalPrompts:
    (only,) = eval_sets(chosen)
    return EvalPrompts.load(only, tokenizer)


def test_a_sets_rows_come_once_each_in_the_files_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    jsonl(tmp_path / "held.jsonl", *(row(f"Q{i}", i) for i in range(20)))
    prompts = loaded(asked("held", str(tmp_path / "held.jsonl")), tokenizer).prompts
    assert [(each.prompt_id, each.text, each.answer) for each in prompts] == [(i, f"Q{i}", str(i)) for i in range(20)]
    sliced = loaded(asked("held", f"{tmp_path / 'held.jsonl'}@[5:8]"), tokenizer).prompts
    assert [each.text for each in sliced] == ["Q5", "Q6", "Q7"]
    assert tokenizer.decode(sliced[0].token_ids) == "u:Q5;a:", "through the chat template, as in training"


def test_overlong_prompts_of_a_set_are_left_out_with_a_warning(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl(tmp_path / "held.jsonl", row("Q" * 50, 1), row("Q", 2))
    prompts = loaded(asked("held", str(tmp_path / "held.jsonl")), tokenizer).prompts
    assert [each.text for each in prompts] == ["Q"]
    assert "left out overlong prompts" in caplog.text
    longer = loaded(asked("held", str(tmp_path / "held.jsonl"), max_prompt_len=80), tokenizer).prompts
    assert [len(each.text) for each in longer] == [50, 1]


def test_a_tasks_problems_are_drawn_from_another_seed_than_trainings(tokenizer: Tokenizer) -> None:
    chosen = asked(tasks=("max4",), num_prompts=12, max_prompt_len=200)
    prompts = loaded(chosen, tokenizer).prompts
    trained = PromptSource(config(TaskConfig(names=("max4",))), tokenizer).take(500, 0)
    assert len({each.text for each in prompts}) == 12
    assert not {each.text for each in prompts} & {each.text for each in trained}


def test_a_set_is_scored_by_its_own_reward(tmp_path: Path, tokenizer: Tokenizer) -> None:
    jsonl(tmp_path / "held.jsonl", row("Q", "b"))
    reply = GeneratedSample("0", 0, tokenizer.encode("abc"), (0.0,) * 3, "stop", 0, 1)
    for reward, expected in (("contains", 1.0), ("exact", 0.0)):
        with closing(loaded(asked("held", str(tmp_path / "held.jsonl"), reward=reward), tokenizer)) as prompts:
            assert [each.reward for each in prompts.score(prompts.prompts[0], [reply])()] == [expected]


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (None, {}, r"eval\.prompt_data: set held: must be a readable file.*Pass --eval-prompt-data NAME FILE\.jsonl"),
        ([], {}, r"eval\.prompt_data: set held: must hold at least one prompt"),
        ([row("Q", 1)], {"input_key": "q"}, r"held\.jsonl:1: must have the key 'q'.*pass --eval-input-key with"),
        ([row("Q", 1)], {"reward": "exakt"}, r"eval\.reward: set held: must be one of"),
        ([row("Q" * 90, 1)], {}, r"eval\.max_prompt_len: set held: must let .*Pass a larger --eval-max-prompt-len"),
        ([row("Q", "x")], {}, r"set held: .*'label' must be an integer for the reward last_integer.*--eval-rm-type"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_the_words_of_evaluations(
    tmp_path: Path, tokenizer: Tokenizer, lines: list[str] | None, settings: dict[str, Any], message: str
) -> None:
    if lines is not None:
        jsonl(tmp_path / "held.jsonl", *lines)
    with pytest.raises(ConfigError, match=message):
        loaded(asked("held", str(tmp_path / "held.jsonl"), **settings), tokenizer)
