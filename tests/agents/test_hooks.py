"""Hooks between a sample and its reward, filters of a rollout function's buffer, logs of evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, CustomConfig
from slime_spec.errors import ConfigError, CustomFunctionError
from slime_spec.launch.compose import compose
from slime_spec.launch.rollout_source import rollout_source
from slime_spec.rl.custom_rollouts import log_evaluation
from slime_spec.rl.evaluation import Evaluated
from slime_spec.rl.function_rollouts import FunctionRollouts
from slime_spec.rl.rollouts import Rollout
from slime_spec.slime_sample import Args, Sample, Status
from tests.support.agents_harness import START, CoreEngines, agents_config, by_variety, prompts, step_of, two_turns
from tests.support.embedded_harness import make_core
from tests.support.tiny_policy import make_tiny_policy

MODULE = """
from dataclasses import replace

async def mark(args, sample, *, rollout_id=None, evaluation=False):
    sample.metadata["seen"] = (rollout_id, evaluation, args.n_samples_per_prompt)
    sample.response += "!"

def mask_first(args, sample):
    return replace(sample, loss_mask=[0] + [1] * (sample.response_length - 1), response=sample.response + "?")

def spoil(args, sample):
    return {"tokens": []} if sample.index == 1 else None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_sample_hooks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_sample_hooks"


def run_step(config: Config) -> Rollout:
    """A step of what the settings name, as a run makes it."""
    tokenizer = Tokenizer.load(config.model.hf_checkpoint)
    given: Any = SimpleNamespace(take=prompts(tokenizer), score=by_variety)
    engines: Any = CoreEngines(make_core(config))
    with rollout_source(config, given, tokenizer, engines) as source:
        return source.rollout(replace(START, rollout_id=5), lambda *_: None)


def test_hooks_change_samples_in_turn_before_their_rewards(folder: Path, module: str) -> None:
    hooks = (f"{module}.mark", f"{module}:mask_first")
    config = agents_config(folder, generate=None, sample_hooks=hooks)
    rollout = run_step(config)
    plain, _ = step_of(agents_config(folder), None)
    assert [each.response.token_ids for each in rollout.samples] == [each.response.token_ids for each in plain.samples]
    for sample, own in zip(rollout.samples, rollout.owns, strict=True):
        assert own.metadata["seen"] == (5, False, 2)
        assert own.response.endswith("!?"), "the hooks take turns in the order of their flags"
        assert sample.text == own.response, "the reward sees what the hooks left"
        assert sample.response.loss_mask == (0, *[1] * (len(sample.response.token_ids) - 1))


def test_hooks_follow_a_function_of_the_users_own(folder: Path, module: str) -> None:
    config = agents_config(folder, generate="tests.support.agents_harness:two_turns", sample_hooks=(f"{module}.mark",))
    rollout = run_step(config)
    expected, _ = step_of(agents_config(folder), two_turns)
    assert [each.response for each in rollout.owns] == [f"{each.response}!" for each in expected.owns]
    assert [each.response.loss_mask for each in rollout.samples] == [
        each.response.loss_mask for each in expected.samples
    ]


def test_a_hook_that_returns_something_else_costs_its_sample(folder: Path, module: str) -> None:
    rollout = run_step(agents_config(folder, generate=None, sample_hooks=(f"{module}.spoil",)))
    errors = [each.error for each in rollout.samples]
    assert errors[0] == errors[2] == ""
    assert "a sample hook returns a sample or None, it was dict" in errors[1]
    assert "my_sample_hooks.spoil" in errors[1]


def test_each_flag_of_a_hook_adds_one() -> None:
    argv = ["--rollout-sample-hook-path", "a.b", "--lr", "1e-6", "--rollout-sample-hook-path=c:d"]
    assert compose(argv).custom.sample_hooks == ("a.b", "c:d")


@pytest.mark.parametrize(
    ("argv", "setting", "words"),
    [
        ("--buffer-filter-path a.b", "custom.buffer_filter", "without one there is no buffer"),
        (
            "--rollout-sample-hook-path a.b --rollout-function-path c.d",
            "custom.rollout",
            "--rollout-sample-hook-path",
        ),
        (
            "--rollout-sample-hook-path a.b --partial-rollout --over-sampling-batch-size 16",
            "custom.sample_hooks",
            "not for --partial-rollout",
        ),
    ],
)
def test_what_nothing_would_call_is_refused(argv: str, setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(argv.split())
    assert caught.value.setting == setting
    assert words in str(caught.value)


async def over_sampling(args: Any, rollout_id: int, data_source: Any) -> Any:
    """A step of one group; the first step adds two more for later."""
    groups = data_source.get_samples(3 if rollout_id == 0 else 1)
    data_source.add_samples(groups[1:])
    for sample in groups[0]:
        await data_source.client(sample).turn(sample)
        sample.reward = 1.0
    return groups[:1]


def steps_with(folder: Path, buffer_filter: Any) -> list[int]:
    """The prompts of three steps; the first leaves prompts 1 and 2 in the buffer."""
    config = replace(agents_config(folder), custom=CustomConfig(rollout="mine:f"))
    tokenizer = Tokenizer.load(folder)
    engines: Any = CoreEngines(make_core(config))
    source = FunctionRollouts(
        config, engines, prompts(tokenizer), over_sampling, tokenizer, Args(), buffer_filter=buffer_filter
    )
    taken, next_prompt_id = [], 0
    for rollout_id in range(3):
        state = replace(START, rollout_id=rollout_id, next_prompt_id=next_prompt_id)
        step = source.rollout(state, lambda *_: None)
        next_prompt_id = step.next_prompt_id
        taken.append(step.samples[0].prompt.prompt_id)
    return taken


def newest(args: Any, rollout_id: Any, buffer: list[Any], num_samples: int) -> list[Any]:
    """slime's form: it removes from the buffer what it gives."""
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]


def test_a_buffer_filter_says_which_groups_come_again(folder: Path) -> None:
    assert steps_with(folder, None) == [0, 1, 2]
    assert steps_with(folder, newest) == [0, 2, 1]
    assert steps_with(folder, lambda args, rollout_id, buffer, num_samples: []) == [0, 3, 4]


def test_a_buffer_filter_that_takes_more_than_is_asked_for_ends_the_run(folder: Path) -> None:
    with pytest.raises(CustomFunctionError, match="took 2 groups, and 1 were asked for"):
        steps_with(folder, lambda args, rollout_id, buffer, num_samples: list(buffer))


def test_an_evaluations_samples_reach_a_log_function_by_set(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = step_of(agents_config(folder), None)
    cut = replace(made.samples[1], response=replace(made.samples[1].response, finish_reason="length"))
    stopped = replace(made.samples[0], response=replace(made.samples[0].response, finish_reason="stop"))
    evaluated = [Evaluated("aime", {"eval/aime": 0.5}, [stopped, cut])]
    seen: list[Any] = []
    log_evaluation(lambda *given: seen.append(given), Args(lr=1.0), 7, evaluated)
    ((step, args, data, metrics),) = seen
    assert (step, args.lr, metrics) == (7, 1.0, {"eval/aime": 0.5})
    assert data["aime"]["rewards"] == [stopped.reward, cut.reward]
    assert data["aime"]["truncated"] == [False, True]
    assert [type(each) for each in data["aime"]["samples"]] == [Sample, Sample]
    assert data["aime"]["samples"][1].status == Status.TRUNCATED

    def failing(*_: Any) -> None:
        raise KeyError("aime")

    log_evaluation(failing, Args(), 7, evaluated)
    assert "the evaluation at step 7 was not logged: custom_eval_rollout_log raised KeyError" in caplog.text
