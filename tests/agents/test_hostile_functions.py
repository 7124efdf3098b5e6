"""Functions that return what cannot be trained on, or misbehave, cost at most their own samples, and are told why."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slime_spec.agents.as_slime import new_sample
from slime_spec.errors import CustomFunctionError
from slime_spec.rl.dynamic_filter import make_filter
from slime_spec.slime_sample import Args
from slime_spec.types import GeneratedSample, Prompt, Sample
from tests.support.agents_harness import agents_config, one_turn, step_of
from tests.support.tiny_policy import make_tiny_policy

CONTEXT_LENGTH, VOCAB_SIZE = 160, 257  # of agents_config and of the tiny policy


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Calls that were never begun are found here: within a later ``compile`` Python 3.11.2 would end (gh-106905)."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def two_tokens(sample: Any, **changed: Any) -> Any:
    """A response of tokens 5 and 6, which no engine of the run generated."""
    sample.tokens, sample.response_length = [*sample.tokens, 5, 6], 2
    sample.response, sample.rollout_log_probs = "hi", [-1.0, -1.5]
    for name, value in changed.items():
        setattr(sample, name, value(sample) if callable(value) else value)
    return sample


def errors_of(folder: Path, function: Any, **custom: Any) -> list[str]:
    """What is said of prompt 1's two samples, where the function fails on that prompt alone."""

    async def only_on_one(args: Any, sample: Any, sampling_params: Any) -> Any:
        return two_tokens(sample) if sample.group_index == 0 else await function(sample)

    step, _ = step_of(agents_config(folder, **custom), only_on_one)
    whole, spoiled = step.samples[:2], step.samples[2:]
    assert [each.response.token_ids for each in whole] == [(5, 6), (5, 6)]
    assert [each.reward for each in spoiled] == [None, None] or not any(each.error for each in spoiled)
    return [each.error.partition("\n")[0] for each in spoiled]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokens": lambda own: [*own.tokens[:-1], VOCAB_SIZE]}, "token ids from 0 to 256, 257 is none"),
        ({"tokens": lambda own: [*own.tokens[:-1], -1]}, "token ids from 0 to 256, -1 is none"),
        ({"tokens": lambda own: [*own.tokens[:-1], 5.5]}, "tokens must be token ids, it was"),
        ({"tokens": lambda own: [*own.tokens[:-1], None]}, "tokens must be token ids: int"),
        ({"response_length": 1.5}, "response_length must be a number of tokens, it was"),
        ({"response": None}, "response must be the text of the response, it was None"),
        ({"loss_mask": [1]}, "a 0 or a 1 for each of the response's 2 tokens, it has 1"),
        ({"loss_mask": [0.5, 1.0]}, "a 0 or a 1 for each of the response's 2 tokens, it was [0.5, 1.0]"),
        ({"loss_mask": [None, 1]}, "a 0 or a 1 for each of the response's 2 tokens: int"),
        ({"rollout_log_probs": ["x", -1.0]}, "rollout_log_probs must be numbers: could not convert"),
        ({"rollout_log_probs": [-1.0, float("nan")]}, "must be finite and at most 0, that of token 1 is nan"),
        ({"rollout_log_probs": [-1.0]}, "must have one for each of 2 tokens, it has 1"),
        ({"reward": float("nan")}, "the reward must be a finite number, it was nan"),
        ({"reward": {"accuracy": 1.0}}, "the reward must have the key 'score'"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_left_out_and_says_why(
    folder: Path, changed: dict[str, Any], told: str
) -> None:
    async def function(sample: Any) -> Any:
        return two_tokens(sample, **changed)

    assert [told in each for each in errors_of(folder, function)] == [True, True]


@pytest.mark.parametrize("last_counts", [False, True])
def test_a_sample_longer_than_the_context_is_left_out_where_the_trainer_would_be_fed_all_of_it(
    folder: Path, last_counts: bool
) -> None:
    """Of what follows the last token that counts nothing is fed."""

    async def function(sample: Any) -> Any:
        num = CONTEXT_LENGTH - len(sample.tokens) + 1  # one too many
        mask = [1, *[0] * (num - 2), int(last_counts)]
        return two_tokens(
            sample, tokens=lambda own: own.tokens[:-2] + [5] * num, response_length=num, loss_mask=mask,
            rollout_log_probs=[-1.0] * num,
        )  # fmt: skip

    told = errors_of(folder, function)
    if last_counts:
        assert all("at most 160 tokens up to its last that counts in the loss" in each for each in told)
    else:
        assert told == ["", ""]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, lambda values: (each for each in values)])
