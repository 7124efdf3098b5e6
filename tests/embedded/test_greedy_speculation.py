"""Greedy decoding with speculation gives greedy decoding's tokens, all of them."""

from pathlib import Path

import pytest

from slime_spec.types import GroupRequest
from tests.support.embedded_harness import (
    ReplayDrafter,
    Samples,
    ScriptedDrafter,
    engine_config,
    greedy,
    make_core,
    random_prompt,
    run,
)

NUM_PROMPTS, NUM_TOKENS = 64, 128
PROMPTS = [random_prompt(4 + i % 9, seed=i) * (1 + i % 3) for i in range(NUM_PROMPTS)]
REQUESTS = [GroupRequest(str(i), prompt, (0,), greedy(NUM_TOKENS)) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Samples:
    return run(make_core(engine_config(tiny_llama, max_running_requests=16)), REQUESTS)


def same_tokens(left: Samples, right: Samples) -> bool:
    return {key: s.token_ids for key, s in left.items()} == {key: s.token_ids for key, s in right.items()}


@pytest.mark.parametrize("num_draft_tokens", [2, 4, 6, 8])
def test_prompt_lookup_is_token_identical_over_64_prompts_of_128_tokens(
    tiny_llama: Path, plain: Samples, num_draft_tokens: int
) -> None:
    samples = run(make_core(engine_config(tiny_llama, "LOOKUP", num_draft_tokens)), REQUESTS)
    assert same_tokens(samples, plain)
    assert sum(sample.spec.num_correct for sample in samples.values()) > 0


def test_an_oracle_drafter_has_every_draft_accepted(tiny_llama: Path, plain: Samples) -> None:
    config = engine_config(tiny_llama, num_draft_tokens=5)
    samples = run(make_core(config, drafter=ReplayDrafter(plain, PROMPTS)), REQUESTS)
    assert same_tokens(samples, plain)
    for sample in samples.values():
        # 127 tokens after the prefill's: 25 rounds of 4 drafts and a bonus, then one of the last 2 tokens.
        assert sample.spec.histogram == (0, 1, 0, 0, 25)


def test_an_adversarial_drafter_changes_nothing_and_has_no_draft_accepted(tiny_llama: Path, plain: Samples) -> None:
    drafter = ReplayDrafter(plain, PROMPTS, wrong_every=1)
    samples = run(make_core(engine_config(tiny_llama), drafter=drafter), REQUESTS)
    assert same_tokens(samples, plain)
    assert {sample.spec.histogram for sample in samples.values()} == {(NUM_TOKENS - 1,)}


def test_random_drafts_of_random_lengths_change_nothing(tiny_llama: Path, plain: Samples) -> None:
    def script(context):  # type: ignore[no-untyped-def]
        length = len(context.token_ids)
        return random_prompt(length * 7 % 5, seed=length * 1000 + context.request_key)

    samples = run(make_core(engine_config(tiny_llama), drafter=ScriptedDrafter(script)), REQUESTS)
    assert same_tokens(samples, plain)


def test_a_request_may_refuse_speculation(tiny_llama: Path, plain: Samples) -> None:
    requests = [
        GroupRequest(str(i), PROMPTS[i], (0,), greedy(NUM_TOKENS, speculative=i % 2 == 0)) for i in range(NUM_PROMPTS)
    ]
    samples = run(make_core(engine_config(tiny_llama, "LOOKUP")), requests)
    assert same_tokens(samples, plain)
    assert {bool(sample.spec.num_rounds) for (name, _), sample in samples.items() if int(name) % 2} == {False}
