"""Rewards that compare texts, numbers and letters, against truths made by hand."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from slime_spec.errors import ConfigError
from slime_spec.tasks.boxed import last_boxed
from slime_spec.tasks.choices import gpqa
from slime_spec.tasks.judge import Reply, RewardName
from slime_spec.tasks.rewards import REWARDS, f1, find_reward, gsm8k, load_named
from slime_spec.types import GeneratedSample, Prompt

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = 72 clips.\n#### 72"


def prompt(answer: str, label: object = None, **metadata: object) -> Prompt:
    return Prompt(prompt_id=3, task="data", text="?", token_ids=(1,), answer=answer, label=label, metadata=metadata)


@pytest.mark.parametrize(
    ("answer", "reply", "earned"),
    [
        ("72", "She sold 72.", 1.0),
        (SOLUTION, "#### 72", 1.0),
        (SOLUTION, SOLUTION, 1.0),
        ("72", "#### 72 clips in 2 months", 0.0),
        ("72", "#### 71\n#### 72", 1.0),
        ("72", "72\n####", 0.0),
        ("1234.5", "It costs $1,234.50.", 1.0),
        ("1,234", "1234", 1.0),
        ("1234567", "1,234,567", 1.0),
        ("-5", "\N{MINUS SIGN}5", 1.0),
        ("5", "10-5", 1.0),
        ("5", "-5", 0.0),
        ("0.1", "0.10", 1.0),
        ("5", "5 or 6", 0.0),
        ("5", "", 0.0),
        ("5", "five", 0.0),
        ("no number", "", 0.0),
        ("5", "9" * 100_000, 0.0),
    ],
)
def test_gsm8k_compares_the_last_number_by_value(answer: str, reply: str, earned: float) -> None:
    assert gsm8k(prompt(answer), reply) == earned


@pytest.mark.parametrize(
    ("answer", "reply", "earned"),
    [
        ("the cat", "A cat!", 1.0),
        ("the cat sat", "cat", 2 / 3),  # of {cat, sat} and {cat}: precision 1, recall 1/2
        ("cat cat dog", "cat dog dog", 2 / 3),  # 2 of 3 on either side: a word counts as often as both have it
        ("cat", "dog", 0.0),
        ("cat", "", 0.0),
        ("the", "a", 0.0),
        ("yes", "Yes.", 1.0),
        ("yes", "yes it is", 0.0),
        ("it is yes", "yes", 0.0),
        ("U.S.A.", "usa", 1.0),
    ],
)
def test_f1_counts_shared_words_as_squad_does(answer: str, reply: str, earned: float) -> None:
    assert f1(prompt(answer), reply) == pytest.approx(earned, abs=1e-12)


CHOICES = ["red", "green", "dark blue", "white"]


@pytest.mark.parametrize(
    ("asked", "reply", "earned"),
    [
        (prompt("C"), "The answer is C.", 1.0),
        (prompt("C"), "The answer is (C)", 1.0),
        (prompt("C"), "**Answer: C**", 1.0),
        (prompt("c"), r"\boxed{\text{(C)}}", 1.0),
        (prompt("C"), "Answer: A. No, the answer is C.", 1.0),
        (prompt("C"), "I think A is wrong. C", 1.0),
        (prompt("C"), "<think>The answer is A</think> C is the correct one", 1.0),
        (prompt("A"), "The answer is Apple", 0.0),
        (prompt("C"), "", 0.0),
        (prompt("C"), "The answer is Z", 0.0),
        (prompt("2", label=2, choices=CHOICES), "C", 1.0),
        (prompt("dark blue", choices=CHOICES), "Answer: C", 1.0),
        (prompt("dark blue", choices=CHOICES), "it must be Dark-Blue", 1.0),
        (prompt("", choices=CHOICES, correct_letter="b"), "option B", 1.0),
        (prompt("", choices=CHOICES, correct_letter="b"), "option D", 0.0),
        (prompt("E", valid_letters=["E", "F"]), "The answer is F, or rather A", 0.0),
    ],
)
def test_gpqa_reads_the_letter_that_a_reply_ends_with(asked: Prompt, reply: str, earned: float) -> None:
    assert gpqa(asked, reply) == earned


def test_the_random_reward_depends_on_the_sample_alone_and_is_right_half_of_the_time() -> None:
    def earned(seed: int, text: str) -> list[float]:
        name = RewardName("random", args={"seed": seed})
        replies = [
            Reply(prompt("5"), GeneratedSample("3", index, (1,), (-0.1,), "stop", 0, 1), text) for index in range(400)
        ]
        return [verdict.reward or 0.0 for verdict in name.load().verdicts(replies)]

    assert earned(0, "a") == earned(0, "b")
    assert earned(0, "a") != earned(1, "a")
    assert set(earned(0, "a")) == {0.0, 1.0}
    assert 140 < sum(earned(0, "a")) < 260  # six standard deviations of 400 tosses


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} \boxed{ \frac{1}{2} } end", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5", None),
        (r"\boxed{1} \boxed{5", None),
        (r"\boxed 5$ and", "5"),
        ("boxed{5}", None),
        (r"\boxed", None),
        ("", None),
    ],
)
def test_what_the_last_box_holds(text: str, held: str | None) -> None:
    assert last_boxed(text) == held


HOSTILE = ["1,", "1,234", "-", "\\boxed{", "\\boxed ", "answer is ", "A is ", "}", "a the ", "####", "\\", "the answer"]


@pytest.mark.parametrize("name", [name for name, record in REWARDS.items() if record.is_quick])
def test_a_quick_reward_takes_time_in_proportion_to_the_replys_length(name: str) -> None:
    """Such a reward runs in the driver, where nothing ends it; a quadratic one would take an hour for a million."""
    reward: Any = load_named("task.reward", name)
    began = time.process_time()
    for piece in HOSTILE:
        reply = piece * (1_000_000 // len(piece))
        if name == "random":
            reward(SimpleNamespace(seed=0), SimpleNamespace(group_index=0, index=0))
            continue
        assert 0.0 <= reward(prompt("5"), reply) <= 1.0
        assert 0.0 <= load_named("task.reward", f"boxed_{name}")(prompt("5"), reply) <= 1.0
    assert time.process_time() - began < 120


def test_a_rows_unknown_reward_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"data:3: must be one of contains, dapo, .*'maths'.*Did you mean 'math'"):
        find_reward("task.reward", "maths", "data:3: ")
