"""Samples of several turns that a function of the user's own makes, on the embedded engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.errors import CustomFunctionError
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.rl.advantages import train_batch
from slime_spec.types import Sample
from tests.support.agents_harness import agents_config, one_turn, step_of, two_turns
from tests.support.tiny_models import load_reference
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def reference_logprobs(folder: Path, token_ids: tuple[int, ...], prompt_len: int) -> list[float]:
    """Of one forward pass of transformers over the whole sequence."""
    with torch.no_grad():
        logits = load_reference(folder)(torch.tensor([token_ids])).logits[0].double()
    logprobs = logits.log_softmax(-1)[prompt_len - 1 : -1]
    return logprobs.gather(-1, torch.tensor(token_ids[prompt_len:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("algorithm", ["NONE", "LOOKUP", "NGRAM", "HISTORY"])
def test_logprobs_of_all_turns_are_those_of_one_forward_pass_over_the_whole_sequence(
    folder: Path, algorithm: str
) -> None:
    rollout, _ = step_of(agents_config(folder, algorithm), two_turns)
    assert len(rollout.samples) == 4
    for sample in rollout.samples:
        response = sample.response
        whole = sample.prompt.token_ids + response.token_ids
        expected = reference_logprobs(folder, whole, len(sample.prompt.token_ids))
        assert 0 < sum(response.loss_mask) < len(response.loss_mask)
        for counts, got, at_once in zip(response.loss_mask, response.logprobs, expected, strict=True):
            assert got == (pytest.approx(at_once, abs=2e-4) if counts else 0.0)
    if algorithm != "NONE":
        assert sum(sample.response.spec.num_rounds for sample in rollout.samples) > 0


def test_what_was_generated_comes_back_token_for_token_and_a_tools_result_does_not_count(folder: Path) -> None:
    rollout, engines = step_of(agents_config(folder), two_turns)
    asked = {request.group_id: request.prompt_token_ids for request in engines.asked}
    tokenizer = Tokenizer.load(folder)
    for sample, own in zip(rollout.samples, rollout.owns, strict=True):
        response, name = sample.response, f"{sample.prompt.prompt_id}/{sample.response.sample_index}"
        result = tokenizer.encode(own.metadata["result"])
        first, second = asked[f"{name}/0"], asked[f"{name}/1"]
        num_first = len(second) - len(first) - len(result)
        assert first == sample.prompt.token_ids
        assert second == first + response.token_ids[:num_first] + result
        num_second = len(response.token_ids) - num_first - len(result)
        assert response.loss_mask == (1,) * num_first + (0,) * len(result) + (1,) * num_second
        assert own.metadata["result"] == f"<{len(set(second[: len(second) - len(result)]))}>"
        assert (response.turns.num_turns, response.num_generated_tokens) == (2, num_first + num_second)
    metrics = rollout_metrics(rollout.samples)
    assert metrics["rollout/turns_mean"] == 2
    assert metrics["rollout/response_len_mean"] == sum(sum(s.response.loss_mask) for s in rollout.samples) / 4
    batch = train_batch(rollout.samples, AlgorithmConfig(normalize_std=True))
    assert all(each.loss_mask and each.loss_mask[-1] == 1 for each in batch)


def test_a_rerun_gives_the_same_samples_whenever_tools_answer_and_one_turn_is_the_plain_rollout(folder: Path) -> None:
    config = agents_config(folder)

    async def slower(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
        await asyncio.sleep(0.002 * (3 - (sample.group_index or 0) - (sample.index or 0)))
        return await two_turns(args, sample, sampling_params, client)

    first, _ = step_of(config, two_turns)
    again, _ = step_of(config, slower)
    assert _tokens(first.samples) == _tokens(again.samples)
    plain, _ = step_of(config, None)
    single, _ = step_of(config, one_turn)
    assert _tokens(plain.samples) == _tokens(single.samples)
    assert len({tokens for _, tokens in _tokens(plain.samples)}) == 4


def _tokens(samples: list[Sample]) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    return [((each.prompt.prompt_id, each.response.sample_index), each.response.token_ids) for each in samples]


def sample_error(folder: Path, function: Callable[..., Any], **custom: Any) -> str:
    """Why the first sample of each prompt, for which alone the function fails, is excluded."""

    async def first_fails(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
        if sample.index == 0:
            return await function(args, sample, sampling_params, client)
        return await one_turn(args, sample, sampling_params, client)

    rollout, _ = step_of(agents_config(folder, **custom), first_fails)
    errors = [sample.error for sample in rollout.samples]
    assert [sample.reward is None for sample in rollout.samples] == [True, False, True, False]
    assert rollout_metrics(rollout.samples)["rollout/num_excluded"] == 2
    assert errors[1] == errors[3] == ""
    return errors[0]


async def raises(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    raise KeyError("no such tool")


async def hangs(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await asyncio.Event().wait()


async def tokenises_again(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    turn = await client.turn(sample)
    sample.tokens[-1] = (turn.token_ids[-1] + 1) % 250
    return sample


async def counts_a_result(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await client.turn(sample)
    client.insert(sample, "5")
    sample.loss_mask = None
    return sample


async def other_logprobs(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await client.turn(sample)
    sample.rollout_log_probs[0] -= 0.5
    return sample


async def short_mask(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await client.turn(sample)
    sample.loss_mask = sample.loss_mask[1:]
    return sample


async def nothing(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    return None


async def warmer(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await client.turn(sample, {**sampling_params, "temperature": 0.5})


async def for_slimes_servers(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (raises, "KeyError: 'no such tool'"),
        (tokenises_again, "counts in the loss, and no turn generated it"),
        (counts_a_result, "counts in the loss, and no turn generated it"),
        (other_logprobs, "rollout_log_probs of token 0 must be its turn's"),
        (short_mask, "loss_mask must have a 0 or a 1 for each of the response's"),
        (nothing, "NoneType has no tokens"),
        (warmer, "sampling_params.temperature: must be the run's (1)"),
        (for_slimes_servers, "args has no sglang_router_ip"),
    ],
)
def test_what_a_function_does_wrong_costs_its_own_sample_and_is_told(
    folder: Path, function: Callable[..., Any], expected: str
) -> None:
    assert expected in sample_error(folder, function)


def test_a_function_that_hangs_costs_its_sample(folder: Path) -> None:
    error = sample_error(folder, hangs, generate_timeout_s=0.3)
    assert error == "tests:function gave no sample within 0.3 s (--custom-generate-timeout)"


def test_a_function_that_blocks_the_loop_ends_the_step_with_its_name(folder: Path) -> None:
    async def blocks(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
        time.sleep(1.5)

    with pytest.raises(CustomFunctionError, match=r"tests:function has not awaited anything for 0\.2 s"):
        step_of(agents_config(folder, generate_timeout_s=0.2), blocks)


def test_a_functions_own_reward_stands_and_a_list_of_samples_is_one_group(folder: Path) -> None:
    async def fans_out(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
        turn = await client.turn(sample)
        sample.reward = 1.5
        other = type(sample)(group_index=sample.group_index, index=sample.index, tokens=list(sample.tokens[:-1]))
        other.response_length, other.response, other.reward = len(turn.token_ids) - 1, "", {"score": -0.5}
        return [sample, other]

    rollout, _ = step_of(agents_config(folder), fans_out)
    assert [sample.reward for sample in rollout.samples] == [1.5, -0.5] * 4
    for whole, part in zip(rollout.samples[::2], rollout.samples[1::2], strict=True):
        assert part.response.token_ids == whole.response.token_ids[:-1]
        assert part.response.logprobs == whole.response.logprobs[:-1], "taken from the turn where none were given"
        assert (whole.response.turns.num_turns, part.response.turns.num_turns) == (1, 0), "each turn counts once"
    assert [each.advantage for each in train_batch(rollout.samples[:4], AlgorithmConfig(normalize_std=False))] == [
        1.0,
        -1.0,
        1.0,
        -1.0,
    ]


def test_turns_end_where_the_context_does(folder: Path) -> None:
    async def talks(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
        while (await client.turn(sample, {"max_new_tokens": 40})).token_ids:
            client.insert(sample, "!")
        return sample

    rollout, _ = step_of(agents_config(folder, rollout={"stop_token_ids": (0,)}), talks)
    for sample in rollout.samples:
        assert len(sample.prompt.token_ids) + len(sample.response.token_ids) in (160, 161)
        assert sample.response.finish_reason == "length"
