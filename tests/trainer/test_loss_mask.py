"""Tokens that do not count: the packed trainer against Hugging Face, AdamW and a loop that skips them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.bench.reference_trainer import hf_logprobs, near_policy, reference_steps, tiny_samples
from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.rl.advantages import train_batch
from slime_spec.types import GeneratedSample, Prompt, Sample, TrainSample
from tests.support.tiny_models import load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config
from trainer_bridge.draft_rows import choose_replies, reply_rows
from trainer_bridge.flat_samples import split_batch
from trainer_bridge.packing import plan_microbatches

CALM = {"adam_eps": 1e-3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1x1": (CALM, {}),
    "1x1, several optimizer steps": ({**CALM, "global_batch_size": 5}, {}),
    "DP2": ({**CALM, "world_size": 2}, {}),
    "PP2 with the reference's KL": (
        {**CALM, "world_size": 2, "pipeline_model_parallel_size": 2},
        {"kl_loss_coef": 0.1},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen3ForCausalLM", tied=True)


def masked(samples: Sequence[TrainSample], seed: int) -> list[TrainSample]:
    """Masks at random, with a token that counts in each; logprobs of the others are 0, as a tool's are."""
    rng = random.Random(seed)
    made = []
    for sample in samples:
        mask = [rng.randint(0, 1) for _ in sample.rollout_logprobs]
        mask[rng.randrange(len(mask))] = 1
        logprobs = tuple(
            logprob if counts else 0.0 for logprob, counts in zip(sample.rollout_logprobs, mask, strict=True)
        )
        made.append(replace(sample, rollout_logprobs=logprobs, loss_mask=tuple(mask)))
    return made


@pytest.mark.parametrize(("trainer", "algorithm"), CASES.values(), ids=CASES)
def test_steps_are_those_of_a_loop_that_skips_the_tokens_that_do_not_count(
    trainer: dict[str, Any], algorithm: dict[str, Any], folder: Path
) -> None:
    batches = [masked(near_policy(folder, tiny_samples(seed)), seed) for seed in range(2)]
    config = tiny_config(folder, trainer, algorithm)
    answers = run_ranks(config.trainer.world_size, "train", config, batches, True)
    expected, weights = reference_steps(config, batches)
    after = {name: tensor for _, _, part in answers for name, tensor in part.items()}
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, weights[name], atol=2e-5, rtol=0.0)
    for ours, theirs, batch in zip(answers[0][1], expected, batches, strict=True):
        assert (
            ours.num_tokens
            == sum(sum(sample.loss_mask) for sample in batch)
            < sum(len(sample.loss_mask) for sample in batch)
        )
        for name in ("loss", "pg_loss", "kl", "entropy", "clip_fraction", "train_rollout_logprob_abs_diff"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=2e-5), name
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def response(tokens: tuple[int, ...], mask: tuple[int, ...], index: int = 0) -> GeneratedSample:
    logprobs = tuple(-0.5 * counts for counts in (mask or (1,) * len(tokens)))
    return GeneratedSample("0", index, tokens, logprobs, "stop", 0, 3, loss_mask=mask)


def test_a_sample_is_trained_on_up_to_its_last_token_that_counts(folder: Path) -> None:
    """What comes after has no part in the loss: the logprobs before it are those of the whole sequence."""
    prompt = Prompt(0, "task", "?", (1, 2, 3), "")
    cut, none = response((7, 8, 9, 10, 11), (1, 0, 1, 0, 0)), response((7, 8), (0, 0), 1)
    batch = train_batch(
        [Sample(prompt, cut, "", 1.0), Sample(prompt, none, "", 0.0)], AlgorithmConfig(normalize_std=False)
    )
    assert batch == [TrainSample((1, 2, 3, 7, 8, 9), 3, (-0.5, 0.0, -0.5), 0.5, loss_mask=(1, 0, 1), reward=1.0)]
    model = load_reference(folder)
    with torch.no_grad():
        whole, _ = hf_logprobs(model, replace(batch[0], token_ids=(1, 2, 3, 7, 8, 9, 10, 11)))
        short, _ = hf_logprobs(model, batch[0])
    torch.testing.assert_close(short, whole[:3])


def test_flat_samples_count_in_the_mean_with_the_tokens_that_count() -> None:
    samples = [
        TrainSample((1, 2, 3), 1, (-1.0, 0.0), 0.0, loss_mask=(1, 0)),
        TrainSample((1, 2, 3), 1, (-1.0, -1.0), 0.5),
        TrainSample((1, 2, 3, 4), 1, (-1.0, 0.0, -1.0), 0.5, loss_mask=(1, 0, 1)),
    ]
    split = split_batch(samples, leave_out_flat=True)
    assert (split.num_flat_tokens, split.num_trained_tokens, split.num_tokens) == (1, 4, 5)


def test_a_draft_learns_from_runs_of_tokens_that_count() -> None:
    """An engine drafts no tool's result. Tokens 10 to 12 and 16 to 20 were generated, 13 to 15 were not."""
    mask = (1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1)
    sample = TrainSample(tuple(range(21)), 10, tuple(-1.0 * each for each in mask), 1.0, loss_mask=mask)
    (plan,) = plan_microbatches([sample], 64, 1)[0]
    seen = set()
    for seed in range(60):
        (chosen,) = choose_replies([sample], 1, 3, str(seed))
        (rows,) = reply_rows([sample], plan, [chosen], max_length=100)
        drafted_after = rows.token_ids[-chosen.num_rows - 1 :]  # the window's tokens and the one after it
        assert set(drafted_after) <= {10, 11, 12} or set(drafted_after) <= {16, 17, 18, 19, 20}
        assert rows.token_ids == tuple(range(rows.token_ids[-1] + 1)), "what came before, results included, is seen"
        seen.add(drafted_after)
    assert seen == {(10, 11, 12), (16, 17, 18, 19), (17, 18, 19, 20)}
