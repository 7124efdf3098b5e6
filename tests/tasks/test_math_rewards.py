"""Rewards of mathematical answers, against truths made by hand: what is right by value, and what only looks right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from slime_spec.errors import ConfigError
from slime_spec.tasks.judge import Reply, RewardName
from slime_spec.tasks.math_answers import dapo, deepscaler, math, math_verify
from slime_spec.tasks.reward_processes import RewardProcesses
from slime_spec.types import GeneratedSample, Prompt


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id=0, task="data", text="?", token_ids=(1,), answer=answer)


RIGHT = [
    ("5", r"\boxed{5}"),
    ("5", r"First \boxed{4}, no: \boxed{5}."),
    ("5", r"$\boxed{5.}$"),
    ("5.0", r"\boxed{5}"),
    ("5", r"\boxed{x=5}"),
    ("5", r"\fbox{5}"),
    ("5", r"\boxed 5"),
    ("2", r"\boxed{\boxed{2}}"),
    ("6", r"\boxed{3!}"),
    ("-3", "\\boxed{\N{MINUS SIGN}3}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac12", r"\boxed{\dfrac{1}{2}}"),
    ("1/2", r"$\boxed{\tfrac{1}{2}}$"),
    (r"-\frac{3}{4}", r"\boxed{-0.75}"),
    ("1.5", r"\boxed{1\frac{1}{2}}"),
    ("1234", r"\boxed{1,234}"),
    ("1,234", r"\boxed{1234}"),
    ("1000000", r"\boxed{1\,000\,000}"),
    ("1000000", r"\boxed{1{,}000{,}000}"),
    ("1000000", r"\boxed{10^6}"),
    ("5", r"\boxed{5\text{ cm}}"),
    ("5", r"\boxed{5\mathrm{ kg}}"),
    ("18", r"\boxed{18 dollars.}"),
    ("18", r"\boxed{\$18}"),
    ("18", r"\boxed{$18.00}"),
    ("30", r"\boxed{30^\circ}"),
    ("10", r"\boxed{10\%}"),
    (r"10\%", r"\boxed{10%}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\sqrt{2}", r"\boxed{\frac{2}{\sqrt{2}}}"),
    (r"\pi", r"\boxed{\pi}"),
    ("(1,2)", r"\boxed{(1, 2)}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("east", r"\boxed{\text{East}}"),
    ("A", r"\boxed{\text{(A)}}"),
    ("12:30", r"\boxed{12:30}"),
    (r"So it is \boxed{7}.", r"\boxed{7}"),
    ("5", "x" * 2_000_000 + r"\boxed{5}"),
]
WRONG = [
    ("5", ""),
    ("5", "5"),
    ("5", r"\boxed{}"),
    ("5", r"\boxed{5"),
    ("5", r"\boxed{5} no, \boxed{4}"),
    ("5", r"\boxed{5 or 6}"),
    ("3", r"\boxed{-3}"),
    ("3", r"\boxed{1/0}"),
    ("2", r"\boxed{\infty}"),
    ("0.333", r"\boxed{1/3}"),
    ("18", r"\boxed{18 thousand}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("[0,1]", r"\boxed{(0,1)}"),
    # math-verify takes a word for a product of letters.
    ("east", r"\boxed{seat}"),
    (r"\text{east}", r"\boxed{\text{seat}}"),
    ("A", r"\boxed{B}"),
    ("", r"\boxed{}"),
    ("1", r"\boxed{100000!}"),
    ("1", r"\boxed{" + "(" * 5_000 + "}"),
    ("1", r"\boxed{" + "\\frac{" * 3_000),
    ("1", "\\boxed{" * 200_000),
    ("1", r"\boxed{" + "9" * 1_000_000 + "}"),
]


@pytest.mark.parametrize(("answer", "reply"), RIGHT)
def test_the_value_in_the_last_box_earns_1(answer: str, reply: str) -> None:
    assert math(prompt(answer), reply) == 1.0


@pytest.mark.parametrize(("answer", "reply"), WRONG)
def test_another_value_or_no_box_earns_nothing(answer: str, reply: str) -> None:
    assert math(prompt(answer), reply) == 0.0


def test_an_answer_that_cannot_be_computed_is_wrong_after_its_time_limit() -> None:
    began = time.process_time()
    assert math(prompt("10"), r"\boxed{10^{10^{10}}}") == 0.0
    assert time.process_time() - began < 30  # of 5 s to read and 5 s to compare; without a limit it takes hours


@pytest.mark.parametrize(
    ("reply", "earned"),
    [
        (r"<think>\boxed{4}</think> \boxed{5}", 1.0),
        (r"###Response \boxed{5}", 1.0),
        (r"\boxed{5}", 0.0),
        (r"<think>\boxed{5}</think> done", 0.0),
        (r"</think> \boxed{4} </think> 5", 0.0),
    ],
)
def test_deepscaler_reads_the_box_after_the_thinking(reply: str, earned: float) -> None:
    assert deepscaler(prompt("5"), reply) == earned


@pytest.mark.parametrize(
    ("answer", "reply", "score"),
    [
        ("5", "Answer: 5", 1.0),
        ("34", "So\nanswer : $34$.", 1.0),
        ("5", r"Answer: \boxed{5}", 1.0),
        ("1234", "Answer: 1,234", 1.0),
        ("5", "Answer: 5\nAnswer: 6", -1.0),
        ("5", "Answer: 5" + " " * 300, -1.0),
        ("5", "5", -1.0),
        ("5", "", -1.0),
        ("5", "Answer:\n5", 1.0),
        ("5", "Answer:\n", -1.0),
    ],
)
def test_dapo_reads_the_last_answer_of_the_last_300_characters(answer: str, reply: str, score: float) -> None:
    given = dapo(prompt(answer), reply)
    assert (given["score"], given["acc"]) == (score, score == 1.0)


@pytest.mark.parametrize(
    ("answer", "reply", "earned"),
    [
        ("5", "So it is 5.", 1.0),
        ("5", "It is 4, and then 5", 1.0),
        ("5", "It is 5, and then 4", 0.0),
        ("5", "$x=5$", 1.0),
        (r"\frac12", r"one half, $\frac{1}{2}$", 1.0),
        ("-5", "\N{MINUS SIGN}5", 1.0),
        ("5", r"\boxed{4}, not 5", 0.0),
        ("5", "", 0.0),
        ("5", "no number", 0.0),
    ],
)
def test_math_verify_needs_no_box(answer: str, reply: str, earned: float) -> None:
    assert math_verify(prompt(answer), reply) == earned


@pytest.fixture(scope="module")
def processes() -> Iterator[RewardProcesses]:
    with closing(RewardProcesses(RewardName("math", limit_s=60.0), 1, 60.0)) as started:
        yield started


def test_named_rewards_judge_in_a_process_each_reply_by_its_row(processes: RewardProcesses) -> None:
    """The time limits of math-verify are signals, which no other thread than a process's main one may set."""

    def reply(text: str, answer: str, **metadata: object) -> Reply:
        asked = Prompt(0, "data", "?", (1,), answer, metadata=metadata)
        return Reply(asked, GeneratedSample("0", 0, (1,), (-0.1,), "stop", 0, 1), text)

    verdicts = processes.verdicts(
        [
            reply(r"\boxed{\frac{2}{4}}", "0.5"),
            reply("Answer: 6", "5", rm_type="dapo"),
            reply("Answer: 5", "5", rm_type="dapo"),
            reply("a cat", "The cat!", rm_type="f1"),
            reply(r"7 \boxed{the cat}", "cat", rm_type="boxed_f1"),
            reply("0.5", "0.5"),
        ]
    ).result()
    assert [verdict.reward for verdict in verdicts] == [1.0, -1.0, 1.0, 1.0, 1.0, 0.0]


def test_a_key_of_dapos_answer_is_the_reward() -> None:
    asked = Reply(prompt("5"), GeneratedSample("0", 0, (1,), (-0.1,), "stop", 0, 1), "Answer: 5")
    (verdict,) = RewardName("dapo", key="acc").load().verdicts([asked])
    assert verdict.reward == 1.0
    with pytest.raises(ConfigError, match="ifbench's checks are no package"):
        RewardName("ifbench").load()
