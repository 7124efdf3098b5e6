"""Functions of a user's own by name, and what they do with a step's samples."""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.agents.own import check_own_functions, own_function
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.config.tree import Config, CustomConfig
from slime_spec.errors import ConfigError, CustomFunctionError
from slime_spec.rl.advantages import train_batch
from slime_spec.rl.custom_rollouts import CustomRollouts
from slime_spec.rl.function_rollouts import FunctionRollouts
from slime_spec.rl.rollouts import Rollout, SamplesRefused
from slime_spec.slime_sample import Args, Sample, Status
from slime_spec.tasks.judge import RewardName
from slime_spec.tasks.scoring import ProcessScorer
from slime_spec.types import GeneratedSample, Prompt
from tests.support.agents_harness import START, CoreEngines, agents_config, prompts, step_of, two_turns
from tests.support.embedded_harness import make_core
from tests.support.tiny_policy import make_tiny_policy

MODULE = """
async def generate(args, sample, sampling_params, evaluation=False): return sample
def blocking(args, sample, sampling_params): return sample
async def other(sample): return sample
def keep(args, samples, **kwargs): return True
async def told(args, sample): return sample.metadata["points"] + len(sample.response)
def post(args, samples): return [1.0] * len(samples), [0.5] * len(samples)
limit = 3
"""