def test_numbers_of_numpy_and_torch_are_numbers(folder: Path, kind: Callable[[Any], Any]) -> None:
    async def function(sample: Any) -> Any:
        given = two_tokens(sample)
        return SimpleNamespace(
            tokens=kind(given.tokens), response_length=2, response="hi",
            loss_mask=kind([1.0, 0.0]), rollout_log_probs=kind([-1.0, -1.5]),
        )  # fmt: skip

    assert errors_of(folder, function) == ["", ""]


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def _raises_unreadable(sample: Any) -> Any:
    raise UnreadableError


async def _interrupts(sample: Any) -> Any:
    raise KeyboardInterrupt


async def _exits(sample: Any) -> Any:
    sys.exit(3)


async def _is_cancelled(sample: Any) -> Any:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    return await task


async def _refuses_to_end(sample: Any) -> Any:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if sys.is_finalizing():
                raise


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (_raises_unreadable, "UnreadableError: a message that cannot be read"),
        (_interrupts, "KeyboardInterrupt"),
        (_exits, "SystemExit: 3"),
        (_is_cancelled, "CancelledError"),
        (_refuses_to_end, "gave no sample within 0.2 s (--custom-generate-timeout)"),
    ],
)
def test_a_call_that_ends_badly_or_never_costs_its_sample(folder: Path, function: Any, told: str) -> None:
    assert [told in each for each in errors_of(folder, function, generate_timeout_s=0.2)] == [True, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore:coroutine")
def test_a_task_that_ends_the_loop_of_all_samples_is_told_at_once(folder: Path) -> None:
    async def function(args: Any, sample: Any, sampling_params: Any) -> Any:
        await asyncio.gather(_exits(sample))  # a task of its own, whose SystemExit asyncio passes on to the loop

    with pytest.raises(CustomFunctionError, match="ended the event loop of all samples"):
        step_of(agents_config(folder), function)


def test_what_a_function_changes_is_its_own_samples_alone(folder: Path) -> None:
    prompt = Prompt(0, "task", "?", (1,), "x", label=["a"], metadata={"tools": [{"name": "add"}]})
    first = new_sample(prompt, 0)
    first.label.append("b")
    first.metadata["tools"][0]["name"] = "changed"
    second = new_sample(prompt, 1)
    assert (second.label, second.metadata) == (["a"], {"tools": [{"name": "add"}]})
    assert (prompt.label, prompt.metadata) == (["a"], {"tools": [{"name": "add"}]})


SCORED = [
    Sample(Prompt(0, "task", "?", (1,), "x"), GeneratedSample("0", i, (5,), (-1.0,), "stop", 0, 1), "", float(i))
    for i in range(2)
]


async def _async_filter(args: Any, samples: Any) -> bool:
    return False


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    "function",
    [
        _async_filter,
        lambda args, samples: None,
        lambda args, samples: (False, "too easy"),
        lambda args, samples: "no",
        lambda args, samples: [],
        lambda args, samples: torch.tensor([True, False]),
        lambda args, samples: SimpleNamespace(keep=None),
    ],
)
def test_a_filter_that_does_not_say_whether_it_keeps_a_group_is_refused(function: Any) -> None:
    """Python would call a coroutine or a pair true and keep every group, and None false and drop them all."""
    with pytest.raises(CustomFunctionError, match="the filter mine"):
        make_filter("mine", function, Args())(SCORED, SCORED)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kind", [bool, int, float, np.bool_, torch.tensor, lambda value: SimpleNamespace(keep=value)])
def test_a_filter_says_so_by_a_truth_of_any_kind(keeps: bool, kind: Callable[[bool], Any]) -> None:
    judgement = make_filter("mine", lambda args, samples: kind(keeps), Args())(SCORED, SCORED)
    assert judgement.keep is keeps


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
def test_a_filter_that_ends_as_no_exception_does_ends_the_step_with_its_name(
    folder: Path, error: BaseException
) -> None:
    def raising(args: Any, samples: Any) -> bool:
        raise error

    judge = make_filter("mine", raising, Args())
    with pytest.raises(CustomFunctionError, match=f"the filter mine raised {type(error).__name__}"):
        step_of(agents_config(folder), one_turn, dynamic_filter=judge)


def test_a_filter_that_says_nothing_ends_the_step_with_its_name(folder: Path) -> None:
    judge = make_filter("mine", lambda args, samples: None, Args())
    with pytest.raises(CustomFunctionError, match=r"the filter mine must return whether the group is kept.*None"):
        step_of(agents_config(folder), one_turn, dynamic_filter=judge)
