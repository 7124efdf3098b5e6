"""Whatever happened before, a drafter proposes what a fresh one would over the same tokens and features.

The slow draft has no cache and no batch and takes the target's features from transformers; so these tests hold the
networks' arithmetic, the draft's KV after partial acceptance, shared prompts, chunks and preemption all at once.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from rollout.embedded.drafters.tree import tree_reference
from rollout.embedded.drafting import DraftContext
from rollout.embedded.verification.race import exponentials
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import BLOCK_FORMATS, FORMATS, FreshDraft, TinyDraft, make_format
from tests.support.embedded_harness import VOCAB, Samples, continuation, greedy, make_core, random_prompt, run
from tests.support.recording_drafter import Proposal, RecordingDrafter

PROMPTS = [random_prompt(length, seed=length) for length in (1, 2, 9, 30, 5)]
SEEDS = [(0,), (1, 2, 3), (4, 5), (6,), (7, 8, 9)]


@pytest.fixture(params=[*FORMATS, *BLOCK_FORMATS], scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("format"), request.param)


@pytest.fixture(scope="module")
def fresh(tiny: TinyDraft) -> FreshDraft:
    return FreshDraft(tiny)


def requests(params: SamplingParams) -> list[GroupRequest]:
    return [GroupRequest(str(i), PROMPTS[i], seeds, params) for i, seeds in enumerate(SEEDS)]


def drafted(config, params: SamplingParams, oracle: Samples | None = None):  # type: ignore[no-untyped-def]
    """(what the drafter proposed, samples) of one run; ``oracle``: the core verifies its tokens, some made wrong."""
    core = make_core(config)
    script = None if oracle is None else often_right(oracle)
    recorder = RecordingDrafter(core.drafter, script)
    core = make_core(config, drafter=recorder)
    return recorder.proposals, run(core, requests(params))


def often_right(oracle: Samples) -> Callable[[DraftContext], Sequence[int]]:
    """What the target will say, with every fourth token changed: drafts of which any number stands."""
    rest = continuation(oracle, PROMPTS)

    def script(context: DraftContext) -> Sequence[int]:
        first = len(context.token_ids)
        return [(token + 1) % VOCAB if (first + i) % 4 == 0 else token for i, token in enumerate(rest(context))]

    return script


def assert_sampled_from_fresh_distribution(proposals: Sequence[Proposal], fresh: FreshDraft) -> None:
    assert len(proposals) > 20
    for each in proposals:
        assert each.draft.q_draft is not None
        for node in range(len(each.draft.token_ids)):
            log_distribution = fresh.log_distribution(each.token_ids, each.draft.token_ids[:node])
            distribution = (log_distribution / each.context.params.temperature).softmax(-1)
            assert (each.draft.q_draft[node] - distribution).abs().max() < 1e-3


def test_sampled_chains_come_from_the_fresh_distribution(tiny: TinyDraft, fresh: FreshDraft) -> None:
    config = tiny.config(num_steps=3, use_rejection_sampling=True, engine={"max_running_requests": 5})
    proposals, samples = drafted(config, SamplingParams(max_new_tokens=12, temperature=0.7))
    assert_sampled_from_fresh_distribution(proposals, fresh)
    accepted = {sample.spec.num_correct for sample in samples.values()}
    assert len(accepted) > 1, "some drafts stand and some fall, or this proves little"


def test_raced_chains_win_the_races_of_the_fresh_distribution(tiny: TinyDraft, fresh: FreshDraft) -> None:
    config = tiny.config(num_steps=3, use_gumbel_coupling=True, engine={"max_running_requests": 5})
    proposals, samples = drafted(config, SamplingParams(max_new_tokens=12, temperature=0.7))
    assert len(proposals) > 20
    for each in proposals:
        assert each.draft.q_draft is None
        assert each.context.noise is not None
        for node, token in enumerate(each.draft.token_ids):
            distribution = (fresh.log_distribution(each.token_ids, each.draft.token_ids[:node]) / 0.7).softmax(-1)
            key = each.context.noise.key(len(each.token_ids) - each.context.num_prompt_tokens + node)
            arrivals = torch.from_numpy(exponentials(np.uint64(key), np.arange(VOCAB))) / distribution
            assert arrivals[token] <= arrivals.min() * (1 + 1e-3)  # the first, or within rounding of it
    assert len({sample.spec.num_correct for sample in samples.values()}) > 1


def test_chains_after_any_acceptance_are_a_fresh_drafters(tiny: TinyDraft, fresh: FreshDraft) -> None:
    oracle = run(make_core(tiny.plain), requests(greedy(20)))
    proposals, samples = drafted(tiny.config(num_steps=3), greedy(20), oracle)
    assert {sample.token_ids for sample in samples.values()} == {sample.token_ids for sample in oracle.values()}
    lengths = {count for sample in samples.values() for count, rounds in enumerate(sample.spec.histogram) if rounds}
    assert lengths >= {0, 1, 2, 3}
    assert len(proposals) > 20
    for each in proposals:
        assert each.draft.q_draft is None
        for node, token in enumerate(each.draft.token_ids):
            distribution = fresh.log_distribution(each.token_ids, each.draft.token_ids[:node])
            assert distribution[token] >= distribution.max() - 1e-4  # the argmax, or within rounding of it


def test_trees_after_any_acceptance_are_the_papers(tiny: TinyDraft, fresh: FreshDraft) -> None:
    if fresh.draft.spec.block_size:
        pytest.skip("a block is a chain")
    oracle = run(make_core(tiny.plain), requests(greedy(12)))
    proposals, _ = drafted(tiny.config(num_steps=3, topk=2, num_draft_tokens=6), greedy(12), oracle)
    assert len(proposals) > 20
    for each in proposals:

        def distribution(path: tuple[int, ...], token_ids: tuple[int, ...] = each.token_ids) -> list[float]:
            return fresh.log_distribution(token_ids, path).exp().tolist()

        depth = min(3, each.context.max_depth)
        _, expected = tree_reference(distribution, depth, 2, 6)
        assert (each.draft.token_ids, each.draft.parents) == (expected.token_ids, expected.parents)


def test_chunks_and_preemption_leave_no_trace(
    tiny: TinyDraft, fresh: FreshDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 7)
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_BESIDE_DECODING", 7)
    config = tiny.config(num_steps=2, use_rejection_sampling=True, engine={"max_total_tokens": 330})
    proposals, samples = drafted(config, SamplingParams(max_new_tokens=80, temperature=1.0))
    # The youngest give way: samples of a shared prompt, whose generated tokens are then prefilled on their own.
    assert sum(sample.num_preemptions for (group, _), sample in samples.items() if len(SEEDS[int(group)]) > 1) > 1
    assert_sampled_from_fresh_distribution(proposals[::5], fresh)
