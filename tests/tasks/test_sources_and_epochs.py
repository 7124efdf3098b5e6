"""Several sources of prompts by weight, epochs and their orders, and what a row says besides prompt and label."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from data_files import config, jsonl, row

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.checks import check
from slime_spec.config.tree import Config, RolloutConfig, RunConfig, TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import composed
from slime_spec.launch.preflight import with_epochs
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.tasks.source import PromptSource
from slime_spec.tasks.turns import Turns
from slime_spec.types import GeneratedSample
from tests.support.chat_templates import save_tokenizer


def mixed(folder: Path, *sources: tuple[str, str, int]) -> TaskConfig:
    for name, _, num_rows in sources:
        jsonl(folder / f"{name}.jsonl", *(row(f"{name}{i}", i) for i in range(num_rows)))
    return TaskConfig(prompt_data_mix=tuple(f"{name}={weight}:{folder}/{name}.jsonl" for name, weight, _ in sources))


def texts(task: TaskConfig, tokenizer: Tokenizer, n: int, start: int = 0, seed: int = 0) -> list[str]:
    return [prompt.text for prompt in PromptSource(config(task, seed), tokenizer).take(n, start)]


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (3, 1), (7, 2, 5), (Fraction(7, 10), Fraction(3, 10))])
def test_tasks_take_turns_in_proportion_to_their_weights_and_as_evenly_as_can_be(weights: tuple[Fraction, ...]) -> None:
    turns, taken = Turns(weights), Counter[int]()
    total = sum(weights)
    for prompt_id in range(200):
        task, index = turns.at(prompt_id)
        assert index == taken[task], "a task's problems come one after the other"
        taken[task] += 1
        for each, weight in enumerate(weights):
            assert abs(taken[each] - (prompt_id + 1) * weight / total) <= len(weights) - 1
    assert [turns.at(prompt_id)[1] for prompt_id in turns.first_of_each()] == [0] * len(weights)


def test_weights_that_never_repeat_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights must repeat after at most 100000 prompts"):
        Turns((Fraction("0.333333"), Fraction("0.666665")))


def test_a_mix_gives_each_source_its_share_and_its_own_epochs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = mixed(tmp_path, ("a", "3", 4), ("b", "0.5", 2))
    taken = texts(task, tokenizer, 14)
    assert Counter(text[0] for text in taken) == {"a": 12, "b": 2}
    a = [text for text in taken if text[0] == "a"]
    assert sorted(a[:4]) == sorted(a[4:8]) == sorted(a[8:]) == ["a0", "a1", "a2", "a3"]
    assert sorted(text for text in taken if text[0] == "b") == ["b0", "b1"]
    assert texts(task, tokenizer, 5, start=9) == taken[9:], "a resumed run goes on with the same prompts"
    assert PromptSource(config(task), tokenizer).num_rows == 6


def test_a_mix_has_a_mean_reward_for_each_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = PromptSource(config(mixed(tmp_path, ("a", "1", 1), ("b", "1", 1))), tokenizer)
    samples = []
    for prompt, reply in zip(source.take(2, 0), ("0", "1"), strict=True):
        ids = tokenizer.encode(reply)
        samples += source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,), "stop", 0, 1)])()
    metrics = rollout_metrics(samples)
    assert (metrics["rollout/reward_mean/a"], metrics["rollout/reward_mean/b"]) == (1.0, 0.0)


@pytest.mark.parametrize("named", ["data.jsonl", "a=data.jsonl", "a=0:data.jsonl", "=1:data.jsonl", "a=-1:x", "a=1:"])
def test_a_source_of_a_mix_has_a_name_a_weight_and_a_path(named: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="each must be NAME=WEIGHT:PATH"):
        texts(TaskConfig(prompt_data_mix=(named,)), tokenizer, 1)


def test_a_mix_is_refused_beside_another_source_and_with_a_name_twice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = mixed(tmp_path, ("a", "1", 1))
    with pytest.raises(ConfigError, match="one source of prompts or a mix"):
        check(Config(task=replace(task, prompt_data="data.jsonl")))
    with pytest.raises(ConfigError, match="a comes twice"):
        texts(replace(task, prompt_data_mix=task.prompt_data_mix * 2), tokenizer, 1)
    with pytest.raises(ConfigError, match="a run has one source of prompts"):
        check(Config(task=replace(task, names=("max4",))))


def test_the_order_of_an_epoch_is_slimes_for_the_same_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """slime shuffles the row numbers by Python's own generator, seeded by the seed plus the epoch."""
    task = jsonl(tmp_path / "data.jsonl", *(row(f"p{i}", i) for i in range(20)))
    expected = []
    for epoch in range(3):
        random.seed(42 + epoch)
        order = list(range(20))
        random.shuffle(order)
        expected += [f"p{i}" for i in order]
    assert texts(task, tokenizer, 60, seed=42) == expected
    assert [prompt.text for prompt in PromptSource(config(task, 42), tokenizer).rows()] == [f"p{i}" for i in range(20)]
    in_order = replace(task, shuffle=False)
    assert texts(in_order, tokenizer, 45, seed=42) == [f"p{i % 20}" for i in range(45)]