@pytest.fixture(autouse=True)
def without_slime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where slime is not installed: tests of its hooks have left their stand-in for it in this process."""
    monkeypatch.setattr(sys, "path", [each for each in sys.path if Path(each).name != "frameworks"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "slime"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path, with modules of a user's own."""
    (tmp_path / "my_agents_functions.py").write_text(MODULE)
    (tmp_path / "for_slime_functions.py").write_text("from slime.utils.types import Sample\ndef keep(args, samples): 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("joint", [".", ":"])
def test_functions_are_found_in_both_spellings(here: Path, joint: str) -> None:
    named = CustomConfig(
        generate=f"my_agents_functions{joint}generate", dynamic_filter=f"my_agents_functions{joint}keep"
    )
    check_own_functions(Config(custom=named))
    function = own_function(named, "dynamic_filter")
    assert function is not None
    assert function(None, []) is True
    assert own_function(CustomConfig(), "generate") is None
    slimes = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    assert own_function(CustomConfig(dynamic_filter=slimes), "dynamic_filter") is None


def test_all_functions_that_are_not_there_are_told_at_once(here: Path) -> None:
    named = CustomConfig(generate="no_such_module.f", dynamic_filter="my_agents_functions.nothing", sample_filter="x.y")
    with pytest.raises(ConfigError) as refused:
        check_own_functions(Config(custom=named))
    told = str(refused.value)
    assert [each in told for each in ("no_such_module", "has no attribute nothing", "custom.sample_filter")] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("generate", "my_agents_functions.blocking", "must name an async function generate"),
        ("generate", "my_agents_functions.other", "is called with \\(args, sample, sampling_params\\)"),
        ("generate", "my_agents_functions.limit", "must name a function generate"),
        ("generate", "my_agents_functions.genrate", "has no attribute genrate"),
        ("generate", "generate", "must be a function's name"),
        ("sample_filter", "my_agents_functions:generate", "is called with \\(args, groups\\)"),
        ("dynamic_filter", "for_slime_functions.keep", "needs slime, .*from slime_spec.agents import Sample"),
        ("generate", "slime.rollout.sglang_rollout.generate", "needs slime, which is not installed here"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_starts(
    here: Path, setting: str, name: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"custom.{setting}: .*{expected}"):
        check_own_functions(Config(custom=CustomConfig(**{setting: name})))


def test_a_reward_in_its_process_reads_what_a_function_left_in_the_sample(here: Path) -> None:
    prompt, response = Prompt(0, "task", "?", (1,), "x"), GeneratedSample("0", 0, (5,), (-1.0,), "stop", 0, 1)
    with closing(ProcessScorer(RewardName("my_agents_functions:told"), 1, 60.0)) as scorer:
        own = Sample(tokens=[1, 5], response="abc", response_length=1, metadata={"points": 0.5})
        (sample,) = scorer.score(prompt, [response], [own.response], [own])()
    assert (sample.reward, sample.text, sample.error) == (3.5, "abc", "")


def test_a_sample_appends_turns_and_results_as_slimes_does() -> None:
    sample = Sample(tokens=[1, 2])
    info = {"finish_reason": {"type": "length", "length": 2}, "weight_version": "3"}
    sample.append_response_tokens(tokens=[5, 6], log_probs=[-0.5, -1.0], meta_info=info, text="ab")
    sample.append_response_tokens(tokens=[7], trainable=False, text="!")
    assert (sample.tokens, sample.response, sample.response_length) == ([1, 2, 5, 6, 7], "ab!", 3)
    assert (sample.loss_mask, sample.rollout_log_probs) == ([1, 1, 0], [-0.5, -1.0, 0.0])
    assert (sample.status, sample.weight_versions) == (Sample.Status.TRUNCATED, ["3"])
    assert sample.effective_response_length == 2
    with pytest.raises(ValueError, match="2 tokens have 1 logprobs"):
        sample.append_response_tokens(tokens=[5, 6], log_probs=[-0.5])
    with pytest.raises(ValueError, match="have none"):
        sample.append_response_tokens(tokens=[5], log_probs=[-0.5], trainable=False)
    assert Sample(reward={"a": 2.0}).get_reward_value(Args(reward_key="a")) == 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


class Given:
    """Gives one rollout."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout

    def rollout(self, *_: Any) -> Rollout:
        return self._rollout


def test_a_sample_filter_takes_samples_out_of_the_loss_and_leaves_them_in_their_groups_mean(folder: Path) -> None:
    made, _ = step_of(agents_config(folder), two_turns)

    def first_of_each(args: Any, groups: list[list[Any]]) -> None:
        assert [len(group) for group in groups] == [2, 2]
        for group in groups:
            group[0].remove_sample = True

    filtered = CustomRollouts(Given(made), Args(), sample_filter=first_of_each).rollout(START, lambda *_: None)
    whole, rest = (
        train_batch(made.samples, AlgorithmConfig(normalize_std=False)),
        train_batch(filtered.samples, AlgorithmConfig(normalize_std=False)),
    )
    assert [each.advantage for each in rest] == [each.advantage for each in whole[1::2]]
    assert [each.token_ids for each in rest] == [each.token_ids for each in whole[1::2]]


def test_a_sample_filter_sees_the_samples_that_have_a_reward(folder: Path) -> None:
    made, _ = step_of(agents_config(folder), two_turns)
    lost = [replace(each, reward=None, error="failed") for each in (made.samples[1], *made.samples[2:])]
    seen: list[list[float]] = []

    def below_three(args: Any, groups: list[list[Any]]) -> None:
        seen.extend([sample.reward for sample in group] for group in groups)
        for sample in (sample for group in groups for sample in group):
            sample.remove_sample = sample.reward < 3

    source = Given(replace(made, samples=[made.samples[0], *lost], owns=()))
    filtered = CustomRollouts(source, Args(), sample_filter=below_three).rollout(START, lambda *_: None)
    assert seen == [[made.samples[0].reward]]
    assert [each.error for each in filtered.samples] == ["", "failed", "failed", "failed"]


def failing(*_: Any) -> Any:
    raise KeyError("length")


def leaving(*_: Any) -> Any:
    sys.exit(0)


def cancelled(*_: Any) -> Any:
    raise asyncio.CancelledError


FAILING = pytest.mark.parametrize(
    ("function", "told"), [(failing, "KeyError: 'length'"), (leaving, "SystemExit: 0"), (cancelled, "CancelledError")]
)


@FAILING
def test_a_filter_or_advantages_that_fail_leave_the_samples_to_be_kept(folder: Path, function: Any, told: str) -> None:
    made, _ = step_of(agents_config(folder), two_turns)
    for name, functions in (
        ("rollout_sample_filter", {"sample_filter": function}),
        ("custom_reward_post_process", {"reward_post_process": function}),
    ):
        source = CustomRollouts(Given(made), Args(), **functions)
        with pytest.raises(SamplesRefused, match=f"{name} raised {told}") as caught:
            source.rollout(START, lambda *_: None)
        assert caught.value.samples == made.samples


@FAILING
def test_a_log_function_that_fails_costs_no_step(
    folder: Path, caplog: pytest.LogCaptureFixture, function: Any, told: str
) -> None:
    made, _ = step_of(agents_config(folder), two_turns)
    rollout = CustomRollouts(Given(made), Args(), rollout_log=function).rollout(START, lambda *_: None)
    assert rollout.samples == made.samples
    assert f"step 0 was not logged: custom_rollout_log raised {told}" in caplog.text


def test_a_signal_during_a_log_function_is_not_taken_for_its_failure(folder: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt  # as a signal's handler does in the main thread, where this is called

    made, _ = step_of(agents_config(folder), two_turns)
    with pytest.raises(KeyboardInterrupt):
        CustomRollouts(Given(made), Args(), rollout_log=interrupted).rollout(START, lambda *_: None)


def test_advantages_of_a_post_process_are_those_that_are_trained_with(folder: Path) -> None:
    made, _ = step_of(agents_config(folder), two_turns)
    lost = replace(made.samples[1], reward=None, error="failed")
    made = replace(made, samples=[made.samples[0], lost, *made.samples[2:]])

    def numbered(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
        return [sample.reward for sample in samples], [10.0 * sample.group_index + sample.index for sample in samples]

    rollout = CustomRollouts(Given(made), Args(), reward_post_process=numbered).rollout(START, lambda *_: None)
    assert rollout.advantages == (0.0, None, 10.0, 11.0)
    batch = train_batch(rollout.samples, AlgorithmConfig(), given=rollout.advantages)
    assert [each.advantage for each in batch] == [0.0, 10.0, 11.0]
    short = CustomRollouts(Given(made), Args(), reward_post_process=lambda args, samples: ([], [1.0]))
    with pytest.raises(CustomFunctionError, match="a finite number for each of 3 samples"):
        short.rollout(START, lambda *_: None)


def test_a_log_function_sees_the_steps_samples_and_its_time(folder: Path) -> None:
    made, _ = step_of(agents_config(folder), two_turns)
    seen: list[Any] = []
    ticks = iter([2.0, 5.5])
    logging = CustomRollouts(
        Given(replace(made, metrics={"a": 1.0})),
        Args(),
        rollout_log=lambda *given: seen.append(given),
        clock=ticks.__next__,
    )
    assert logging.rollout(START, lambda *_: None).samples == made.samples
    ((rollout_id, _, samples, extra, passed_s),) = seen
    assert (rollout_id, extra, passed_s) == (0, {"a": 1.0}, 3.5)
    assert [each.tokens for each in samples] == [[*s.prompt.token_ids, *s.response.token_ids] for s in made.samples]


async def whole_step(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """A rollout function: two turns a sample, and a group that is kept for the next step."""
    assert not evaluation
    groups = data_source.get_samples(3)
    data_source.add_samples(groups[2:])
    for sample in (sample for group in groups[:2] for sample in group):
        await two_turns(args, sample, {}, data_source.client(sample))
        sample.reward = None if (sample.group_index, sample.index) == (1, 1) else float(sample.index)
    return groups[:2]


def blocking_step(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """The same, as slime's: a function that is not async, and runs a loop of its own."""
    import asyncio

    class Output:
        samples = asyncio.run(whole_step(args, rollout_id, data_source))
        metrics = {"rollout/turns_mean": 7.0, "mine": 1}  # noqa: RUF012 - as a user may write it

    return Output


@pytest.mark.parametrize("function", [whole_step, blocking_step])
def test_a_rollout_function_makes_a_whole_step(folder: Path, function: Any) -> None:
    config = agents_config(folder, generate=None, rollout={"batch_size": 2})
    config = replace(config, custom=CustomConfig(rollout="mine:f"))
    tokenizer = Tokenizer.load(folder)
    source = FunctionRollouts(config, CoreEngines(make_core(config)), prompts(tokenizer), function, tokenizer, Args())
    step = source.rollout(START, lambda *_: None)
    expected, _ = step_of(agents_config(folder), two_turns)
    assert [each.response.token_ids for each in step.samples] == [each.response.token_ids for each in expected.samples]
    assert [each.response.loss_mask for each in step.samples] == [each.response.loss_mask for each in expected.samples]
    assert [each.reward for each in step.samples] == [0.0, 1.0, 0.0, None]
    assert "it was None" in step.samples[3].error
    assert step.next_prompt_id == 3
    assert step.metrics == ({"rollout/turns_mean": 7.0} if function is blocking_step else {})
    again = source.rollout(replace(START, next_prompt_id=3, rollout_id=1), lambda *_: None)
    assert sorted({each.prompt.prompt_id for each in again.samples}) == [2, 3], "the group that was kept comes first"


def test_a_rollout_function_that_fails_or_returns_something_else_ends_the_run(folder: Path) -> None:
    config = replace(agents_config(folder), custom=CustomConfig(rollout="mine:f"))
    tokenizer = Tokenizer.load(folder)

    def run(function: Any) -> None:
        engines = CoreEngines(make_core(config))
        source = FunctionRollouts(config, engines, prompts(tokenizer), function, tokenizer, Args())
        source.rollout(START, lambda *_: None)

    with pytest.raises(CustomFunctionError, match="mine:f: ZeroDivisionError"):
        run(lambda args, rollout_id, data_source: 1 // 0)
    with pytest.raises(CustomFunctionError, match=r"must return groups of samples, list\[list\[Sample\]\]"):
        run(lambda args, rollout_id, data_source: [Sample()])
    with pytest.raises(CustomFunctionError, match="a sample of no prompt that it got"):
        run(lambda args, rollout_id, data_source: [[Sample(group_index=9, index=0, status=Status.COMPLETED)]])
