"""The tasks of reasoning-gym: its problems by seed and index, its own scores, and how they are named."""

from __future__ import annotations

from contextlib import closing

import pytest
from data_files import config

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_a_run_asks_the_librarys_problems_and_scores_as_it_does(tokenizer: Tokenizer) -> None:
    task = TaskConfig(names=("reasoning_gym:leg_counting", "add10"), reward_processes=1)
    with closing(PromptSource(config(task, seed=7, max_prompt_len=600), tokenizer)) as source:
        prompts = source.take(4, 0)
        entries = [reasoning_gym.create_dataset("leg_counting", seed=7, size=2)[index] for index in range(2)]
        assert [prompt.text for prompt in prompts[::2]] == [entry["question"] for entry in entries]
        answer = entries[1]["answer"]
        assert answer.isdigit()
        texts = [
            answer,
            f"They have <answer>{answer}</answer> legs",
            f"<answer>{answer}</answer> <answer>1</answer>",
            "",
        ]
        responses = []
        for index, text in enumerate(texts):
            ids = tokenizer.encode(text)
            responses.append(GeneratedSample("2", index, ids, (0.0,) * len(ids), "stop", 0, 1))
        assert [sample.reward for sample in source.score(prompts[2], responses)()] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["leg_counting", "list_functions"])  # the second draws all its problems when made
def test_problems_are_a_function_of_seed_and_index_over_the_ends_of_blocks(name: str) -> None:
    from slime_spec.tasks.reasoning import BLOCK, ReasoningTask

    def asked(seed: int) -> list[str]:
        return [ReasoningTask(name).problem(index, seed).text for index in (0, BLOCK - 1, BLOCK, 5 * BLOCK + 3)]

    assert asked(0) == asked(0) != asked(1)
    assert len(set(asked(0))) == 4


def test_an_unknown_data_set_is_refused_with_a_suggestion(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'reasoning_gym:leg_counting'"):
        PromptSource(config(TaskConfig(names=("reasoning_gym:leg_countin",))), tokenizer)
