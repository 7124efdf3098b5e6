"""Rewards by name, and what becomes of a reward that fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.errors import ConfigError
from slime_spec.tasks.judge import Judge
from slime_spec.tasks.rewards import contains, exact, last_integer, load_reward
from slime_spec.tasks.scoring import DirectScorer
from slime_spec.types import GeneratedSample, Prompt, Sample


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id=4, task="add10", text="?", token_ids=(1,), answer=answer)


def response(finish_reason: str = "stop") -> GeneratedSample:
    return GeneratedSample("4", 0, (1, 2), (-0.1, -0.2), finish_reason, 0, 1)  # type: ignore[arg-type]


def score(reward: Callable[..., Any], prompt: Prompt, response: GeneratedSample, text: str) -> Sample:
    (sample,) = DirectScorer(Judge(reward)).score(prompt, [response], [text])()
    return sample


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("5", "5"),
        ("2 + 3 = 5.", "5"),
        ("The answer is **5**!", "5"),
        ("It is -5", "-5"),
        ("10-5", "5"),
        ("1,234", "1234"),
        ("45,67", "67"),
        ("5.0", "5"),
        ("number5", "5"),
        ("007", "7"),
    ],
)
def test_the_last_integer_of_a_reply_is_its_answer(reply: str, answer: str) -> None:
    assert last_integer(prompt(answer), reply) == 1.0


@pytest.mark.parametrize("reply", ["", "five", "5 or 6", "5.5", "15", "-5", "51", "9" * 5000])
def test_another_last_integer_earns_nothing(reply: str) -> None:
    assert last_integer(prompt("5"), reply) == 0.0


@given(before=st.text(), number=st.integers(-(10**9), 10**9))
def test_any_text_that_ends_in_a_space_and_the_number_answers_the_number(before: str, number: int) -> None:
    assert last_integer(prompt(str(number)), f"{before} {number}") == 1.0


def test_exact_ignores_only_white_space_around_and_contains_looks_inside() -> None:
    assert (exact(prompt("a b"), " a b\n"), exact(prompt("a b"), "a b.")) == (1.0, 0.0)
    assert (contains(prompt("a b"), "so: a b."), contains(prompt("a b"), "a  b")) == (1.0, 0.0)


def test_an_unknown_reward_is_answered_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'last_integer'"):
        load_reward("task.reward", "last_interger")
    with pytest.raises(ConfigError, match="or a function of your own as module:function"):
        load_reward("task.reward", "judge_of_mine")


def test_a_reward_of_ones_own_is_found_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def short(prompt, reply):\n    return -len(reply)\nlimit = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("task.reward", "my_rewards:short")(prompt(""), "abc") == -3
    assert load_reward("task.reward", "my_rewards.short")(prompt(""), "abc") == -3  # as slime writes it: reports/05
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    for own in ("broken:f", "broken.f"):
        with pytest.raises(ConfigError, match="importable module:function: SystemExit: 3"):
            load_reward("task.reward", own)
    with pytest.raises(ConfigError, match="has no attribute shrt"):
        load_reward("task.reward", "my_rewards:shrt")
    with pytest.raises(ConfigError, match="must name a function"):
        load_reward("task.reward", "my_rewards:limit")
    with pytest.raises(ConfigError, match="No module named 'my_reward'"):
        load_reward("task.reward", "my_reward:short")
    broken = {"def f(": "SyntaxError", "1 / 0": "ZeroDivisionError", "exit(3)": "SystemExit"}
    for number, (source, error) in enumerate(broken.items()):
        (tmp_path / f"broken{number}.py").write_text(source)
        with pytest.raises(ConfigError, match=f"module:function: {error}.* Mend the module"):
            load_reward("task.reward", f"broken{number}:f")


@pytest.mark.parametrize("given_reward", [1, True, 0.5, np.float32(0.5), torch.tensor(0.5), np.int64(2)])
def test_numbers_of_every_library_are_rewards(given_reward: float) -> None:
    scored = score(lambda p, r: given_reward, prompt("5"), response(), "5")
    assert (scored.reward, scored.error) == (float(given_reward), "")


@pytest.mark.parametrize(
    "given_reward",
    [math.nan, math.inf, -math.inf, None, "1.0", [1.0], np.array([1.0, 2.0]), torch.ones(2), 10**400, 1j],
)
def test_a_reward_that_is_no_finite_number_excludes_the_sample_and_says_why(given_reward: object) -> None:
    scored = score(lambda p, r: given_reward, prompt("5"), response(), "5")
    assert scored.reward is None
    assert "must be a finite number" in scored.error


def test_a_reward_that_raises_excludes_the_sample_and_says_why() -> None:
    def broken(prompt: Prompt, reply: str) -> float:
        raise KeyError("verdict")

    scored = score(broken, prompt("5"), response(), "5")
    reason, traceback = scored.error.split("\n", 1)
    assert (scored.reward, reason) == (None, "the reward raised KeyError: 'verdict'")
    assert traceback.count("File ") == 1, "the traceback has other frames than the user's"
    assert 'raise KeyError("verdict")' in traceback
    assert scored.text == "5"


def test_an_aborted_response_is_excluded_without_being_scored() -> None:
    asked: list[str] = []
    scored = score(lambda p, reply: asked.append(reply) or 1.0, prompt("5"), response("abort"), "5")
    assert scored.reward is None
    assert "aborted" in scored.error
    assert asked == []
