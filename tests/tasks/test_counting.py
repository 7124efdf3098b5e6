"""The counting task: lists whose lengths have a long tail, and a reward for how far a list is right."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.launch.compose import compose
from slime_spec.tasks.builtin import TASKS
from slime_spec.tasks.counting import share_counted
from slime_spec.types import Prompt

TASK = TASKS["count"]
ANSWER = "8, 9, 10, 11, 12, 13, 14, 15, 16, 17"


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id=0, task="count", text="?", token_ids=(1,), answer=answer)


def reference(first: int, last: int, reply: str) -> float:
    """Read the reply character by character, and try every length that its right beginning may have."""
    written, digits = [], ""
    for character in [*reply, " "]:
        if character in "0123456789":
            digits += character
        elif digits:
            written.append(digits)
            digits = ""
    wanted = [str(number) for number in range(first, last + 1)]
    right = max(n for n in range(len(wanted) + 1) if written[:n] == wanted[:n])
    return right / max(len(wanted), len(written))


def num_tokens(answer: str) -> int:
    """SmolLM2's tokenizer makes a token of each digit, comma and space; a list's end takes one more."""
    return len(answer) + 1


def test_a_problem_stays_the_same_in_later_versions() -> None:
    problem = TASK.problem(0, seed=0)
    form = "Answer with just the numbers, separated by commas: 49, 50, 51, ..."
    assert problem.text == f"Count from 49 to 67. {form}"
    assert problem.answer == "49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67"


@pytest.mark.parametrize("seed", range(3))
def test_replies_have_ten_to_several_hundred_tokens_and_a_long_tail(seed: int) -> None:
    lengths = sorted(num_tokens(TASK.problem(index, seed).answer) for index in range(2000))
    p10, p50, p90 = (lengths[len(lengths) * percent // 100] for percent in (10, 50, 90))
    assert (10 < lengths[0] < 20, 350 < lengths[-1] < 400) == (True, True)
    assert (20 < p10 < 40, 50 < p50 < 80, p90 > 2.5 * p50) == (True, True, True)
    assert statistics.mean(lengths) > 1.2 * p50


@pytest.mark.parametrize("seed", range(3))
def test_lengths_differ_widely_within_a_rollout_and_prompts_seldom_repeat_within_a_run(seed: int) -> None:
    """A rollout of the shipped job has 8 prompts, a run of 25 has 200."""
    problems = [TASK.problem(index, seed) for index in range(200)]
    lengths = [num_tokens(problem.answer) for problem in problems]
    rollouts = [lengths[start : start + 8] for start in range(0, 200, 8)]
    assert statistics.median(max(each) / statistics.median(each) for each in rollouts) > 2
    assert len({problem.text for problem in problems}) > 170


def test_the_longest_question_and_list_fit_the_shipped_job() -> None:
    config = compose(["--config", "smollm2-135m-longtail"])
    problems = [TASK.problem(index, config.run.seed) for index in range(5000)]
    assert config.task.names == ("count",)
    assert max(num_tokens(problem.answer) for problem in problems) < config.rollout.max_response_len
    # A tokenizer makes at most a token of each character; SmolLM2's template adds 35 or fewer.
    assert max(len(problem.text) for problem in problems) + 35 <= config.rollout.max_prompt_len


@pytest.mark.parametrize(
    "reply",
    [
        ANSWER,
        f"Here you are:\n{ANSWER}.",
        ANSWER.replace(", ", " "),
        ANSWER.replace(", ", "\n"),
        ANSWER.replace(", ", "-"),
        ANSWER.replace(", ", "、"),
        f"**{ANSWER}** and that was all!",
    ],
)
def test_the_whole_list_earns_1_whatever_stands_around_and_between_its_numbers(reply: str) -> None:
    assert share_counted(prompt(ANSWER), reply) == 1.0


@pytest.mark.parametrize(
    ("reply", "earned"),
    [
        ("", 0.0),
        ("eight, nine, ten", 0.0),
        ("8, 9, 10, 11", 0.4),
        ("8, 9, 10, 11, ..., 17", 0.4),
        ("8, 9, 10, 12, 13, 14, 15, 16, 17", 0.3),
        ("8, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17", 1 / 11),
        ("9, 8, 10, 11, 12, 13, 14, 15, 16, 17", 0.0),
        (f"{ANSWER}, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27", 0.5),
        (f"{ANSWER}\n{ANSWER}", 0.5),
        (f"From 8 to 17: {ANSWER}", 1 / 12),
        (ANSWER.replace(", ", ""), 0.0),
        (ANSWER.replace("12", "012"), 0.4),
        (ANSWER.replace("12", "1 2"), 4 / 11),
        (ANSWER.replace("12", "12.5"), 5 / 11),
        (ANSWER.translate({ord("0") + i: 0x0660 + i for i in range(10)}), 0.0),
        (ANSWER.replace("12", "１２"), 0.4),
        (ANSWER.replace("12", "¹²"), 0.4),
    ],
)
def test_a_list_earns_its_share_before_the_first_mistake_and_loses_by_going_on(reply: str, earned: float) -> None:
    assert share_counted(prompt(ANSWER), reply) == earned == reference(8, 17, reply)


@given(
    first=st.integers(1, 50),
    count=st.integers(5, 90),
    text=st.text(alphabet="0123456789 ,.-\n٣１²a"),
    edits=st.lists(
        st.tuples(st.integers(0, 500), st.integers(0, 3), st.text(alphabet="019, ", max_size=3)), max_size=3
    ),
)
def test_the_reward_is_that_of_the_slow_reference(
    first: int, count: int, text: str, edits: list[tuple[int, int, str]]
) -> None:
    answer = reply = ", ".join(map(str, range(first, first + count)))
    for start, removed, inserted in edits:
        reply = reply[:start] + inserted + reply[start + removed :]
    for each in (text, reply, reply + text, text + reply):
        earned = share_counted(prompt(answer), each)
        assert earned == reference(first, first + count - 1, each)
        assert 0.0 <= earned <= 1.0


@given(first=st.integers(1, 50), count=st.integers(5, 90), cut=st.integers(0, 90), further=st.integers(1, 200))
def test_a_list_that_stops_earlier_or_goes_on_further_earns_less(
    first: int, count: int, cut: int, further: int
) -> None:
    def earned(num_written: int) -> float:
        written = ", ".join(map(str, range(first, first + num_written)))
        return share_counted(prompt(", ".join(map(str, range(first, first + count)))), written)

    kept = min(cut, count - 1)
    assert earned(kept) < earned(kept + 1)
    assert earned(count + further) < earned(count + further - 1)


@pytest.mark.parametrize("piece", ["9", "8 ", "8, 9, 10 ", "-", "1,"])
def test_a_huge_reply_is_judged_in_time_that_grows_with_its_length(piece: str) -> None:
    """A quadratic reward would take hours for ten million characters; a linear one takes about a second."""
    reply = piece * (10_000_000 // len(piece))
    began = time.process_time()
    assert share_counted(prompt(ANSWER), reply) < 0.01
    assert time.process_time() - began < 20


def test_shuffled_lists_earn_the_references_share() -> None:
    rng = random.Random(0)
    for _ in range(200):
        numbers = ANSWER.split(", ")
        i = rng.randrange(len(numbers))
        numbers[i:] = rng.sample(numbers[i:], len(numbers) - i)
        reply = ", ".join(numbers)
        assert i / 10 <= share_counted(prompt(ANSWER), reply) == reference(8, 17, reply)
