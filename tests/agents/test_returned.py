"""Turns in a sample, worked out by hand: spans, counters, experts, what is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime_spec.agents.client import MadeTurn, params_of
from slime_spec.agents.returned import Asked, ReturnedError, made_of
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.errors import ConfigError
from slime_spec.rl.advantages import train_batch
from slime_spec.rl.rollout_data import load_rollout, save_rollout
from slime_spec.slime_sample import Sample as SlimeSample
from slime_spec.slime_sample import Status
from slime_spec.types import GeneratedSample, Prompt, Sample, SamplingParams, SpecCounters, TurnCounts
from tests.support.agents_harness import agents_config, step_of, two_turns
from tests.support.chat_templates import save_tokenizer
from tests.support.forced_experts import Routing, same_sets
from tests.support.tiny_models import load_reference
from tests.support.tiny_policy import make_tiny_policy

PROMPT = Prompt(7, "task", "?", (1, 2, 3), "x")
ASKED = Asked(PROMPT, 2, weight_version=9, e2e_latency_s=4.0, outside_s=1.5)


def response(*token_ids: int, **other: Any) -> GeneratedSample:
    logprobs = tuple(-0.25 * i for i in range(len(token_ids)))
    return GeneratedSample("7/2/0", 0, token_ids, logprobs, "stop", 4, 3, **other)


# Prompt 1 2 3, turn 10 11 12, result 50 51, turn 20 21.
TURNS = [
    MadeTurn(
        (1, 2, 3),
        response(10, 11, 12, spec=SpecCounters(2, 6, (1, 1), 6, num_off_steps=1), cached_tokens=2, first_token_s=0.5),
    ),
    MadeTurn(
        (1, 2, 3, 10, 11, 12, 50, 51),
        replace(response(20, 21, cached_tokens=6), weight_version=4, version_spans=((0, 4), (1, 5)), engine=3),
    ),
]


def own(tokens: list[int], mask: list[int] | None, **other: Any) -> SlimeSample:
    return SlimeSample(tokens=tokens, response_length=len(tokens) - 3, loss_mask=mask, **other)


WHOLE = own([1, 2, 3, 10, 11, 12, 50, 51, 20, 21], [1, 1, 1, 0, 0, 1, 1])


def test_a_sample_has_its_turns_tokens_versions_and_counters() -> None:
    (made,) = made_of(WHOLE, TURNS, ASKED)
    got = made.response
    assert (made.prompt, got.token_ids) == (PROMPT, (10, 11, 12, 50, 51, 20, 21))
    assert got.logprobs == (0.0, -0.25, -0.5, 0.0, 0.0, 0.0, -0.25)
    assert (got.version_spans, got.weight_version) == (((0, 4), (6, 5)), 4)
    assert (got.spec.num_rounds, got.spec.num_correct, got.num_verified_tokens) == (2, 1, 3 - 1)
    assert got.turns == TurnCounts(2, 5, 2, 3 + 8, 1.5)
    assert (got.cached_tokens, got.first_token_s, got.engine, got.e2e_latency_s) == (8, 0.5, 3, 4.0)
    assert (got.group_id, got.sample_index, got.num_prompt_tokens, got.finish_reason) == ("7", 2, 3, "stop")


def test_a_turn_that_was_cut_counts_as_far_as_it_stands_and_one_that_was_left_out_in_the_counters_alone() -> None:
    (cut,) = made_of(own([1, 2, 3, 10, 11], None, status=Status.TRUNCATED), TURNS, ASKED)
    assert (cut.response.token_ids, cut.response.logprobs) == ((10, 11), (0.0, -0.25))
    assert (cut.response.loss_mask, cut.response.finish_reason) == ((), "length")
    assert cut.response.version_spans == ()
    assert cut.response.turns is not None
    assert cut.response.turns.num_generated_tokens == 5
    (removed,) = made_of(replace(WHOLE, remove_sample=True), TURNS, ASKED)
    assert removed.response.num_loss_tokens == 0


def test_of_turns_that_were_tried_again_the_one_that_is_in_the_sample_counts() -> None:
    """A reply 10 99 was discarded for 10 11 12, another that goes on after them was too; in either order."""
    first, second = TURNS
    discarded = MadeTurn((1, 2, 3), replace(response(10, 99), logprobs=(-7.0, -7.0), weight_version=8))
    longer = MadeTurn((1, 2, 3), replace(response(10, 11, 12, 60), logprobs=(-7.0,) * 4, finish_reason="length"))
    expected = made_of(WHOLE, TURNS, ASKED)[0].response
    alone = made_of(own([1, 2, 3, 10, 11, 12], None), [first], ASKED)[0].response
    for others in ([discarded], [longer], [discarded, longer]):
        for turns in ([*others, first, second], [first, *others, second]):
            (made,) = made_of(WHOLE, turns, ASKED)
            assert made.response.logprobs == expected.logprobs
            assert made.response.version_spans == expected.version_spans
            (made,) = made_of(own([1, 2, 3, 10, 11, 12], None), turns, ASKED)
            assert (made.response.logprobs, made.response.finish_reason) == (alone.logprobs, "stop")


def test_a_prompt_of_the_functions_own_takes_the_prompts_place() -> None:
    turn = MadeTurn((8, 9), response(10, 11))
    (made,) = made_of(SlimeSample(tokens=[8, 9, 10, 11], response_length=2), [turn], ASKED)
    assert made.prompt == replace(PROMPT, token_ids=(8, 9))
    batch = train_batch([Sample(made.prompt, made.response, "", 1.0)], AlgorithmConfig(normalize_std=False))
    assert (batch[0].token_ids, batch[0].prompt_len) == ((8, 9, 10, 11), 2)


def test_another_engines_samples_are_taken_with_their_logprobs() -> None:
    given = own([1, 2, 3, 10, 11], None, rollout_log_probs=[-1.0, -2.0])
    (made,) = made_of(given, [], ASKED)
    assert (made.response.logprobs, made.response.weight_version) == ((-1.0, -2.0), 9)
    with pytest.raises(ReturnedError, match="rollout_log_probs are needed"):
        made_of(replace(given, rollout_log_probs=None), [], ASKED)
    with pytest.raises(ReturnedError, match="that of token 1 is nan"):
        made_of(replace(given, rollout_log_probs=[-1.0, float("nan")]), [], ASKED)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "returned no sample"),
        (replace(WHOLE, status=Status.ABORTED), "with the status aborted"),
        (replace(WHOLE, response_length=10), "must leave a token to the prompt: it is 10 of 10"),
        (replace(WHOLE, tokens=["a"]), "tokens must be token ids"),
        (replace(WHOLE, loss_mask=[1, 1, 1, 0, 2, 1, 1]), "a 0 or a 1"),
        (replace(WHOLE, tokens=[1, 2, 3, 10, 11, 12, 50, 52, 20, 21]), "token 5 of the response counts"),
    ],
)
def test_what_cannot_be_trained_on_is_told(given: Any, expected: str) -> None:
    with pytest.raises(ReturnedError, match=expected):
        made_of(given, TURNS, ASKED)


def test_a_saved_sample_of_several_turns_comes_back(tmp_path: Path) -> None:
    (made,) = made_of(WHOLE, TURNS, ASKED)
    saved = [Sample(made.prompt, made.response, "text", 1.0)]
    template = str(tmp_path / "{rollout_id}.pt")
    save_rollout(template, 0, saved)
    assert load_rollout(template, 0) == saved


def test_sampling_parameters_stand_above_the_runs() -> None:
    run = SamplingParams(max_new_tokens=40, temperature=0.7, stop=("a",))
    given = {"max_new_tokens": 5, "stop": "b", "temperature": 0.7, "skip_special_tokens": False, "top_p": None}
    assert params_of(given, run) == replace(run, max_new_tokens=5, stop=("b",))
    for name, value in (("temperature", 1.0), ("sampling_seed", 3), ("max_tokens", 3)):
        with pytest.raises(ConfigError, match=rf"sampling_params\.{name}"):
            params_of({name: value}, run)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTS = "{{ messages | length }}" + CHATML


def test_messages_after_a_reply_are_what_the_chat_template_writes_there(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path / "chatml", CHATML, eos_token="<|im_end|>"))
    message = [{"role": "user", "content": "5"}]
    opened = "<|im_start|>user\n5<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.after_assistant(message, ended=False) == "<|im_end|>\n" + opened
    assert tokenizer.after_assistant(message, ended=True) == "\n" + opened
    with pytest.raises(ConfigError, match="write what came before as it did before the messages"):
        Tokenizer.load(save_tokenizer(tmp_path / "counts", COUNTS)).after_assistant(message, ended=False)


def test_a_tokens_experts_are_those_that_transformers_chooses_over_the_whole_sequence(tmp_path: Path) -> None:
    folder = make_tiny_policy(tmp_path, architecture="Qwen3MoeForCausalLM")
    config = agents_config(folder, rollout={"routing_replay": True})
    rollout, _ = step_of(config, two_turns)
    model = load_reference(folder)
    for each in train_batch(rollout.samples, AlgorithmConfig(normalize_std=True), replays_routing=True):
        with Routing(model, ModelSpec.from_folder(folder)).watched() as routing, torch.no_grad():
            model(torch.tensor([each.token_ids[:-1]]))
        assert each.routed_experts is not None
        assert np.shape(each.routed_experts.ids)[0] == len(each.token_ids) - 1
        assert same_sets(each.routed_experts.ids, routing.choices).all()
