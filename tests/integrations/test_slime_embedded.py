"""slime's samples are generated on an embedded engine in slime's own process, and scored by this project's rewards."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from slime.observability.rollout_metrics import log_rollout_data
from slime.rollout.sglang_rollout import generate_and_rm_group
from slime.utils.types import Sample, Status

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.errors import ConfigError
from slime_spec.integrations import slime
from slime_spec.integrations.embedded import Embedded
from slime_spec.integrations.plugin import Plugin
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import engine_config, make_core, run
from tests.support.tiny_policy import make_tiny_policy

Args = Callable[..., Namespace]
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 24, "no_stop_trim": True}
PROMPT = "one two one two one two"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture
def args(policy: Path, slime_args: Args) -> Namespace:
    drafts = ["--speculative-algorithm", "LOOKUP", "--speculative-num-draft-tokens", "5"]
    engine = [*drafts, "--sglang-dtype", "float32", "--sglang-max-total-tokens", "4096"]
    return slime_args(
        hf_checkpoint=str(policy),
        sglang_speculative_algorithm="LOOKUP",
        custom_generate_function_path="slime_spec.integrations.slime.generate_embedded",
        slime_spec={"engine": engine, "reward": "contains"},
    )


def group(**changed: Any) -> list[Sample]:
    return [Sample(index=i, group_index=0, prompt=PROMPT, label="", **changed) for i in range(3)]


def test_samples_are_the_policys_and_are_logged_with_their_acceptance(
    args: Namespace, policy: Path, plugin: Plugin, logged: list[dict[str, Any]]
) -> None:
    greedy = {**SAMPLING, "temperature": 0.0, "ignore_eos": True}
    samples = asyncio.run(generate_and_rm_group(args, group(), greedy))
    log_rollout_data(0, args, samples, None, 1.0)
    prompt = Tokenizer.load(policy).encode(PROMPT, special=False)
    request = GroupRequest("plain", prompt, (1,), SamplingParams(24, temperature=0.0, ignore_eos=True))
    plain = run(make_core(engine_config(policy)), [request])
    (expected,) = plain.values()
    for sample in samples:
        assert tuple(sample.tokens) == (*prompt, *expected.token_ids)
        assert sample.rollout_log_probs == pytest.approx(list(expected.logprobs), abs=1e-4)
        assert (sample.status, sample.response_length, sample.reward) == (Status.TRUNCATED, 24, 1.0)
    (metrics,) = logged
    counted = [answer for sample in samples for answer in sample.slime_spec_answers]
    assert metrics["spec/verify_rounds"] == sum(each["spec_verify_ct"] for each in counted) > 0
    assert metrics["spec/net_speedup_est"] > 0


def test_a_seed_of_the_run_and_the_sample_says_what_is_sampled(args: Namespace, plugin: Plugin) -> None:
    first, again = (asyncio.run(generate_and_rm_group(args, group(), SAMPLING)) for _ in range(2))
    assert [each.tokens for each in first] == [each.tokens for each in again]
    assert len({tuple(each.tokens) for each in first}) == 3
    args.rollout_seed = 2
    other = asyncio.run(generate_and_rm_group(args, group(), SAMPLING))
    assert [each.tokens for each in other] != [each.tokens for each in first]


def test_a_sample_goes_on_from_the_tokens_that_it_has(args: Namespace, plugin: Plugin) -> None:
    greedy = {**SAMPLING, "temperature": 0.0, "ignore_eos": True}

    async def both() -> tuple[Sample, Sample]:
        whole = await slime.generate_embedded(args, Sample(index=0, prompt=PROMPT, label=""), greedy)
        part = await slime.generate_embedded(
            args, Sample(index=0, prompt=PROMPT, label=""), {**greedy, "max_new_tokens": 10}
        )
        part.status, part.reward = Status.ABORTED, None
        return whole, await slime.generate_embedded(args, part, greedy)

    whole, resumed = asyncio.run(both())
    assert resumed.tokens == whole.tokens
    assert (resumed.response_length, len(resumed.slime_spec_answers)) == (24, 2)
    full = asyncio.run(slime.generate_embedded(args, resumed, greedy))
    assert (full.response_length, full.status) == (24, Status.TRUNCATED)


def test_as_many_samples_wait_as_the_engine_decodes_at_once(
    args: Namespace, plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_samples = 40  # more than the 32 threads that a loop has by itself at most
    all_of_them = Barrier(num_samples, timeout=60.0)
    only = Embedded._only

    def when_all_are_there(self: Embedded, request: GroupRequest) -> Any:
        all_of_them.wait()
        return only(self, request)

    monkeypatch.setattr(Embedded, "_only", when_all_are_there)
    samples = [Sample(index=i, group_index=0, prompt=PROMPT, label="") for i in range(num_samples)]
    asyncio.run(generate_and_rm_group(args, samples, {**SAMPLING, "max_new_tokens": 2}))
    assert [each.response_length for each in samples] == [2] * num_samples


def test_what_the_engine_cannot_do_is_refused_by_name(args: Namespace, plugin: Plugin) -> None:
    with pytest.raises(ConfigError, match="prompt: must be a text"):
        asyncio.run(slime.generate_embedded(args, Sample(prompt=[{"role": "user"}]), dict(SAMPLING)))
    top_p = {**SAMPLING, "top_p": 0.9, "custom_params": {"return_top_p_token_ids": True}}
    with pytest.raises(ConfigError, match=r"sampling_params.custom_params"):
        asyncio.run(slime.generate_embedded(args, Sample(prompt=PROMPT), top_p))


def test_a_reward_that_fails_says_so(args: Namespace, plugin: Plugin) -> None:
    args.slime_spec = {**args.slime_spec, "reward": "last_integer"}
    with pytest.raises(RuntimeError, match=r"slime_spec.reward last_integer: "):
        asyncio.run(slime.generate_embedded(args, Sample(prompt=PROMPT, label="five"), dict(SAMPLING)))
