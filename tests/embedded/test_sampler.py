"""The sampling distribution, what requests add to it, and the draw from it."""

from dataclasses import replace
from math import inf, isfinite, isnan, log
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification.distributions import kept_mass, sampling_distribution
from rollout.embedded.verification.draw import argmax, inverse_cdf
from rollout.embedded.verification.penalties import adjusted
from rollout.embedded.verification.reference import adjust_reference, distribution_reference
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import NODES_PER_CHUNK, RuleVerifier
from rollout.embedded.verification.walk import target_only
from slime_spec.errors import ConfigError
from slime_spec.preflight.requests import RequestLimits, check_request
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.emission import FixedUniforms

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 1, 2, 5, 40, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.83, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


def drawn(logits: torch.Tensor, params: list[SamplingParams], uniform: float) -> list[Verified]:
    """One plain token per row of ``logits``."""
    rows = [VerifyRow(NO_DRAFT, each, FixedUniforms(0, [uniform]), (0,), 1) for each in params]
    return RuleVerifier(target_only)(logits, rows)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 10**6), vocab=st.sampled_from([9, 300, 2100]))
def test_the_distribution_of_a_mixed_batch_equals_the_slow_one_row_by_row(
    rows: list[SamplingParams], seed: int, vocab: int
) -> None:
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    weights = sampling_distribution(logits, rows, out=torch.full_like(logits, torch.nan))
    mass = kept_mass(weights, rows)
    for row, params in enumerate(rows):
        distribution = weights[row].double() / mass[row]
        assert (distribution - distribution_reference(logits[row], params)).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [5000, 9000, 20000])
def test_a_nucleus_wider_than_the_first_candidates_is_found_whole(vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 0.01
    params = [SamplingParams(top_p=p) for p in (0.9, 0.1, 1.0)]
    weights = sampling_distribution(logits, params)
    for row, each in enumerate(params):
        assert int((weights[row] > 0).sum()) == pytest.approx(
            int((distribution_reference(logits[row], each) > 0).sum()), abs=1
        )


def test_tied_tokens_are_kept_together_whatever_their_order() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    weights = sampling_distribution(logits, [SamplingParams(top_k=2)])
    assert (weights > 0).tolist() == [[True, True, True, True, False]]
    nucleus = sampling_distribution(
        logits, [SamplingParams(top_k=2, top_p=0.6)]
    )  # ties count in the mass that top-p measures
    assert (nucleus > 0).tolist() == [[True, True, True, True, False]]


def test_filters_apply_in_turn_and_not_jointly() -> None:
    p = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.25]]) / 16
    weights = sampling_distribution(p.log(), [SamplingParams(top_k=4, top_p=0.8)])
    # Top-k leaves 14/16, of which 0.8 needs three tokens; of the whole distribution it would need a fourth.
    assert (weights > 0).tolist() == [[True] * 3 + [False] * 5]


