"""Invariants of packing, over arbitrary samples."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from slime_spec.types import TrainSample
from trainer_bridge.packing import Segment, form_segments, plan_microbatches


@st.composite
def sample_lists(draw: st.DrawFn) -> list[TrainSample]:
    prompts = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple), min_size=1, max_size=5))
    samples = []
    for prompt in draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=24)):
        response = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=12)))
        samples.append(TrainSample(prompt + response, len(prompt), (0.0,) * len(response), 1.0))
    return samples


plans = given(samples=sample_lists(), max_tokens=st.integers(1, 60), num_ranks=st.integers(1, 4), share=st.booleans())


@plans
def test_every_sample_with_a_response_is_packed_exactly_once(
    samples: list[TrainSample], max_tokens: int, num_ranks: int, share: bool
) -> None:
    planned = plan_microbatches(samples, max_tokens, num_ranks, share)
    packed = Counter(i for rank in planned for plan in rank for segment in plan for i in segment.sample_indices)
    wanted = Counter(i for i, sample in enumerate(samples) if len(sample.token_ids) > sample.prompt_len)
    assert packed == wanted


@plans
def test_no_microbatch_is_longer_than_allowed_unless_one_sample_alone_is(
    samples: list[TrainSample], max_tokens: int, num_ranks: int, share: bool
) -> None:
    for rank in plan_microbatches(samples, max_tokens, num_ranks, share):
        for plan in rank:
            alone = len(plan) == 1 and len(plan[0].sample_indices) == 1
            assert alone or sum(segment.num_tokens for segment in plan) <= max_tokens


@plans
def test_every_rank_has_the_same_number_of_microbatches(
    samples: list[TrainSample], max_tokens: int, num_ranks: int, share: bool
) -> None:
    assert len({len(rank) for rank in plan_microbatches(samples, max_tokens, num_ranks, share)}) == 1


@plans
def test_a_segment_holds_only_samples_of_its_prompt(
    samples: list[TrainSample], max_tokens: int, num_ranks: int, share: bool
) -> None:
    for segment in form_segments(samples, max_tokens, share):
        prompts = {samples[i].token_ids[: samples[i].prompt_len] for i in segment.sample_indices}
        assert {len(prompt) for prompt in prompts} == {segment.prompt_len}
        assert len(prompts) == 1
        lens = tuple(len(samples[i].token_ids) - segment.prompt_len for i in segment.sample_indices)
        assert segment.response_lens == lens
        assert share or len(segment.sample_indices) == 1


@plans
@settings(max_examples=50)
def test_sharing_prompts_never_costs_more_rows(
    samples: list[TrainSample], max_tokens: int, num_ranks: int, share: bool
) -> None:
    def rows(share_prompts: bool) -> int:
        return sum(segment.num_tokens for segment in form_segments(samples, max_tokens, share_prompts))

    assert rows(True) <= rows(False)


def test_a_group_shares_its_prompt_and_costs_only_its_responses() -> None:
    prompt = tuple(range(35))
    samples = [TrainSample((*prompt, *range(15)), 35, (0.0,) * 15, 1.0) for _ in range(8)]
    (segment,) = form_segments(samples, max_tokens=1024)
    assert segment == Segment(35, tuple(range(8)), (15,) * 8)
    assert segment.num_tokens == 35 + 8 * 14


def test_ranks_get_like_amounts_of_work() -> None:
    samples = [TrainSample((i, *range(20 + i)), 1, (0.0,) * (20 + i), 1.0) for i in range(16)]
    first, second = plan_microbatches(samples, max_tokens=10_000, num_ranks=2)
    load = [sum(segment.num_tokens for plan in rank for segment in plan) for rank in (first, second)]
    assert max(load) <= 1.1 * min(load)
