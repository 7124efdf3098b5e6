"""Rewards that fork, change what they were given, or answer in other kinds of numbers than Python's."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from data_files import config, jsonl, row

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.tasks.judge import LONGEST_TOLD, Reply, RewardName, Verdict
from slime_spec.tasks.reward_processes import RewardProcesses
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample, Prompt

SOURCE = """
import asyncio, os
import numpy as np, torch

def forks(prompt, reply):
    os.fork()
    return float(len(reply))
def forks_and_raises(prompt, reply):
    if os.fork() == 0:
        raise ValueError("in the child")
    return float(len(reply))
async def changes(args, sample, **kwargs):
    sample.label.append("?")
    sample.metadata["tools"].append("?")
    return len(sample.label) + 10 * len(sample.metadata["tools"])
def changes_verls(solution_str, ground_truth, extra_info):
    ground_truth.append("?")
    extra_info["tools"].append("?")
    return len(ground_truth) + 10 * len(extra_info["tools"])
def changes_ours(prompt, reply):
    prompt.label.append("?")
    prompt.metadata["tools"].append("?")
    prompt.metadata["more"] = reply
    return len(prompt.label) + 10 * len(prompt.metadata["tools"])
def leaves(prompt, reply): raise SystemExit(0)
def cancelled(prompt, reply): raise asyncio.CancelledError
async def cancelled_later(prompt, reply): raise asyncio.CancelledError
def group_of_numpy(args, samples): return np.arange(len(samples)) / 4
def group_of_torch(args, samples): return torch.arange(len(samples)) / 4
def group_of_column(args, samples): return np.zeros((len(samples), 1))
def complex_number(prompt, reply): return np.complex64(1 + 2j)
def one_of_torch(prompt, reply): return torch.tensor([[0.5]], dtype=torch.bfloat16)
class Odd:
    def __float__(self): raise KeyError("no number")
    def __repr__(self): raise KeyError("no text")
class OddError(Exception):
    def __str__(self): raise KeyError("no text")
def odd(prompt, reply): return Odd()
def odd_error(prompt, reply): raise OddError
def long_error(prompt, reply): raise ValueError("x" * 10_000_000)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


def reply(number: int) -> Reply:
    """A reply of as many letters as its number; all replies have the prompt's very label and metadata."""
    return Reply(PROMPT, GeneratedSample("0", number, (1,), (-1.0,), "stop", 0, 1), "x" * number)


PROMPT = Prompt(0, "data", "?", (1,), "a", label=["a"], metadata={"tools": []})


def verdicts(name: str, *replies: Reply) -> list[Verdict]:
    """What the reward says of replies of one call, in this process."""
    return RewardName(f"hostile_rewards:{name}").load().verdicts(replies)


def of_a_process(name: str, *calls: list[Reply]) -> list[Verdict]:
    """What one process says of calls that come one after the other."""
    with closing(RewardProcesses(RewardName(f"hostile_rewards:{name}", limit_s=60.0), 1, 60.0)) as processes:
        return [verdict for call in calls for verdict in processes.verdicts(call, len(call)).result()]


@pytest.mark.parametrize("name", ["forks", "forks_and_raises"])
def test_a_fork_of_a_reward_answers_no_other_call(name: str) -> None:
    """Two answers to a call would shift all later ones by one, each sample getting another's reward."""
    rewards = [verdict.reward for verdict in of_a_process(name, *([reply(number)] for number in range(5)))]
    assert rewards == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", ["changes", "changes_verls", "changes_ours"])
def test_what_a_reward_changes_is_its_own_samples_alone(name: str) -> None:
    rewards = [verdict.reward for verdict in verdicts(name, reply(0), reply(1), reply(2))]
    assert rewards == [2 + 10 * 1] * 3
    assert (PROMPT.label, PROMPT.metadata) == (["a"], {"tools": []})


@pytest.mark.parametrize("name", ["group_of_numpy", "group_of_torch"])
def test_a_groups_rewards_may_be_an_array(name: str) -> None:
    assert [each.reward for each in verdicts(name, *map(reply, range(4)))] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("group_of_column", "must be a finite number, it was [0.0]"),
        ("complex_number", "must be a finite number, it was"),
        ("odd", "must be a finite number, it was a value of type Odd"),
        ("odd_error", "the reward raised OddError: a message that cannot be read"),
        ("leaves", "the reward raised SystemExit: 0"),
        ("cancelled", "the reward raised CancelledError"),
        ("cancelled_later", "the reward raised CancelledError"),
        ("long_error", "the reward raised ValueError: xxxxxxxxx"),
    ],
)
def test_what_is_no_reward_is_told_and_costs_its_sample(name: str, told: str) -> None:
    (verdict,) = verdicts(name, reply(1))
    assert verdict.reward is None
    assert told in verdict.error
    assert len(verdict.error) < 2 * LONGEST_TOLD


def test_a_sample_that_no_process_can_be_sent_is_told_and_the_next_is_judged() -> None:
    """A task of a user's own may give any object as metadata."""
    unsendable = reply(1)
    unsendable = replace(unsendable, prompt=replace(PROMPT, metadata={"lock": threading.Lock()}))
    refused, judged = of_a_process("forks", [unsendable], [reply(2)])
    assert refused.reward is None
    assert "the sample cannot be sent to the reward's process: TypeError: cannot pickle" in refused.error
    assert judged.reward == 2.0
    assert unsendable.for_slime().metadata["lock"] is unsendable.prompt.metadata["lock"]


def test_one_number_of_torch_is_a_reward() -> None:
    assert [each.reward for each in verdicts("one_of_torch", reply(1))] == [0.5]


@pytest.mark.parametrize("reward", ["contains", "exact", "f1", "gsm8k"])
@pytest.mark.parametrize("label", ["", " \n"])
def test_an_empty_label_is_refused_where_it_would_judge(
    tokenizer: Tokenizer, tmp_path: Path, reward: str, label: str
) -> None:
    """Every reply contains it."""
    task = TaskConfig(prompt_data=jsonl(tmp_path / "data.jsonl", row("a", "b"), row("c", label)).prompt_data)
    with pytest.raises(ConfigError, match=rf"data\.jsonl:2: 'label' must not be empty for the reward {reward}"):
        PromptSource(config(TaskConfig(prompt_data=task.prompt_data, reward=reward)), tokenizer)


def test_a_rows_reward_is_refused_without_advice_that_does_not_work(tokenizer: Tokenizer, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "label": "b", "metadata": {"rm_type": "hostile_rewards:forks"}})
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: 'rm_type' must be one of") as refused:
        PromptSource(config(jsonl(tmp_path / "data.jsonl", line)), tokenizer)
    assert "or a function of your own" not in refused.value.rule
    assert "judges a whole run" in refused.value.remedy