def test_the_callers_logits_are_never_written() -> None:
    logits = torch.randn(1, 300)
    before = logits.clone()
    params = SamplingParams(temperature=0.5, top_p=0.9, frequency_penalty=1.0, logit_bias=((3, 9.0),))
    drawn(logits.expand(4, -1), [params, SamplingParams(), SamplingParams(temperature=0.0), params], 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab", [1, 7, 256, 257, 1024, 3001])
def test_the_two_level_draw_equals_a_cumulative_sum(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(400, vocab, generator=generator)
    weights[:, ::3] = 0.0
    weights[:, 0] += 0.01
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    cumulative = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    assert torch.equal(inverse_cdf(weights, uniforms), expected)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_a_token_of_weight_zero_is_never_drawn_even_at_the_ends(uniform: float) -> None:
    weights = torch.zeros(1, 700)
    weights[0, 300] = weights[0, 301] = 0.1
    token = int(inverse_cdf(weights, torch.tensor([uniform], dtype=torch.float64)))
    assert token == (300 if uniform == 0.0 else 301)


def test_a_uniform_on_the_boundary_belongs_to_the_next_token() -> None:
    weights = torch.zeros(1, 600)
    weights[0, [3, 5, 256]] = torch.tensor([1.0, 1.0, 2.0])  # boundaries within a block and between blocks
    uniforms = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert inverse_cdf(weights.expand(2, -1), uniforms).tolist() == [5, 256]


@pytest.mark.parametrize("vocab", [1, 7, 256, 257, 1024, 3001])
def test_the_two_level_argmax_is_the_first_largest_entry(vocab: int) -> None:
    logits = torch.randint(-9, 3, (300, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    first = [row.index(max(row)) for row in logits.tolist()]
    assert argmax(logits).tolist() == first
    assert argmax(logits[:1].expand(5, -1)).tolist() == first[:1] * 5


def test_greedy_rows_take_the_argmax_and_report_raw_logprobs() -> None:
    logits = torch.randn(4, 300)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.5)] * 2
    verified = drawn(logits, params, 0.999)
    assert [verified[0].token_ids, verified[2].token_ids] == logits[[0, 2]].argmax(-1).unsqueeze(1).tolist()
    for row, temperature in enumerate((1.0, 0.5, 1.0, 0.5)):
        expected = (logits[row] / temperature).log_softmax(-1)[verified[row].token_ids[0]]
        assert verified[row].logprobs[0] == pytest.approx(float(expected), abs=1e-5)


def test_logprobs_are_not_renormalised_for_the_filters() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    [verified] = drawn(logits, [SamplingParams(top_k=1)], 0.5)
    assert verified.token_ids == [0]
    assert verified.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, 0]), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.4])
def test_logprobs_are_those_of_the_adjusted_logits(temperature: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=temperature, presence_penalty=1.5, logit_bias=((5, 2.0),))
    row = VerifyRow(NO_DRAFT, params, FixedUniforms(3, [0.7]), (1, 2, 7, 5, 5), 2)
    [verified] = RuleVerifier(target_only)(logits, [row])
    after = adjust_reference(logits[0], params, (1, 2), (7, 5, 5), frozenset()) / (temperature or 1.0)
    assert verified.logprobs[0] == pytest.approx(float(after.log_softmax(-1)[verified.token_ids[0]]), abs=1e-5)


HISTORY = st.lists(st.integers(0, 11), min_size=1, max_size=9)
ADJUSTMENTS = st.builds(
    SamplingParams,
    frequency_penalty=st.sampled_from([0.0, 0.6, -1.0]),
    presence_penalty=st.sampled_from([0.0, 0.9, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.4, 0.7]),
    min_new_tokens=st.sampled_from([0, 3, 7]),
    stop_token_ids=st.sampled_from([(), (4,), (99,)]),
    logit_bias=st.sampled_from([(), ((2, 3.0), (11, -5.0)), ((0, float("-inf")),)]),
)


@settings(max_examples=60, deadline=None)
@given(params=st.lists(ADJUSTMENTS, min_size=1, max_size=3), tokens=HISTORY, drafted=HISTORY, data=st.data())
def test_adjustments_follow_the_path_of_every_node(
    params: list[SamplingParams], tokens: list[int], drafted: list[int], data: st.DataObject
) -> None:
    parents = [data.draw(st.integers(-1, index - 1)) for index in range(len(drafted))]
    num_prompt = data.draw(st.integers(1, len(tokens)))
    rows = [
        VerifyRow(Draft(tuple(drafted), tuple(parents)), each, Uniforms(0, 9), tokens, num_prompt) for each in params
    ]
    logits = torch.randn(len(rows) * (1 + len(drafted)), 12, generator=torch.Generator().manual_seed(len(tokens)))
    got = adjusted(logits, rows, frozenset({1}))
    paths: list[list[int]] = [[]]
    for token_id, parent in zip(drafted, parents, strict=True):
        paths.append([*paths[parent + 1], token_id])
    for index, (each, path) in enumerate((each, path) for each in params for path in paths):
        generated = [*tokens[num_prompt:], *path]
        within = SamplingParams(**{**vars(each), "stop_token_ids": tuple(i for i in each.stop_token_ids if i < 12)})
        expected = adjust_reference(logits[index], within, tokens[:num_prompt], generated, frozenset({1}))
        torch.testing.assert_close(got[index].double(), expected, atol=1e-5, rtol=1e-5)