def test_epochs_set_the_number_of_rollouts_in_whole_batches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = jsonl(tmp_path / "data.jsonl", *(row(f"p{i}", i) for i in range(11)), row("y" * 500, 1))
    job = Config(run=RunConfig(num_epoch=3), task=task, rollout=RolloutConfig(batch_size=4, max_prompt_len=100))
    num_rows = PromptSource(job, tokenizer).num_rows
    assert with_epochs(job, num_rows).run.num_rollout == 33 // 4  # the overlong prompt does not count
    with pytest.raises(ConfigError, match="must give a rollout of 64 prompts, the data have 11"):
        with_epochs(replace(job, rollout=replace(job.rollout, batch_size=64)), num_rows)
    with pytest.raises(ConfigError, match="the built-in tasks have no end"):
        check(Config(run=RunConfig(num_epoch=3)))


def test_the_steps_that_a_user_gives_win_over_epochs_and_an_experiments_give_way() -> None:
    both = composed(["--prompt-data", "d.jsonl", "--num-epoch", "3", "--num-rollout", "7"])
    assert (both.config.run.num_epoch, both.config.run.num_rollout) == (None, 7)
    assert "--num-rollout says how long the run is, and --num-epoch has no effect." in both.notes
    experiment = ["--config", "smollm2-135m", "task.names=[]", "--prompt-data", "d.jsonl", "--num-epoch", "3"]
    assert composed(experiment).config.run.num_epoch == 3


def test_a_row_carries_its_label_and_metadata_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "reward_model": {"ground_truth": 5}, "extra": {"level": 3}},
        {"prompt": "b", "reward_model": {"ground_truth": "6"}, "extra": '{"level": 4}'},
        {"prompt": "c", "reward_model": {"ground_truth": "7"}, "extra": None},
    ]
    task = jsonl(tmp_path / "data.jsonl", *map(json.dumps, rows))
    task = replace(task, label_key="reward_model.ground_truth", metadata_key="extra", shuffle=False)
    prompts = PromptSource(config(task), tokenizer).take(3, 0)
    assert [(each.answer, each.label, each.metadata) for each in prompts] == [
        ("5", 5, {"level": 3}),
        ("6", "6", {"level": 4}),
        ("7", "7", {}),
    ]
    assert prompts[0].rendered == "u:a;a:"
    with pytest.raises(ConfigError, match=r":1: 'prompt' must be an object.*--metadata-key"):
        texts(replace(task, metadata_key="prompt"), tokenizer, 1)
    with pytest.raises(ConfigError, match=r"task\.metadata_key: no line of .* has an object under it"):
        texts(replace(task, metadata_key="meta"), tokenizer, 1)
    with pytest.raises(ConfigError, match=r":1: must have the key 'reward_model\.truth'"):
        texts(replace(task, label_key="reward_model.truth"), tokenizer, 1)


def test_a_rows_own_reward_judges_it_and_an_unknown_one_is_refused_with_its_place(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def line(rm_type: object) -> str:
        return json.dumps({"prompt": "a", "label": "5 and 6", "metadata": {"rm_type": rm_type}})

    task = replace(jsonl(tmp_path / "data.jsonl", line("contains"), line(None)), reward="exact", shuffle=False)
    source = PromptSource(config(task), tokenizer)
    ids = tokenizer.encode("So 5 and 6.")
    rewards = []
    for prompt in source.take(2, 0):
        rewards += [
            each.reward
            for each in source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,) * len(ids), "stop", 0, 1)])()
        ]
    assert rewards == [1.0, 0.0]
    for broken, rule in (("contain", "Did you mean 'contains'"), (3, "'rm_type' must be a reward's name")):
        task = replace(task, prompt_data=jsonl(tmp_path / "data.jsonl", line(None), line(broken)).prompt_data)
        with pytest.raises(ConfigError, match=rf"data\.jsonl:2: .*{rule}"):
            texts(task, tokenizer, 1)


def test_a_math_row_is_judged_in_a_process_and_its_labels_may_not_be_absent(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = replace(jsonl(tmp_path / "data.jsonl", row("half?", "1/2")), reward="math", reward_processes=1)
    with closing(PromptSource(config(task), tokenizer)) as source:
        (prompt,) = source.take(1, 0)
        ids = tokenizer.encode(r"\boxed{0.5}")
        (sample,) = source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,) * len(ids), "stop", 0, 1)])()
        assert sample.reward == 1.0
    task = replace(task, prompt_data=jsonl(tmp_path / "data.jsonl", '{"prompt": "a"}').prompt_data)
    with pytest.raises(ConfigError, match="must have the key 'label'"):
        texts(task, tokenizer, 1)
    assert texts(replace(task, reward="random"), tokenizer, 1) == ["a"]


def test_names_that_the_chat_template_reads_are_given_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking is false %}<no>{% endif %}"
    folder = save_tokenizer(tmp_path, template)
    off = TaskConfig(chat_template_kwargs='{"enable_thinking": false}').template_values
    assert Tokenizer.load(folder).chat_text("x") == "x"
    assert Tokenizer.load(folder, None, off).chat_text("x") == "x<no>"
    assert not caplog.messages
    Tokenizer.load(folder, None, {"enable_thinkin": False})
    assert "the chat template reads none of names=enable_thinkin" in caplog.text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "must be valid JSON"),
        ('{"tools": []}', "only the template reads, not tools"),
    ],
)
def test_template_names_are_an_object_of_names_that_are_free(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check(Config(task=TaskConfig(chat_template_kwargs=text)))


def test_counting_a_batch_of_tokens_is_encoding_each_text(tokenizer: Tokenizer) -> None:
    some = ["", "a", "\N{SNOWMAN} b", "x" * 500]
    assert tokenizer.count_tokens(some) == [len(tokenizer.encode(text)) for text in some]
