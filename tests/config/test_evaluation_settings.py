"""Settings of evaluations: what is refused, what falls back on the run's, and what a file of sets says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.config.checks import check, notes
from slime_spec.config.eval_sets import as_of_evaluation, eval_sets
from slime_spec.config.evaluation import EvalConfig
from slime_spec.config.tree import Config, EngineConfig, RolloutConfig, RunConfig, TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import composed

DATA = ("aime", "aime.jsonl", "math", "math.parquet@[0:5]")


def config(mode: str = "train", **settings: Any) -> Config:
    return Config(
        run=RunConfig(mode=mode, load_debug_rollout_data="x.pt" if mode == "train_only" else None),
        task=TaskConfig(prompt_data="train.jsonl", input_key="question", reward="exact"),
        rollout=RolloutConfig(temperature=0.8, max_response_len=32, over_sampling_batch_size=16, partial_rollout=True),
        eval=EvalConfig(**{"interval": 5, "prompt_data": DATA, **settings}),
    )


def test_slimes_flags_make_the_sets_whose_sampling_falls_back_on_the_rollouts() -> None:
    made = composed(
        [
            *("--prompt-data", "train.jsonl", "--rm-type", "exact", "--input-key", "question", "--label-key", "answer"),
            *("--rollout-temperature", "0.8", "--rollout-top-p", "0.9", "--rollout-max-response-len", "32"),
            *("--eval-interval", "20", "--eval-prompt-data", *DATA, "--n-samples-per-eval-prompt", "16"),
            *("--eval-max-response-len", "64", "--eval-top-p", "1", "--eval-label-key", "solution"),
        ]
    )
    assert made.config.eval.interval == 20
    aime, math = eval_sets(made.config)
    assert (aime.name, math.name) == ("aime", "math")
    assert (aime.config.task.prompt_data, math.config.task.prompt_data) == ("aime.jsonl", "math.parquet@[0:5]")
    task, rollout = aime.config.task, aime.config.rollout
    assert (task.input_key, task.label_key, task.reward) == ("question", "solution", "exact")
    assert (rollout.n_samples_per_prompt, rollout.max_response_len, rollout.max_prompt_len) == (16, 64, 512)
    assert (rollout.temperature, rollout.top_p) == (0.8, 1.0)
    assert made.config.longest == 512 + 64
    assert made.config.rollout.longest == 512 + 32, "the trainer never sees an evaluation's sequence"


def test_an_evaluation_has_seeds_of_its_own_and_takes_nothing_over_from_partial_rollouts() -> None:
    aime, math = (each.config for each in eval_sets(config()))
    assert len({aime.run.seed, math.run.seed, config().run.seed}) == 3
    assert aime.run.seed == next(iter(eval_sets(config()))).config.run.seed
    assert (aime.rollout.over_sampling_batch_size, aime.rollout.partial_rollout) == (None, False)


def test_a_file_alone_is_named_as_it_is() -> None:
    (only,) = eval_sets(config(prompt_data=("data/aime-2024.jsonl@[0:10]",)))
    assert only.name == "aime-2024"
    assert only.config.task.prompt_data == "data/aime-2024.jsonl@[0:10]"


def test_a_task_is_a_set_of_so_many_problems() -> None:
    (only,) = eval_sets(config(prompt_data=(), tasks=("add10",), num_prompts=7))
    assert (only.name, only.num_problems, only.config.task.names, only.config.task.prompt_data) == (
        *("add10", 7, ("add10",)),
        None,
    )
    own = eval_sets(config(prompt_data=(), tasks=("my.tasks:puzzle",)))[0]
    assert own.name == "puzzle"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_data": ()}, r"eval\.interval: needs prompts to evaluate on"),
    ({"prompt_data": ("a", "a.jsonl", "b")}, r"eval\.prompt_data: must be pairs of a name and a file"),
    ({"prompt_data": ("a", "x.jsonl", "a", "y.jsonl")}, "each set must have a name of its own"),
    ({"prompt_data": ("a", "x.jsonl"), "tasks": ("my:a",)}, "each set must have a name of its own"),
    ({"prompt_data": ("a/b", "x.jsonl")}, "a set's name is a part of its metrics' names"),
    ({"config": "sets.yaml"}, r"eval\.config: a run's sets are named in a file or on the command line"),
    ({"top_k": 0}, r"eval\.top_k: keeps no token at all"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_evaluations_that_cannot_be_made_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(**settings))


def test_engines_must_hold_an_evaluations_longest_sequence() -> None:
    asked = replace(config(max_response_len=600), engine=EngineConfig(context_length=1024))
    with pytest.raises(ConfigError, match=r"= 1112 tokens .* Lower --eval-max-prompt-len or --eval-max-response-len"):
        check(asked)
    check(replace(asked, eval=replace(asked.eval, interval=None)))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (config(), []),
        (config(interval=None), ["Nothing is evaluated without --eval-interval: --eval-prompt-data has no effect."]),
        (
            config(interval=None, temperature=0.0),
            [
                "Nothing is evaluated without --eval-interval: --eval-prompt-data, --eval-temperature have no effect.",
            ],
        ),
        (config(temperature=0.0), []),
        (
            config(temperature=0.0, n_samples_per_prompt=4),
            ["Evaluations are greedy, and the 4 samples of each prompt are all the same."],
        ),
        (
            config(top_k=1, n_samples_per_prompt=4),
            ["Evaluations are greedy, and the 4 samples of each prompt are all the same."],
        ),
        (config("train_only"), ["A run without engines evaluates nothing, and --eval-interval has no effect."]),
    ],
)
def test_settings_without_effect_are_noted(asked: Config, expected: list[str]) -> None:
    assert [note for note in notes(asked) if "eval" in note.lower()] == expected


SETS = """
eval:
  defaults: {max_response_len: 24, top_p: 0.7}
  datasets:
    - {name: aime, path: aime.jsonl, rm_type: exact, n_samples_per_eval_prompt: 16}
    - {name: gpqa, path: gpqa.jsonl, top_p: 0.9, custom_rm_path: my.rewards:gpqa, input_key: problem}
