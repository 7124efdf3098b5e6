"""Response metadata: SGLang's three generations of keys, RTP-LLM's, and the identities between them."""

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.drafting import DraftContext
from slime_spec.sglang.metadata import aux_info, meta_info
from slime_spec.speculation.counters import accepted_per_position
from slime_spec.types import GeneratedSample, GroupRequest, SpecCounters
from tests.support.embedded_harness import VOCAB, ScriptedDrafter, engine_config, greedy, make_core, random_prompt, run


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


def test_in_a_tree_positions_are_the_depths_of_its_paths_and_not_its_nodes() -> None:
    """SGLang's (5, 4, 8): 7 nodes a round, paths of at most 5."""
    spec = SpecCounters(num_rounds=4, num_proposed=28, histogram=(1, 0, 2, 1), num_steps=5)
    assert accepted_per_position(spec) == [3, 3, 1, 0, 0]
    info = meta_info(sample_with(spec, 12))
    assert (info["spec_num_proposed_drafts"], info["spec_accept_rate"]) == (28, 7 / 28)
    assert sum(info["speculative_accepted_tokens_per_pos"]) == info["spec_num_correct_drafts"] == 7


def test_rtp_llms_aux_info_is_whole_and_converts_as_its_guide_says() -> None:
    """Its example: 60 tokens in 12 iterations are 5 an iteration."""
    spec = SpecCounters(num_rounds=11, num_proposed=55, histogram=(0, 0, 0, 3, 2, 6))
    sample = replace(sample_with(spec, 60), cached_tokens=10, wait_s=0.25, first_token_s=0.5)
    info = aux_info(sample)
    assert info["output_len"] / info["iter_count"] == 60 / 12
    assert (info["cost_time"], info["wait_time"], info["first_token_cost_time"]) == (1500.0, 250.0, 500.0)
    assert (info["input_len"], info["output_len"], info["step_output_len"], info["reuse_len"]) == (10, 60, 60, 10)
    assert info["local_reuse_len"] + info["remote_reuse_len"] + info["memory_reuse_len"] == info["reuse_len"]
    assert info["speculative_accepted_tokens_per_pos"] == [11, 11, 11, 8, 6]
    rounds = info["speculative_draft_rounds"]
    assert 1 + sum(info["speculative_accepted_tokens_per_pos"]) / rounds == pytest.approx((60 - 1) / rounds, abs=0.1)
    assert info["cum_log_probs"] == [-30.0]
    assert {"prefix_len", "pd_sep", "beam_responses", "softmax_probs", "role_addrs", "aux_string"} <= set(info)


def test_without_speculation_aux_info_counts_a_step_a_token_and_leaves_out_what_nobody_measured() -> None:
    info = aux_info(sample_with(SpecCounters(), 4))
    assert (info["iter_count"], info["speculative_draft_rounds"]) == (4, 0)
    assert info["speculative_accepted_tokens_per_pos"] == []
    assert not {"wait_time", "first_token_cost_time"} & set(info)


def test_versions_and_lossiness_are_told_where_there_is_something_to_tell() -> None:
    plain = sample_with(SpecCounters(), 4)
    assert not {"weight_version_spans", "draft_version", "lossy"} & set(meta_info(plain))
    told = meta_info(replace(plain, version_spans=((0, 3), (2, 4)), draft_version=2, lossy=True))
    assert told["weight_version_spans"] == [[0, 3], [2, 4]]
    assert (told["draft_version"], told["lossy"]) == ("2", True)


def test_speculative_keys_are_absent_when_no_round_ran() -> None:
    info = meta_info(sample_with(SpecCounters(), 4))
    assert not [key for key in info if key.startswith("spec") or key == "iter_count"]
    assert info["output_token_logprobs"] == [(-0.5, 7, None)] * 4
    assert (info["finish_reason"], info["weight_version"], info["prompt_tokens"]) == (
        {"type": "length", "length": 4},
        "3",
        10,
    )


def test_a_response_says_which_token_or_string_stopped_it_and_an_abort_neither() -> None:
    sample = replace(sample_with(SpecCounters(), 4), finish_reason="stop", matched_stop=7)
    assert meta_info(sample)["finish_reason"] == {"type": "stop", "matched": 7}
    assert meta_info(replace(sample, matched_stop="</s>"))["finish_reason"] == {"type": "stop", "matched": "</s>"}
    aborted = replace(sample, finish_reason="abort", matched_stop=None)
    assert meta_info(aborted)["finish_reason"] == {"type": "abort"}


def test_the_samples_after_a_groups_first_found_the_prompt_in_the_cache(tiny_llama: Path) -> None:
    prompt = random_prompt(9, seed=1)
    core = make_core(engine_config(tiny_llama, max_running_requests=2))
    samples = run(core, [GroupRequest("g", prompt, (0, 1, 2), greedy(5)), GroupRequest("one", prompt, (0,), greedy(5))])
    cached = {key: meta_info(sample)["cached_tokens"] for key, sample in samples.items()}
    assert cached == {("g", 0): 0, ("g", 1): 9, ("g", 2): 9, ("one", 0): 0}


def test_a_sample_aborted_before_it_started_found_nothing_in_the_cache(tiny_llama: Path) -> None:
    core = make_core(engine_config(tiny_llama, max_running_requests=2))
    samples: list[GeneratedSample] = []
    group = core.add(GroupRequest("g", random_prompt(9, seed=1), (0, 1, 2), greedy(5)), samples.append)
    core.step()
    core.abort(group)
    assert {sample.sample_index: sample.cached_tokens for sample in samples} == {0: 0, 1: 9, 2: 0}
    assert {(sample.finish_reason, sample.matched_stop) for sample in samples} == {("abort", None)}


def test_drafted_tokens_and_empty_rounds_count_what_the_drafter_really_proposed(tiny_llama: Path) -> None:
    """Drafts of 0, 1 or 2 tokens by the length of the text; the last token of the budget leaves room for none."""
    proposed: list[int] = []

    def script(context: DraftContext) -> tuple[int, ...]:
        chain = (VOCAB - 1,) * min(len(context.token_ids) % 3, context.max_draft_tokens)
        proposed.append(len(chain))
        return chain

    core = make_core(engine_config(tiny_llama, num_draft_tokens=4), drafter=ScriptedDrafter(script))
    sample = run(core, [GroupRequest("g", random_prompt(6, seed=2), (0,), greedy(20))])["g", 0]
    spec, unasked = sample.spec, sample.spec.num_rounds - len(proposed)
    assert unasked in (0, 1)
    assert spec.num_proposed == 3 * spec.num_rounds
    assert spec.num_drafted == sum(proposed) > 0
    assert spec.num_empty_rounds == proposed.count(0) + unasked > 0
    assert spec.num_correct <= spec.num_drafted


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
