"""Built-in tasks: right answers, and problems that depend on nothing but (seed, index)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from slime_spec.tasks.builtin import SUITES, TASKS
from slime_spec.types import Prompt


def listed(numbers: Iterable[int]) -> str:
    first, last, *_ = numbers
    return ", ".join(map(str, range(first, last + 1)))


SOLVERS = {"add10": sum, "sum_sentence": sum, "max4": max, "max_sentence": max, "count": listed}


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_what_a_solver_reads_from_the_question(name: str) -> None:
    for index in range(200):
        problem = TASKS[name].problem(index, seed=3)
        question = problem.text.partition("?")[0]
        assert problem.answer == str(SOLVERS[name](map(int, re.findall(r"\d+", question))))


@pytest.mark.parametrize("name", TASKS)
def test_a_problem_is_a_function_of_its_index_and_seed_and_both_matter(name: str) -> None:
    task = TASKS[name]
    first = [task.problem(index, seed=0) for index in range(20)]
    assert [task.problem(index, seed=0) for index in reversed(range(20))] == first[::-1]
    assert len({problem.text for problem in first}) > 10
    assert [task.problem(index, seed=1) for index in range(20)] != first


def test_a_problem_stays_the_same_in_later_versions() -> None:
    assert TASKS["add10"].problem(0, seed=0).text == "What is 8 + 9? Answer with just the number."


@pytest.mark.parametrize("name", ["sum_sentence", "max_sentence"])
def test_the_sentence_that_is_asked_for_earns_the_reward_and_repeats_the_question(name: str) -> None:
    problem = TASKS[name].problem(5, seed=0)
    opening = re.findall(r'"(.+)"', problem.text)[0]
    prompt = Prompt(0, name, problem.text, (1,), problem.answer)
    assert TASKS[name].reward(prompt, f"{opening} {problem.answer}.") == 1.0
    assert TASKS[name].reward(prompt, f"{opening} {int(problem.answer) + 1}.") == 0.0


def test_suites_name_built_in_tasks() -> None:
    assert all(member in TASKS for members in SUITES.values() for member in members)
    assert not TASKS.keys() & SUITES.keys()
