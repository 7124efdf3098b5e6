"""Data and rewards that were made for verl and TRL: what is taken as it is, and what says how to go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.eval_sets import as_of_evaluation, eval_sets
from slime_spec.config.evaluation import EvalConfig
from slime_spec.config.tree import Config, RolloutConfig, TaskConfig
from slime_spec.errors import ConfigError, each_of
from slime_spec.tasks.eval_prompts import EvalPrompts, check_set
from slime_spec.tasks.judge import GROUP, VERL, Reply, RewardName, Verdict, form_of
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample, Prompt

VERLS_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 2+3?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"split": "train", "index": 0},
}
TRLS_ROW = {"messages": [{"role": "user", "content": "What is 2+3?"}], "solution": 5}


def source_of(folder: Path, tokenizer: Tokenizer, row: dict[str, Any], **settings: Any) -> PromptSource:
    path = folder / "data.jsonl"
    path.write_text(json.dumps(row))
    task = TaskConfig(names=(), prompt_data=str(path), **settings)
    return PromptSource(Config(task=task, rollout=RolloutConfig(batch_size=1)), tokenizer)


def reply_to(prompt: Prompt, text: str, index: int = 0) -> Reply:
    return Reply(prompt, GeneratedSample("0", index, (1,), (-0.5,), "stop", 0, 1), text)


def test_verls_rows_are_read_by_two_keys_and_keep_their_origin(tmp_path: Path, tokenizer: Tokenizer) -> None:
    keys = {"label_key": "reward_model.ground_truth", "metadata_key": "extra_info"}
    (prompt,) = source_of(tmp_path, tokenizer, VERLS_ROW, **keys).take(1, 0)
    assert prompt.label == "5"
    assert prompt.metadata == {"split": "train", "index": 0, "data_source": "openai/gsm8k"}


@pytest.mark.parametrize(
    ("row", "settings", "told"),
    [
        (VERLS_ROW, {}, {"label_key": "--label-key with the file's own name, perhaps reward_model.ground_truth."}),
        (
            TRLS_ROW,
            {},
            {
                "input_key": "--input-key with the file's own name, perhaps messages.",
                "label_key": "--label-key with the file's own name, perhaps solution.",
            },
        ),
        ({"a": 1}, {"reward": "random"}, {"input_key": "--input-key with the file's own name."}),
    ],
)
def test_every_key_that_a_row_lacks_is_told_at_once_with_the_likeliest_of_its_own(
    row: dict[str, Any], settings: dict[str, str], told: dict[str, str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match="must have the key") as raised:
        source_of(tmp_path, tokenizer, row, **settings)
    assert [error.remedy for error in each_of(raised.value)] == [f"Add it, or pass {each}" for each in told.values()]
    in_evaluation = each_of(as_of_evaluation(raised.value, "held"))
    flags = [error.remedy.split()[4] for error in in_evaluation]
    assert flags == [f"--eval-{name.replace('_', '-')}" for name in told]
    assert {error.setting for error in in_evaluation} == {"eval.prompt_data"}


def scored_as_verl(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **more: Any) -> Any:
    assert not more
    return {"score": float(solution_str == ground_truth), "of": (data_source, extra_info)}


def scored_with_two(solution_str: str, ground_truth: str, method: str = "strict") -> float:
    return float(method == "strict" and solution_str == ground_truth)


async def scored_in_time(solution_str: str, ground_truth: str, **more: Any) -> float:
    return float(solution_str == ground_truth and more == {"data_source": "data", "extra_info": {"level": 2}})


@pytest.mark.parametrize("function", [scored_as_verl, scored_with_two, scored_in_time])
def test_verls_rewards_get_their_arguments_by_name(function: Callable[..., Any]) -> None:
    prompt = Prompt(3, "data", "2+3?", (1, 2), "5", label="5", metadata={"level": 2})
    judge = RewardName("mine.reward").judge(function)
    assert judge.form == VERL
    verdicts = judge.verdicts([reply_to(prompt, "5"), reply_to(prompt, "6", 1)])
    assert verdicts == [Verdict(1.0), Verdict(0.0)]


def test_verls_reward_is_told_the_rows_origin_and_what_the_row_says_besides() -> None:
    seen = list[Any]()

    def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any) -> float:
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return 0.0

    metadata = {"data_source": "openai/gsm8k", "index": 7}
    prompt = Prompt(3, "data", "2+3?", (1, 2), "5", label=5, metadata=metadata)
    RewardName("mine:score").judge(score).verdicts([reply_to(prompt, "five")])
    assert seen == [("openai/gsm8k", "five", 5, metadata)]


def test_trls_reward_is_refused_with_the_line_that_calls_it() -> None:
    def by_length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(each)) for each in completions]

    with pytest.raises(ConfigError, match="TRL's takes columns") as raised:
        form_of(by_length, "task.reward", "mine:by_length")
    before, _, line = raised.value.remedy.partition("def ")
    assert before == "Call it from one of them: "
    names: dict[str, Any] = {"by_length": by_length}
    exec(f"def {line}", names)  # the remedy is a line of Python, and must be right
    judge = RewardName("mine:reward").judge(names["reward"])
    assert judge.form == GROUP
    prompt = Prompt(3, "data", "2+3?", (1, 2), "5")
    assert judge.verdicts([reply_to(prompt, "abc"), reply_to(prompt, "", 1)]) == [Verdict(3.0), Verdict(0.0)]


def test_an_evaluation_set_need_not_have_the_metadata_that_training_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "label": 1, "extra_info": {"level": 1}}')
    (tmp_path / "held.jsonl").write_text('{"prompt": "b", "label": 2}')
    task = TaskConfig(names=(), prompt_data=str(tmp_path / "train.jsonl"), metadata_key="extra_info")
    sets = EvalConfig(interval=1, prompt_data=("held", str(tmp_path / "held.jsonl")))
    (held,) = eval_sets(Config(task=task, eval=sets))
    assert [(each.text, each.metadata) for each in EvalPrompts.load(held, tokenizer).prompts] == [("b", {})]
    with pytest.raises(ConfigError, match=r"task\.metadata_key: no line of .*held\.jsonl has an object under it"):
        PromptSource(Config(task=replace(task, prompt_data=str(tmp_path / "held.jsonl"))), tokenizer)


def test_an_evaluation_set_need_not_have_the_tools_that_training_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No flag says that a set has none; one that names its own key is held to it."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "label": 1, "functions": [tool]}))
    (tmp_path / "held.jsonl").write_text('{"prompt": "b", "label": 2}')
    task = TaskConfig(names=(), prompt_data=str(tmp_path / "train.jsonl"), tool_key="functions")
    sets = EvalConfig(interval=1, prompt_data=("held", str(tmp_path / "held.jsonl")))
    (held,) = eval_sets(Config(task=task, eval=sets))
    assert [each.text for each in EvalPrompts.load(held, tokenizer).prompts] == ["b"]
    check_set(held, task.reward)
    (own,) = eval_sets(Config(task=task, eval=replace(sets, tool_key="functions")))
    for check in (lambda: EvalPrompts.load(own, tokenizer), lambda: check_set(own, task.reward)):
        with pytest.raises(ConfigError, match=r"eval\.tool_key: set held: no line of .*held\.jsonl has tools under it"):
            check()


def test_a_key_that_one_source_of_a_mix_has_is_no_mistake(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "label": 1, "extra_info": {"level": 1}}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "b", "label": 2}')
    mix = tuple(f"{name}=1:{tmp_path / name}.jsonl" for name in "ab")
    task = TaskConfig(names=(), prompt_data_mix=mix, metadata_key="extra_info")
    prompts = PromptSource(Config(task=task), tokenizer).take(2, 0)
    assert {each.text: each.metadata for each in prompts} == {"a": {"level": 1}, "b": {}}
    with pytest.raises(ConfigError, match=r"no line of .*a\.jsonl and .*b\.jsonl has an object under it"):
        PromptSource(Config(task=replace(task, metadata_key="extras")), tokenizer)
