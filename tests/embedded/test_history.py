"""HISTORY drafts from finished samples, the reply and the prompt: by its index as by its slow reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.embedded.assemble import Assembly
from rollout.embedded.calibrate import calibrate
from rollout.embedded.drafters.calibration import Calibration, bucket_of
from rollout.embedded.drafters.history import HistoryDrafter
from rollout.embedded.drafters.history_reference import ReferenceHistory, longest_match
from rollout.embedded.drafters.occurrences import LONGEST_MATCH, Continuation, Occurrences
from rollout.embedded.drafting import LearningDrafter
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.preflight.requests import check_request
from slime_spec.types import EarlierReply, GroupRequest, SamplingParams
from tests.support.embedded_harness import Samples, draft_context, engine_config, greedy, make_core, random_prompt, run

CONFIG = SpeculativeConfig(algorithm="HISTORY")
PROMPT = [50, 51, 52]
tokens = st.integers(0, 3)
texts = st.lists(tokens, min_size=1, max_size=40)


@given(
    known=st.lists(st.tuples(texts, st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 8)), max_size=5),
    growing=st.lists(texts, min_size=1, max_size=4),
    tail=st.lists(tokens, min_size=1, max_size=LONGEST_MATCH),
)
def test_an_index_that_grows_finds_the_places_that_a_scan_finds(
    known: list[tuple[list[int], float, int]], growing: list[list[int]], tail: list[int]
) -> None:
    index, written = Occurrences(), list[int]()
    for text, weight, num_context in known:
        index.add(text, weight, num_context)
    for piece in growing:
        index.extend(piece)
        written = [*written, *piece]
        found, expected = index.longest(tail), longest_match([*known, (written, 1.0, 0)], tail)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.length == expected[0]
            following = [list(text[end:]) for text, end, _ in expected[1]]
            drafted = [each.token_id for each in index.continuations(found.places, 6)]
            assert len(found.places) == len(following)
            assert drafted in [rest[: len(drafted)] for rest in following]


@dataclass
class Driven:
    """One sample, driven as the core drives it, by the drafter and by the reference."""

    drafter: HistoryDrafter
    reference: ReferenceHistory
    key: int
    output: list[int]
    num_drafts: int
    num_generated: int = 1

    def round(self) -> None:
        reply = self.output[: self.num_generated]
        limit = min(self.num_drafts, len(self.output) - self.num_generated - 1)
        accepted = 0
        if limit > 0:
            prompt = list(self.reference.prompt)
            context = draft_context(self.key, prompt + reply, len(prompt), limit)
            draft = self.drafter.propose([context._replace(earlier=self.reference.came_with_request)])[0]
            chain, expected = self.reference.propose(reply, limit)
            assert (list(draft.token_ids), draft.q_draft) == (chain, None)
            assert (draft.expected or ()) == pytest.approx(expected)
            rest = self.output[self.num_generated :]
            accepted = next((i for i, token in enumerate(chain) if token != rest[i]), len(chain))
        self.num_generated += accepted + 1


@given(
    prompt=st.lists(tokens, min_size=1, max_size=12),
    outputs=st.lists(st.lists(tokens, min_size=3, max_size=40), min_size=1, max_size=5),  # each is drafted for once
    num_drafts=st.integers(1, 8),
    earlier=st.lists(
        st.builds(EarlierReply, texts.map(tuple), st.integers(0, 60), st.sampled_from([None, 5])), max_size=4
    ),
)
def test_every_draft_and_what_is_expected_of_it_are_the_references(
    prompt: list[int], outputs: list[list[int]], num_drafts: int, earlier: list[EarlierReply]
) -> None:
    drafter, reference = HistoryDrafter(CONFIG), ReferenceHistory(prompt, earlier)
    for key, output in enumerate(outputs):
        driven = Driven(drafter, reference, key, output, num_drafts)
        while driven.num_generated < len(output):
            driven.round()
        drafter.finished(0, prompt + output, len(prompt))
        drafter.forget(key)
        reference.finished(output)
        reference.last = ((), ())


def drafted(drafter: HistoryDrafter, reply: Sequence[int], limit: int = 4, key: int = 99) -> tuple[int, ...]:
    return drafter.propose([draft_context(key, [*PROMPT, *reply], len(PROMPT), limit)])[0].token_ids


def test_what_most_finished_samples_say_is_drafted_and_of_equals_what_the_last_one_says() -> None:
    drafter = HistoryDrafter(CONFIG)
    for reply in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 4, 5]):
        drafter.finished(0, [*PROMPT, *reply], len(PROMPT))
    assert drafted(drafter, [1, 2]) == (3, 4, 6)
    assert drafted(drafter, [1, 2, 7]) == (4, 5)
    assert drafted(drafter, [1, 2, 7, 4, 5]) == ()  # nothing has gone on from there


def test_a_finished_sample_stands_before_the_prompt_unless_that_matches_by_far_more() -> None:
    prompt = [1, 2, 3, 4, 5, 9]
    for begins, expected in ([3, 4], 7), ([2, 3, 4], 7), ([1, 2, 3, 4], 5):
        drafter = HistoryDrafter(CONFIG)
        drafter.finished(0, [*prompt, 3, 4, 7], len(prompt))
        draft = drafter.propose([draft_context(1, [*prompt, *begins], len(prompt), 1)])[0]
        assert draft.token_ids == (expected,), begins


def test_earlier_replies_stand_behind_siblings_and_the_older_weights_count_less() -> None:
    def first_draft(*earlier: EarlierReply) -> tuple[int, ...]:
        context = draft_context(1, [*PROMPT, 1, 2], len(PROMPT), 1)._replace(earlier=earlier)
        return HistoryDrafter(CONFIG).propose([context])[0].token_ids

    new, newer = EarlierReply((1, 2, 7), 40), EarlierReply((1, 2, 9), 41)
    old = EarlierReply((1, 2, 8), 8)  # two half-lives before
    assert first_draft(old, old, new) == (7,)
    assert first_draft(*[old] * 5, new) == (8,)
    assert first_draft(new, newer) == (9,)
    assert first_draft(replace(new, sample_index=0), newer, newer) == (7,)


def test_of_texts_beyond_the_bound_no_more_are_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.embedded.drafters.history.MAX_INDEXED_TOKENS", 14)
    drafter = HistoryDrafter(CONFIG)
    for reply in ([1, 2, 3], [1, 2, 4], [1, 2, 5]):  # six tokens each, with the prompt's end, and one that ends them
        drafter.finished(0, [*PROMPT, *reply], len(PROMPT))
    assert drafted(drafter, [1, 2]) == (4,)


def test_a_groups_replies_are_no_other_groups_and_end_with_the_group() -> None:
    drafter = HistoryDrafter(CONFIG)
    drafter.finished(0, [*PROMPT, 1, 2, 3], len(PROMPT))
    other = draft_context(7, [*PROMPT, 1, 2], len(PROMPT), 2)._replace(prompt_key=1)
    assert drafter.propose([other])[0].token_ids == ()
    assert drafted(drafter, [1, 2]) == (3,)
    drafter.ended(0)
    drafter.forget(99)
    assert drafted(drafter, [1, 2]) == ()
    assert isinstance(drafter, LearningDrafter)


def test_what_is_expected_begins_with_the_places_and_comes_to_the_rate_of_drafts_alike() -> None:
    calibration, bucket = Calibration(4), bucket_of(0, 5, Continuation(3, 1.0, 1.0))
    assert calibration.expected(bucket, Continuation(3, 1.0, 1.0)) == pytest.approx(1 / 2)
    assert calibration.expected(bucket, Continuation(3, 7.0, 7.0)) == pytest.approx(7 / 8)
    for i in range(4000):
        calibration.note([bucket, bucket], num_right=int(i % 4 != 0))  # 3 of 7 that are judged
    assert calibration.expected(bucket, Continuation(3, 1.0, 1.0)) == pytest.approx(3 / 7, abs=0.02)
    contested = Continuation(3, 1.0, 2.0)
    others = {bucket_of(1, 5, contested), bucket_of(0, 4, contested), bucket_of(0, 5, contested)}
    assert len(others - {bucket}) == 3
    for other in others:
        assert calibration.expected(other, contested) == pytest.approx(1 / 3)


def test_a_draft_is_judged_by_what_followed_as_far_as_that_goes_whoever_verified_it() -> None:
    """The caller may have spent no row on it, or another drafter's draft may have been accepted."""
    expected = {}
    for followed in ([3], [3, 4], [3, 5], [4]):
        drafter = HistoryDrafter(CONFIG)
        drafter.finished(0, [*PROMPT, 1, 2, 3, 4], len(PROMPT))
        assert drafted(drafter, [1, 2]) == (3, 4)
        drafted(drafter, [1, 2, *followed])
        fresh = draft_context(98, [*PROMPT, 1, 2], len(PROMPT), 2)
        expected[tuple(followed)] = drafter.propose([fresh])[0].expected
    right, wrong = pytest.approx((1 + 4 / 2) / 5), pytest.approx((0 + 4 / 2) / 5)
    assert expected == {(3,): (right, 0.5), (3, 4): (right, right), (3, 5): (right, wrong), (4,): (wrong, 0.5)}


