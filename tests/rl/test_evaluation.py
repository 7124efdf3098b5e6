"""Evaluations between the steps of training: when, of which weights, and that training does not notice them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rollout.fake import FakeGeneration
from slime_spec.config.evaluation import EvalConfig
from slime_spec.config.tree import Config, RolloutConfig, SpeculativeConfig
from slime_spec.errors import RewardError
from slime_spec.interfaces import RunState
from slime_spec.rl.eval_file import write_evaluation
from slime_spec.rl.evaluation import Evaluated, Evaluation
from slime_spec.rl.loop import evaluate_end, run_loop
from slime_spec.rl.rollouts import GeneratedRollouts
from slime_spec.run_folder import RunFolder
from slime_spec.tasks.eval_prompts import EvalPrompts
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample
from tests.support.loop_recorder import START, Recorder, config, job

NUM_SAMPLES = 2


def quiet(done: int, wanted: int) -> None:
    pass


class FakeEngines:
    """One fake engine that takes groups from the last to the first; ``version`` is that of its weights."""

    def __init__(self) -> None:
        self.version, self.num_aborts = 0, 0
        self.asked: list[list[GroupRequest]] = []

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        self.asked.append(list(requests))
        num_aborts = self.num_aborts
        for request in reversed(requests):
            generation = FakeGeneration(request, 0, self.version)
            samples = iter(generation)
            for _ in request.seeds:
                if self.num_aborts > num_aborts:
                    generation.abort()
                yield next(samples)

    def abort(self) -> None:
        self.num_aborts += 1


@dataclass
class Scores:
    """Scores a reply 1 where its number of tokens is even; of the task ``fails`` every reward fails."""

    fails: str = ""
    closed: list[str] = field(default_factory=list)

    def score(self, prompt: Prompt, responses: Sequence[GeneratedSample]) -> PendingSamples:
        def scored(response: GeneratedSample) -> Sample:
            reward = None if prompt.task == self.fails else float(len(response.token_ids) % 2 == 0)
            return Sample(prompt, response, "", reward, "" if reward is not None else "the reward raised KeyError")

        samples = [scored(each) for each in responses]
        return lambda: samples


def prompts_of(name: str, num: int, scores: Scores, seed: int = 7) -> EvalPrompts:
    # The same token ids as the prompts of training: what they share must not matter.
    prompts = tuple(Prompt(i, name, "?", (1, 2, i), "x") for i in range(num))
    rollout = RolloutConfig(n_samples_per_prompt=3, max_response_len=9)
    return EvalPrompts(name, prompts, rollout, seed, scores)  # type: ignore[arg-type]


def evaluation_of(engines: object, *sets: EvalPrompts, interval: int = 1, kept: list | None = None) -> Evaluation:
    keep = [] if kept is None else kept
    return Evaluation(
        EvalConfig(interval=interval),
        sets,
        engines,  # type: ignore[arg-type]
        lambda step, evaluated: keep.append((step, evaluated)),
    )


def test_every_sample_of_every_set_comes_back_in_order_with_its_reward() -> None:
    engines, kept = FakeEngines(), []
    evaluation = evaluation_of(engines, prompts_of("a", 4, Scores()), prompts_of("b", 2, Scores()), kept=kept)
    told: list[tuple[int, int]] = []
    metrics = evaluation.evaluate(0, 0, lambda done, wanted: told.append((done, wanted)))
    ((step, (a, b)),) = kept
    assert (step, a.name, b.name) == (0, "a", "b")
    keys = [(each.prompt.prompt_id, each.response.sample_index) for each in a.samples]
    assert keys == [(prompt_id, index) for prompt_id in range(4) for index in range(3)]
    rewards = [float(len(each.response.token_ids) % 2 == 0) for each in b.samples]
    assert [each.reward for each in b.samples] == rewards
    assert metrics["eval/b"] == pytest.approx(sum(rewards) / 6)
    assert metrics["eval/a/num_samples"] == 12
    assert metrics["perf/eval_time"] > 0
    assert told == [(done, 18) for done in range(19)]
    assert len(engines.asked) == 1, "the sets share one generation, so that none waits for another's tail"


def test_the_same_weights_give_the_same_samples_at_every_evaluation_and_other_samples_in_each_set() -> None:
    kept: list[tuple[int, list[Evaluated]]] = []
    sets = prompts_of("a", 3, Scores(), seed=7), prompts_of("b", 3, Scores(), seed=8)
    evaluation = evaluation_of(FakeEngines(), *sets, kept=kept)
    evaluation.evaluate(0, 0, quiet)
    evaluation.evaluate(3, 0, quiet)
    tokens = [[[each.response.token_ids for each in of.samples] for of in evaluated] for _, evaluated in kept]
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1]


def training(is_evaluated: bool, speculative: SpeculativeConfig) -> tuple[list[list[Sample]], list[list[GroupRequest]]]:
    """The samples, and the requests, of 5 steps of an over-sampled run whose prompts come again every 6."""
    chosen = Config(
        rollout=RolloutConfig(
            batch_size=3, n_samples_per_prompt=NUM_SAMPLES, over_sampling_batch_size=7, partial_rollout=True
        ),
        speculative=speculative,
    )
    engines = FakeEngines()

    def take(n: int, start: int) -> list[Prompt]:
        return [Prompt(start + i, "task", "?", (1, 2, (start + i) % 6), "x") for i in range(n)]

    source = GeneratedRollouts(chosen, engines, take, Scores().score)  # type: ignore[arg-type]
    evaluation = evaluation_of(engines, prompts_of("a", 4, Scores()))
    state, steps = START, []
    for _ in range(5):
        if is_evaluated:
            evaluation.evaluate(state.rollout_id, engines.version, quiet)
        step = source.rollout(state, quiet)
        steps.append(step.samples)
        engines.version += 1
        state = RunState(state.rollout_id + 1, step.next_prompt_id, engines.version, step.unfinished_prompt_ids)
    of_training = [asked for asked in engines.asked if not asked[0].group_id.startswith("eval")]
    assert len(engines.asked) - len(of_training) == (5 if is_evaluated else 0)
    return steps, of_training


@pytest.mark.parametrize("speculative", [SpeculativeConfig(), SpeculativeConfig(algorithm="HISTORY")])
def test_training_asks_for_the_same_and_gets_the_same_with_and_without_evaluations(
    speculative: SpeculativeConfig,
) -> None:
    """Unfinished samples go on with their tokens, and drafts come from the same earlier replies (HISTORY)."""
    steps, asked = training(True, speculative)
    assert (steps, asked) == training(False, speculative)
    assert any(part.token_ids for requests in asked for request in requests for part in request.partials)
    if speculative.algorithm == "HISTORY":
        assert any(request.earlier for requests in asked for request in requests), "the test has a history"


def due(settings: EvalConfig, num_steps: int) -> list[int]:
    evaluation = Evaluation(settings, (), FakeEngines(), lambda step, evaluated: None)  # type: ignore[arg-type]
    return [step for step in range(num_steps + 1) if evaluation.is_due(step, step, num_steps)]


def test_evaluations_are_due_before_the_first_step_every_interval_and_at_the_end() -> None:
    assert due(EvalConfig(interval=3), 8) == [0, 3, 6, 8]
    assert due(EvalConfig(interval=3, skip_before_train=True), 6) == [3, 6]
    assert due(EvalConfig(interval=100), 4) == [0, 4]
    assert due(EvalConfig(), 4) == []


def test_weights_that_were_evaluated_are_not_evaluated_again() -> None:
    """As of rollouts alone, or between two pushes."""
    evaluation = evaluation_of(FakeEngines(), prompts_of("a", 1, Scores()), interval=2)
    evaluation.evaluate(0, 5, quiet)
    assert not evaluation.is_due(2, 5, num_steps=9)
    assert evaluation.is_due(2, 6, num_steps=9)


@dataclass
class Evaluating(Recorder):
    """A Recorder whose engines also generate."""

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        self.happen(f"evaluate@{self.version}")
        for request in requests:
            yield from FakeGeneration(request, 0, self.version)


def evaluated_job(recorder: Evaluating, chosen: Config, scores: Scores | None = None, interval: int = 2):
    evaluation = evaluation_of(recorder, prompts_of("a", 2, scores or Scores()), interval=interval)
    return replace(job(recorder, chosen), evaluation=evaluation)


def test_the_loop_evaluates_the_weights_just_pushed_and_logs_them_with_the_step_that_they_generate() -> None:
    recorder = Evaluating()
    loop = evaluated_job(recorder, config(num_rollout=3))
    evaluate_end(loop, run_loop(loop, START))
    assert [event for event in recorder.events if not event.startswith(("train", "re"))] == [
        *("evaluate@0", "generate@0", "push 1", "log 0"),
        *("generate@1", "push 2", "log 1"),
        *("evaluate@2", "generate@2", "push 3", "log 2"),
        *("evaluate@3", "log 3"),
    ]
    versions = {step: values.get("eval/a/weight_version") for step, values in recorder.logged.items()}
    assert versions == {0: 0.0, 1: None, 2: 2.0, 3: 3.0}
    assert recorder.logged[0]["rollout/num_samples"] == 2, "a step counts its own samples alone"
    assert "rollout/num_samples" not in recorder.logged[3]


def test_the_end_is_evaluated_with_the_last_steps_weights_whatever_the_push_interval() -> None:
    recorder = Evaluating()
    loop = evaluated_job(recorder, config(num_rollout=3, interval=2))
    evaluate_end(loop, run_loop(loop, START))
    assert recorder.events[-3:] == ["push 2", "evaluate@2", "log 3"]
    assert recorder.logged[3]["eval/a/weight_version"] == 2.0


def test_evaluations_leave_the_step_its_time_and_engines_their_stats() -> None:
    logged = []
    for interval in (1, 100):
        recorder = Evaluating()
        run_loop(evaluated_job(recorder, config(num_rollout=3), interval=interval), START)
        logged.append(recorder.logged[2])
    assert "perf/eval_time" in logged[0]
    assert "perf/eval_time" not in logged[1]
    assert set(logged[0]) - set(logged[1]) == {name for name in logged[0] if "eval" in name}
    for name in ("spec/net_speedup_est", "spec/break_even_length", "rollout/reward_mean"):
        assert logged[0][name] == logged[1][name]


def test_an_evaluation_without_any_reward_ends_the_run_with_its_steps_saved() -> None:
    recorder = Evaluating()
    loop = evaluated_job(recorder, config(num_rollout=4, save_interval=3), Scores(fails="a"))
    loop = replace(loop, evaluation=evaluation_of(recorder, prompts_of("a", 2, Scores(fails="a")), interval=2))
    assert loop.evaluation is not None
    loop.evaluation._last = (0, 0)  # as if the first had gone well
    with pytest.raises(RewardError, match=r"no sample of the evaluation a at step 2 has a reward \(6 samples\)"):
        run_loop(loop, START)
    assert [event for event in recorder.events if event.startswith("save")] == ["save 2"]


@pytest.mark.parametrize(("stop_at", "logged"), [("evaluate@0", []), ("evaluate@2", [0, 1])])
def test_a_signal_interrupts_an_evaluation_and_the_steps_before_it_stand(stop_at: str, logged: list[int]) -> None:
    recorder = Evaluating(stop_at=stop_at)
    end = run_loop(evaluated_job(recorder, config(num_rollout=4, save_interval=9)), START)
    assert list(recorder.logged) == logged
    assert end.rollout_id == len(logged)
    assert [event for event in recorder.events if event.startswith("save")] == (["save 2"] if logged else [])


def test_a_signal_during_the_evaluation_of_the_end_leaves_it_out() -> None:
    recorder = Evaluating(stop_at="evaluate@3")
    loop = evaluated_job(recorder, config(num_rollout=3))
    evaluate_end(loop, run_loop(loop, START))
    assert list(recorder.logged) == [0, 1, 2]


def test_a_run_that_a_signal_ended_has_no_end_to_evaluate() -> None:
    recorder = Evaluating(stop_at="log 0")
    loop = evaluated_job(recorder, config(num_rollout=3), interval=1)
    evaluate_end(loop, run_loop(loop, START))
    assert [event for event in recorder.events if event.startswith("evaluate")] == ["evaluate@0"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("with_samples", [True, False])
def test_the_file_of_an_evaluation_has_a_line_of_each_set_then_its_samples_where_asked(
    tmp_path: Path, with_samples: bool
) -> None:
    kept: list[tuple[int, list[Evaluated]]] = []
    evaluation = evaluation_of(FakeEngines(), prompts_of("a", 2, Scores()), prompts_of("b", 1, Scores()), kept=kept)
    metrics = evaluation.evaluate(20, 0, quiet)
    ((step, evaluated),) = kept
    write_evaluation(tmp_path / "eval" / "step_20.jsonl", step, evaluated, with_samples)
    summaries, samples = lines(tmp_path / "eval" / "step_20.jsonl")[:2], lines(tmp_path / "eval" / "step_20.jsonl")[2:]
    assert [(each["step"], each["set"]) for each in summaries] == [(20, "a"), (20, "b")]
    assert {name: value for each in summaries for name, value in each["metrics"].items()} == {
        name: value for name, value in metrics.items() if name.startswith("eval/")
    }
    assert len(samples) == 9 * with_samples
    for row in samples:
        assert row["reward"] == float(row["meta_info"]["completion_tokens"] % 2 == 0)
    assert [(row["set"], row["prompt_id"], row["sample"]) for row in samples] == [
        (name, prompt_id, index) for name, num in (("a", 2), ("b", 1)) for prompt_id in range(num) for index in range(3)
    ][: len(samples)]


def test_a_disk_without_room_costs_the_file_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "eval").write_text("a file where the folder would be")
    write_evaluation(tmp_path / "eval" / "step_0.jsonl", 0, [], with_samples=True)
    assert "evaluation not written" in caplog.text


def test_a_resumed_run_sets_evaluations_aside_that_it_will_make_again(tmp_path: Path) -> None:
    with RunFolder.create(
        Config(run=replace(Config().run, output_dir=str(tmp_path / "run"))), ["x"], "a: 1\n"
    ) as folder:
        for step in (0, 2, 4, 10):
            folder.evaluation(step).parent.mkdir(exist_ok=True)
            folder.evaluation(step).write_text(f"{step}\n")
        folder.begin_at(3)
        assert sorted(path.name for path in (folder.path / "eval").iterdir()) == [
            *("step_0.jsonl", "step_10.1.jsonl", "step_2.jsonl", "step_4.1.jsonl"),
        ]
