"""The batch that a rollout's samples make."""

from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.rl.advantages import train_batch
from slime_spec.types import GeneratedSample, Prompt, Sample


def sample(prompt_id: int, index: int, reward: float | None, tokens: tuple[int, ...] = (7, 8)) -> Sample:
    prompt = Prompt(prompt_id, "task", "?", (1, 2, 3), "4")
    response = GeneratedSample(str(prompt_id), index, tokens, (-0.5,) * len(tokens), "stop", 0, 3)
    return Sample(prompt, response, "text", reward, "" if reward is not None else "reward raised")


def test_an_unscored_sample_counts_neither_as_a_sequence_nor_in_its_groups_mean():
    batch = train_batch(
        [sample(0, 0, 1.0), sample(0, 1, None), sample(0, 2, 0.0)], AlgorithmConfig(normalize_std=False)
    )
    assert [s.advantage for s in batch] == [0.5, -0.5]


def test_an_empty_response_is_left_out():
    assert len(train_batch([sample(0, 0, 1.0), sample(0, 1, 0.0, tokens=())], AlgorithmConfig())) == 1


def test_the_batch_does_not_depend_on_the_order_in_which_samples_finished():
    samples = [sample(p, i, float(i == p), (p, i)) for p in range(3) for i in range(3)]
    assert train_batch(samples, AlgorithmConfig()) == train_batch(samples[::-1], AlgorithmConfig())


def test_a_sample_keeps_the_prompt_and_the_reward_that_its_advantage_was_estimated_from():
    batch = train_batch([sample(7, 0, 1.0), sample(3, 1, 0.25), sample(3, 0, 0.5)], AlgorithmConfig())
    assert [(s.group, s.reward) for s in batch] == [(3, 0.5), (3, 0.25), (7, 1.0)]
