"""Group advantages and the batch they make."""

import pytest
import torch

from slime_spec.rl.advantages import STD_EPSILON, group_advantages, train_batch
from slime_spec.types import GeneratedSample, Prompt, Sample


def sample(prompt_id: int, index: int, reward: float | None, tokens: tuple[int, ...] = (7, 8)) -> Sample:
    prompt = Prompt(prompt_id, "task", "?", (1, 2, 3), "4")
    response = GeneratedSample(str(prompt_id), index, tokens, (-0.5,) * len(tokens), "stop", 0, 3)
    return Sample(prompt, response, "text", reward, "" if reward is not None else "reward raised")


def test_advantages_are_the_distance_from_the_groups_mean_in_its_standard_deviations():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + STD_EPSILON)  # of the sample: n - 1
    assert group_advantages(rewards.tolist(), normalize_std=True) == pytest.approx(expected.tolist())
    assert group_advantages([1.0, 0.0], normalize_std=True) == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert group_advantages([0.7], normalize_std=True) == [0.0]
    assert group_advantages([3.0, 0.0], normalize_std=False) == [1.5, -1.5]


def test_a_group_whose_rewards_agree_teaches_nothing():
    assert group_advantages([1.0] * 5, normalize_std=True) == [0.0] * 5
    assert group_advantages([0.1] * 3, normalize_std=True) == [0.0] * 3


def test_an_unscored_sample_counts_neither_as_a_sequence_nor_in_its_groups_mean():
    batch = train_batch([sample(0, 0, 1.0), sample(0, 1, None), sample(0, 2, 0.0)], normalize_std=False)
    assert [s.advantage for s in batch] == [0.5, -0.5]


def test_an_empty_response_is_left_out():
    assert len(train_batch([sample(0, 0, 1.0), sample(0, 1, 0.0, tokens=())], normalize_std=False)) == 1


def test_the_batch_does_not_depend_on_the_order_in_which_samples_finished():
    samples = [sample(p, i, float(i == p), (p, i)) for p in range(3) for i in range(3)]
    assert train_batch(samples, True) == train_batch(samples[::-1], True)