EXTREMES: dict[str, list[Any]] = {
    "temperature": [1e-6, 1e-3, 1.0, 1e6, 1e30],
    "top_k": [-1, 1, 11],
    "top_p": [5e-324, 1e-300, 1e-30, 0.5, 1.0],
    "min_p": [0.0, 5e-324, 1.0],
    "frequency_penalty": [0.0, -2.0, 2.0],
    "presence_penalty": [0.0, -2.0, 2.0],
    "repetition_penalty": [1.0, 1e-9, 2.0],
    "min_new_tokens": [0, 9],
    "stop_token_ids": [(), tuple(range(3, 12)), tuple(range(11))],
    "logit_bias": [
        (),
        ((2, 1e30), (11, -1e30)),
        tuple((i, 1e30) for i in range(12)),
        tuple((i, -1e30) for i in range(12)),
        tuple((i, -inf) for i in range(11)),
    ],
}


def test_whatever_the_bounds_allow_is_a_distribution_and_the_right_one() -> None:
    """Case audit/01: at the bounds, and all of them at once, 32-bit logits overflow to NaN nowhere."""
    choose = Random(0)
    num_checked = 0
    for seed in range(600):
        params = SamplingParams(**{name: choose.choice(values) for name, values in EXTREMES.items()})
        request = GroupRequest("g", (1, 2), (0,), replace(params, max_new_tokens=99))
        limits = RequestLimits(12, 200, "NONE", eos_token_ids=frozenset({1}))
        banned = {token for token, bias in params.logit_bias if bias == -inf}
        if len(banned.union({1}, params.stop_token_ids) if params.min_new_tokens else banned) == 12:
            with pytest.raises(ConfigError, match="must leave a token to choose"):
                check_request(request, limits)
            continue
        check_request(request, limits)
        scale = choose.choice([1.0, 1e4])
        logits = scale * torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
        row = VerifyRow(NO_DRAFT, params, FixedUniforms(5, [0.4]), (1, 2, 3, 7, 7, 7, 7), 2)
        expected = distribution_reference(logits[0], params, (1, 2), (3, 7, 7, 7, 7), frozenset({1}))
        weights = sampling_distribution(adjusted(logits, [row], frozenset({1})), [params])
        assert (weights[0].double() / weights[0].double().sum() - expected).abs().max() < 1e-3, params
        [verified] = RuleVerifier(target_only, frozenset({1}))(logits, [row])
        assert isfinite(verified.logprobs[0])
        num_checked += 1
    assert num_checked > 400


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_without_a_distribution_show_in_the_logprob_of_their_row_alone(temperature: float, bad: float) -> None:
    logits = torch.zeros(3, 300)
    logits[0, 7], logits[1] = bad, -torch.inf
    verified = drawn(logits, [SamplingParams(temperature=temperature)] * 3, 0.5)
    assert [isnan(each.logprobs[0]) for each in verified] == [True, True, False]
    assert verified[2].logprobs[0] == pytest.approx(-log(300))


def test_requests_without_adjustments_cost_no_copy() -> None:
    logits = torch.randn(3, 12)
    row = VerifyRow(NO_DRAFT, SamplingParams(min_new_tokens=2), Uniforms(0, 9), (1, 2, 3), 1)
    assert adjusted(logits, [row] * 3, frozenset({1})) is logits


def test_rows_are_judged_the_same_in_a_pass_of_many_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    drafts = [Draft.chain([1] * (index % 4)) for index in range(NODES_PER_CHUNK)]
    kinds = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_p=0.7, presence_penalty=0.5)]
    rows = [VerifyRow(draft, kinds[i % 3], Uniforms(i, 9), (0, 1, 2), 1) for i, draft in enumerate(drafts)]
    logits = torch.randn(sum(row.num_nodes for row in rows), 50, generator=generator)
    together = RuleVerifier(target_only)(logits, rows)
    first = 0
    for row, verified in zip(rows, together, strict=True):
        assert RuleVerifier(target_only)(logits[first : first + row.num_nodes], [row]) == [verified]
        first += row.num_nodes
