"""The sampling law and the draw from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.embedded.sampler import inverse_cdf, sample, sampling_law
from slime_spec.types import SamplingParams


def law_reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """One row [vocab]: temperature, top-k, top-p, min-p in turn, each renormalised, by full sorts."""
    p = (logits.double() / params.temperature).softmax(-1)
    if params.top_k > 0:
        p = torch.where(p >= p.sort(descending=True).values[min(params.top_k, len(p)) - 1], p, 0.0)
        p = p / p.sum()
    if params.top_p < 1.0:
        ranked = p.sort(descending=True).values
        mass, kept = 0.0, 0
        while mass < params.top_p and kept < len(p) and ranked[kept] > 0:
            mass += float(ranked[kept])
            kept += 1
        p = torch.where(p >= ranked[kept - 1], p, 0.0)
        p = p / p.sum()
    p = torch.where(p >= params.min_p * p.max(), p, 0.0)
    return p / p.sum()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 1, 2, 5, 40, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.83, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 10**6), vocab=st.sampled_from([9, 300, 2100]))
def test_the_law_of_a_mixed_batch_equals_the_slow_one_row_by_row(
    rows: list[SamplingParams], seed: int, vocab: int
) -> None:
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    _, p_target = sampling_law(logits, rows)
    for row, params in enumerate(rows):
        law = p_target[row].double() / p_target[row].sum()
        assert (law - law_reference(logits[row], params)).abs().max() < 1e-5


def test_a_nucleus_wider_than_the_first_candidates_is_found_whole() -> None:
    logits = torch.randn(3, 5000) * 0.01
    params = [SamplingParams(top_p=p) for p in (0.9, 0.1, 1.0)]
    _, p_target = sampling_law(logits, params)
    for row, each in enumerate(params):
        assert int((p_target[row] > 0).sum()) == int((law_reference(logits[row], each) > 0).sum())


def test_tied_tokens_are_kept_together_whatever_their_order() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    _, p_target = sampling_law(logits, [SamplingParams(top_k=2)])
    assert (p_target > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("vocab", [1, 7, 256, 257, 1024, 3001])
def test_the_two_level_draw_equals_a_cumulative_sum(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(400, vocab, generator=generator)
    weights[:, ::3] = 0.0
    weights[:, 0] += 0.01
    coins = torch.rand(400, generator=generator, dtype=torch.float64)
    cumulative = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, coins.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    assert torch.equal(inverse_cdf(weights, coins), expected)


@pytest.mark.parametrize("coin", [0.0, 1.0 - 2.0**-53])
def test_a_token_of_weight_zero_is_never_drawn_even_at_the_ends(coin: float) -> None:
    weights = torch.zeros(1, 700)
    weights[0, 300] = weights[0, 301] = 0.1
    token = int(inverse_cdf(weights, torch.tensor([coin], dtype=torch.float64)))
    assert token == (300 if coin == 0.0 else 301)


def test_greedy_rows_take_the_argmax_and_report_raw_logprobs() -> None:
    logits = torch.randn(4, 300)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.5)] * 2
    drawn = sample(logits, params, [0.999] * 4)
    assert [drawn.token_ids[0], drawn.token_ids[2]] == logits[[0, 2]].argmax(-1).tolist()
    for row, temperature in enumerate((1.0, 0.5, 1.0, 0.5)):
        expected = (logits[row] / temperature).log_softmax(-1)[drawn.token_ids[row]]
        assert drawn.logprobs[row] == pytest.approx(float(expected), abs=1e-5)


def test_logprobs_are_not_renormalised_for_the_filters() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    drawn = sample(logits, [SamplingParams(top_k=1)], [0.5])
    assert drawn.token_ids == [0]
    assert drawn.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, 0]), abs=1e-6)