"""


def of_file(tmp_path: Path, text: str, **settings: Any) -> Config:
    (tmp_path / "sets.yaml").write_text(text)
    return config(**{"prompt_data": (), "config": str(tmp_path / "sets.yaml"), **settings})


def test_a_file_of_sets_is_laid_over_the_flags_its_defaults_first(tmp_path: Path) -> None:
    aime, gpqa = (each.config for each in eval_sets(of_file(tmp_path, SETS, top_p=1.0, n_samples_per_prompt=2)))
    assert (aime.rollout.top_p, gpqa.rollout.top_p) == (0.7, 0.9)
    assert (aime.rollout.n_samples_per_prompt, gpqa.rollout.n_samples_per_prompt) == (16, 2)
    assert (aime.rollout.max_response_len, aime.rollout.temperature) == (24, 0.8)
    assert (aime.task.reward, gpqa.task.reward) == ("exact", "my.rewards:gpqa")
    assert (aime.task.input_key, gpqa.task.input_key) == ("question", "problem")


def test_a_file_may_name_its_sets_as_keys(tmp_path: Path) -> None:
    (only,) = eval_sets(of_file(tmp_path, "datasets: {aime: {path: aime.jsonl}}"))
    assert (only.name, only.config.task.prompt_data) == ("aime", "aime.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval: {datasets: []}", "must have a list of mappings under datasets"),
        ("eval: 3", "must have a list of mappings under datasets"),
        ("eval: {datasets: {a: b.jsonl}}", "must have a list of mappings under datasets"),
        ("eval: {datasets: {a: [1]}}", "must have a list of mappings under datasets"),
        ("eval: {datasets: [{name: a, path: b, 5: 6}]}", "5 is no key of a data set here"),
        ("eval: {defaults: {5: 6}, datasets: [{name: a, path: b}]}", "5 is no key of a data set here"),
        ("eval: {datasets: [{name: a}]}", "each data set must have a path"),
        ("eval: {datasets: [{name: a, path: b, app_service: c}]}", "app_service is no key of a data set here"),
        ("eval: {datasets: [{name: a, path: b, top_p: 2}]}", "top_p must be at most 1"),
        (
            "eval: {datasets: [{name: a, path: b, max_response_len: 33}]}",
            r"within that of the engines, 544 tokens .* Pass --eval-max-response-len 33",
        ),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eval_sets(of_file(tmp_path, text))


def test_errors_of_a_sets_own_configuration_name_the_evaluations_settings_and_flags() -> None:
    of_run = ConfigError(
        "task.prompt_data", "must be readable", "x", "Pass --prompt-data FILE.jsonl, or --input-key K."
    )
    error = as_of_evaluation(of_run, "aime")
    assert (error.setting, error.rule) == ("eval.prompt_data", "set aime: must be readable")
    assert error.remedy == "Pass --eval-prompt-data NAME FILE.jsonl, or --eval-input-key K."


def test_turns_of_an_evaluation_have_room_for_its_prompt_and_response() -> None:
    rollout = RolloutConfig(max_context_len=1000)
    (asked,) = eval_sets(Config(rollout=rollout, eval=EvalConfig(interval=1, tasks=("add10",), max_response_len=4000)))
    assert asked.config.rollout.max_context_len == 512 + 4000
    (own,) = eval_sets(Config(rollout=rollout, eval=EvalConfig(interval=1, tasks=("add10",))))
    assert own.config.rollout.max_context_len == 1000