NUM_SAMPLES = 6
PROMPTS = [random_prompt(5 + i, seed=i) for i in range(5)]
PARAMS = {
    "greedy": greedy(40),
    "sampled": SamplingParams(max_new_tokens=40),
    "sampled at a low temperature": SamplingParams(max_new_tokens=40, temperature=0.1),
}


def requests(params: SamplingParams) -> list[GroupRequest]:
    """Groups of samples of which few run at once, so that the first ones finish before the last ones start."""
    return [
        GroupRequest(str(i), prompt, tuple(range(100 * i, 100 * i + NUM_SAMPLES)), params)
        for i, prompt in enumerate(PROMPTS)
    ]


def replies(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize(("max_running", "max_total_tokens"), [(4, 100_000), (1, 100_000), (30, 400)])
def test_no_token_of_any_sample_changes(
    tiny_llama: Path, params: SamplingParams, max_running: int, max_total_tokens: int
) -> None:
    """With room for 400 tokens, samples are preempted and idle prompts released while their groups go on."""
    settings = {"max_running_requests": max_running, "max_total_tokens": max_total_tokens}
    plain = run(make_core(engine_config(tiny_llama, **settings)), requests(params))
    core = make_core(engine_config(tiny_llama, "HISTORY", num_draft_tokens=8, **settings))
    samples = run(core, requests(params))
    assert replies(samples) == replies(plain)
    assert (core.num_preemptions > 0) == (max_total_tokens == 400)
    drafter = core.drafter
    assert isinstance(drafter, HistoryDrafter)
    assert not drafter._prompts
    assert not drafter._replies


def test_samples_after_the_first_of_a_greedy_group_are_drafted_whole(tiny_llama: Path) -> None:
    """The second of two equal samples takes a round for every eight tokens."""
    core = make_core(engine_config(tiny_llama, "HISTORY", num_draft_tokens=8, max_running_requests=1))
    request = replace(requests(greedy(41))[0], seeds=(1, 2))
    samples = run(core, [request])
    assert samples["0", 0].token_ids == samples["0", 1].token_ids
    assert samples["0", 1].spec.num_rounds <= 6


@pytest.mark.parametrize("is_sibling", [False, True])
def test_replies_that_come_with_a_request_are_drafted_from_and_change_no_token(
    tiny_llama: Path, is_sibling: bool
) -> None:
    """The samples' own replies come as if an earlier step had given them: a round drafts seven tokens."""
    plain = run(make_core(engine_config(tiny_llama)), requests(PARAMS["sampled"]))
    known = [
        replace(
            request,
            earlier=tuple(
                EarlierReply(sample.token_ids, 3, index if is_sibling else None)
                for (group, index), sample in plain.items()
                if group == request.group_id
            ),
        )
        for request in requests(PARAMS["sampled"])
    ]
    samples = run(make_core(engine_config(tiny_llama, "HISTORY", num_draft_tokens=8)), known)
    assert replies(samples) == replies(plain)
    num_rounds = sum(sample.spec.num_rounds for sample in samples.values())
    assert num_rounds < 0.5 * sum(len(sample.token_ids) for sample in samples.values())


def test_replies_of_another_vocabulary_are_refused(tiny_llama: Path) -> None:
    core = engine_config(tiny_llama, "HISTORY")
    request = replace(requests(PARAMS["greedy"])[0], earlier=(EarlierReply((5, 131), 0),))
    with pytest.raises(ConfigError) as caught:
        check_request(request, Assembly(core).limits)
    assert (caught.value.setting, caught.value.value) == ("request.earlier", 131)


class Watching(HistoryDrafter):
    """Counts what it is shown."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.shown: list[tuple[int, ...]] = []
        self.num_ended = 0

    def finished(self, prompt_key: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self.shown.append(tuple(token_ids))
        super().finished(prompt_key, token_ids, num_prompt_tokens)

    def ended(self, prompt_key: int) -> None:
        self.num_ended += 1
        super().ended(prompt_key)


def test_every_finished_sample_but_a_groups_last_is_shown_whole(tiny_llama: Path) -> None:
    drafter = Watching()
    core = make_core(engine_config(tiny_llama, max_running_requests=30, max_total_tokens=400), drafter=drafter)
    samples = run(core, requests(PARAMS["sampled"]))
    assert core.num_preemptions > 0
    whole = {PROMPTS[int(group)] + sample.token_ids for (group, _), sample in samples.items()}
    assert set(drafter.shown) <= whole
    assert len(drafter.shown) == len(set(drafter.shown)) == len(PROMPTS) * (NUM_SAMPLES - 1)
    assert drafter.num_ended == len(PROMPTS)


def test_an_aborted_sample_has_not_finished_and_its_group_ends(tiny_llama: Path) -> None:
    drafter = Watching()
    core = make_core(engine_config(tiny_llama, max_running_requests=3), drafter=drafter)
    group = core.add(requests(PARAMS["sampled"])[0], lambda sample: None)
    for _ in range(5):
        core.step()
    core.abort(group)
    assert (drafter.shown, drafter.num_ended, drafter._prompts, drafter._replies) == ([], 1, {}, {})


def test_an_automatic_depth_counts_only_what_was_verified(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, "HISTORY", max_running_requests=4)
    config = replace(config, speculative=replace(config.speculative, num_draft_tokens=None))
    core = make_core(config)
    calibrate(core)
    params = SamplingParams(max_new_tokens=48, temperature=0.3)
    requests = [GroupRequest(str(i), random_prompt(6, i) * 3, (0, 1, 2, 3, 4, 5), params) for i in range(3)]
    for sample in run(core, requests).values():
        spec = sample.spec
        assert spec.num_proposed == spec.num_drafted, "a step for which nothing was found proposes nothing"
        assert spec.num_empty_rounds == 0
        assert len(sample.token_ids) <= 1 + spec.num_off_steps + spec.num_rounds + spec.num_correct
        assert sum(spec.num_tried[:1]) == spec.num_rounds
