"""Response metadata: SGLang's three generations of keys, RTP-LLM's, and the identities between them."""

from pathlib import Path

import pytest

from slime_spec.speculation.meta_info import accepted_per_position, meta_info
from slime_spec.types import GeneratedSample, GroupRequest, SpecCounters
from tests.support.embedded_harness import engine_config, greedy, make_core, random_prompt, run


def sample_with(spec: SpecCounters, num_tokens: int) -> GeneratedSample:
    return GeneratedSample("g", 0, (7,) * num_tokens, (-0.5,) * num_tokens, "length", 3, 10, spec, 1.5)


def test_every_generation_of_keys_says_the_same() -> None:
    info = meta_info(sample_with(SpecCounters(num_rounds=3, num_proposed=9, histogram=(1, 0, 1, 1)), 9))
    assert info["spec_verify_ct"] == info["speculative_draft_rounds"] == 3
    assert info["spec_num_correct_drafts"] == info["spec_accepted_drafts"] == info["spec_accept_token_num"] == 5
    assert info["spec_num_proposed_drafts"] == info["spec_proposed_drafts"] == info["spec_draft_token_num"] == 9
    assert info["spec_correct_drafts_histogram"] == info["spec_accept_histogram"] == [1, 0, 1, 1]
    assert info["spec_accept_rate"] == 5 / 9
    assert info["spec_accept_length"] == 3.0
    assert (info["iter_count"], info["avg_tokens_per_iter"]) == (4, 2.25)
    assert info["speculative_accepted_tokens_per_pos"] == [2, 2, 1]


def test_sglangs_own_example_is_reproduced() -> None:
    """200 tokens, 188 rounds, 11 correct of 940 proposed."""
    info = meta_info(sample_with(SpecCounters(188, 940, (177, 11)), 200))
    assert (info["spec_num_correct_drafts"], info["spec_num_proposed_drafts"]) == (11, 940)
    assert info["spec_accept_length"] == pytest.approx(200 / 188)
    assert info["completion_tokens"] == 1 + info["spec_verify_ct"] + info["spec_num_correct_drafts"]


def test_rtp_llms_survival_counts_are_as_long_as_a_draft() -> None:
    assert accepted_per_position(SpecCounters(1, 3, (0, 0, 1))) == [1, 1, 0]


def test_speculative_keys_are_absent_when_no_round_ran() -> None:
    info = meta_info(sample_with(SpecCounters(), 4))
    assert not [key for key in info if key.startswith("spec") or key == "iter_count"]
    assert info["output_token_logprobs"] == [(-0.5, 7, None)] * 4
    assert (info["finish_reason"], info["weight_version"], info["prompt_tokens"]) == ({"type": "length"}, "3", 10)


@pytest.mark.parametrize("num_draft_tokens", [2, 5, 8])
def test_the_identities_hold_on_every_request(tiny_llama: Path, num_draft_tokens: int) -> None:
    requests = [GroupRequest(str(i), random_prompt(5, seed=i) * 3, (0,), greedy(1 + 9 * i)) for i in range(12)]
    samples = run(make_core(engine_config(tiny_llama, "LOOKUP", num_draft_tokens)), requests)
    for sample in samples.values():
        info = meta_info(sample)
        if len(sample.token_ids) == 1:
            assert "spec_verify_ct" not in info
            continue
        assert info["completion_tokens"] == 1 + info["spec_verify_ct"] + info["spec_num_correct_drafts"]
        assert info["spec_num_proposed_drafts"] == info["spec_verify_ct"] * (num_draft_tokens - 1)
        assert sum(info["spec_correct_drafts_histogram"]) == info["spec_verify_ct"]
        assert sum(info["speculative_accepted_tokens_per_pos"]) == info["spec_num_correct_drafts"]
        assert info["iter_count"] * info["avg_tokens_per_iter"] == pytest.approx(info["completion_tokens"])
