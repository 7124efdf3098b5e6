"""HISTORY before a network: each drafts where it promises more, and the network's state stays that of one alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded import speculation
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.fronted import FrontedDrafter
from rollout.embedded.drafters.history import HistoryDrafter
from rollout.embedded.drafting import DraftContext, Drafter, LearningDrafter, Outcome
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.round_costs import PassCurve, RoundCosts
from slime_spec.types import EarlierReply, GroupRequest, SamplingParams
from tests.support.draft_formats import BLOCK_FORMATS, FORMATS, TinyDraft, make_format
from tests.support.embedded_harness import (
    Samples,
    ScriptedDrafter,
    continuation,
    draft_context,
    make_core,
    random_prompt,
    run,
)
from tests.support.recording_drafter import RecordingDrafter
from tests.support.tiny_models import make_tiny_checkpoint

PROMPTS = [random_prompt(2 + 5 * i, seed=i) for i in range(5)]
NUM_TOKENS = 40


def requests(temperature: float = 0.8) -> list[GroupRequest]:
    params = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=temperature)
    return [GroupRequest(str(i), prompt, tuple(range(1 + i % 3)), params) for i, prompt in enumerate(PROMPTS)]


def tokens(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


class Front(HistoryDrafter):
    """Says in a share of the rounds what will follow, sure of it."""

    def __init__(self, rest: Callable[[DraftContext], Sequence[int]], share: float = 0.5) -> None:
        super().__init__(SpeculativeConfig())
        self._rest, self._share, self._rng = rest, share, random.Random(4)
        self.num_drafts = 0

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [self._draft(context) if self._rng.random() < self._share else NO_DRAFT for context in contexts]

    def _draft(self, context: DraftContext) -> Draft:
        chain = self._rest(context)[: min(context.max_depth, context.max_draft_tokens)]
        self.num_drafts += 1
        return Draft.chain(chain, expected=(1.0,) * len(chain))


def put_front(config: Config, samples: Samples) -> tuple[Samples, Front, RecordingDrafter]:
    """Generate with a front of half of the rounds; (samples, front, the network that was watched)."""
    core = make_core(config)
    front, network = Front(continuation(samples, PROMPTS)), RecordingDrafter(core.drafter)
    core.speculation.drafter = FrontedDrafter(front, network)  # type: ignore[arg-type]
    return run(core, requests()), front, network


@pytest.mark.parametrize("name", [*FORMATS, *BLOCK_FORMATS])
def test_a_networks_drafts_are_those_of_one_that_always_drafted(tmp_path: Path, name: str) -> None:
    tiny = make_format(tmp_path, name)
    plain = run(make_core(tiny.plain), requests())
    core = make_core(tiny.config(1, 1, 2))  # a draft of one token after every token
    always = RecordingDrafter(core.drafter, lambda context: ())
    core.speculation.drafter = always  # type: ignore[assignment]
    assert tokens(run(core, requests())) == tokens(plain)
    first_of = {each.token_ids: each.draft.token_ids[:1] for each in always.proposals}

    samples, front, network = put_front(tiny.config(3, 1, 4), plain)
    assert tokens(samples) == tokens(plain)
    assert front.num_drafts > 50
    assert len(network.proposals) > 50
    for each in network.proposals:
        assert each.draft.token_ids[:1] == first_of[each.token_ids]


def test_a_whole_model_that_is_the_target_is_always_right_beside_a_front(tmp_path: Path) -> None:
    """A key or value that it took from a draft of the front's would show in what it drafts next."""
    target = make_tiny_checkpoint(tmp_path / "target")
    settings = {"draft_model_path": str(target), "num_steps": 3, "eagle_topk": 1}
    config = Config(
        model=ModelConfig(hf_checkpoint=str(target)),
        speculative=SpeculativeConfig(algorithm="STANDALONE", **settings),  # type: ignore[arg-type]
    )
    core = make_core(replace(config, speculative=SpeculativeConfig()))
    plain = run(core, [replace(each, params=replace(each.params, temperature=0.0)) for each in requests()])
    core = make_core(config)
    front = Front(continuation(plain, PROMPTS))
    core.speculation.drafter = FrontedDrafter(front, core.drafter)
    samples = run(core, requests(0.0))
    assert tokens(samples) == tokens(plain)
    for sample in samples.values():
        assert sample.spec.num_correct == sample.spec.num_drafted > 20


class Eager(Controller):
    """Has every sequence draft in every round; keeps how far the network was behind."""

    def __init__(self, max_depth: int) -> None:
        super().__init__(RoundCosts(PassCurve(((1, 1.0),))), max_depth)
        self.backlogs: list[int] = []

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        return None

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        self.backlogs += [row.backlog for row in rows]
        return RoundPlan(tuple(row.max_depth for row in rows))


@pytest.mark.parametrize("is_bounded", [False, True])
def test_what_a_network_has_not_read_behind_a_front_is_counted_and_read_in_time(
    eagle3: TinyDraft, monkeypatch: pytest.MonkeyPatch, is_bounded: bool
) -> None:
    """Sequences that are drafted out of texts for long leave their features waiting."""
    plain = run(make_core(eagle3.plain), requests())
    core = make_core(eagle3.config(3, 1, 4))
    front = Front(continuation(plain, PROMPTS), share=0.95)
    core.speculation.drafter = FrontedDrafter(front, core.drafter)
    core.speculation.controller = controller = Eager(3)
    if is_bounded:
        monkeypatch.setattr(speculation, "MOST_WAITING_BYTES", 12 * core.target.feature_bytes)
    assert tokens(run(core, requests())) == tokens(plain)
    # Before its first draft a network also reads the prompt: the longest share of one is 16 tokens.
    assert (max(controller.backlogs) > 16 + 20) != is_bounded, max(controller.backlogs)


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("eagle3"), "eagle3")


@pytest.mark.parametrize(
    ("shape", "rule", "temperature"),
    [
        ((3, 1, 4), {}, 0.8),
        ((3, 4, 8), {}, 0.8),
        ((3, 1, 4), {"use_rejection_sampling": True}, 0.0),
        ((3, 1, 4), {"use_block_verification": True}, 0.0),
    ],
    ids=str,
)
def test_no_token_changes_and_finished_samples_are_drafted_from(
    eagle3: TinyDraft, shape: tuple[int, int, int], rule: dict[str, bool], temperature: float
) -> None:
    plain = run(make_core(eagle3.plain), requests(temperature))
    known = [
        replace(
            request,
            earlier=tuple(EarlierReply(plain[request.group_id, i].token_ids, 0) for i in range(len(request.seeds))),
        )
        for request in requests(temperature)
    ]
    alone = run(make_core(eagle3.config(*shape, **rule)), known)
    core = make_core(eagle3.config(*shape, **rule, history=True))
    assert isinstance(core.drafter, FrontedDrafter)
    assert isinstance(core.drafter, LearningDrafter)
    behind = run(core, known)
    assert tokens(behind) == tokens(plain) == tokens(alone)
    rounds = [sum(sample.spec.num_rounds for sample in samples.values()) for samples in (behind, alone)]
    assert rounds[0] < 0.7 * rounds[1]


def test_drafts_are_taken_from_whoever_promises_more() -> None:
    """A text that went on once is believed by half; a network whose drafts bring four tokens is asked instead."""
    network = ScriptedDrafter(lambda context: (7, 7, 7, 7))
    drafter = FrontedDrafter(HistoryDrafter(SpeculativeConfig()), network)
    drafter.finished(0, [50, 51, 1, 2, 3], 2)

    def proposed(*reply: int) -> tuple[int, ...]:
        return drafter.propose([draft_context(1, [50, 51, *reply], 2, 4)])[0].read().token_ids

    assert proposed(1, 2) == (3,)
    assert proposed(1, 9) == (7, 7, 7, 7)
    for _ in range(20):
        drafter.propose([draft_context(2, [50, 51, 8], 2, 4)])
        drafter.observe([Outcome(2, (0, 1, 2, 3)), Outcome(3, ())])
    assert proposed(1, 2) == (7, 7, 7, 7)


def test_a_text_is_compared_with_as_many_tokens_as_are_verified_of_the_networks() -> None:
    """Places that agree no more than by half promise more than one token in all, and half of the first."""
    drafter = FrontedDrafter(HistoryDrafter(SpeculativeConfig()), ScriptedDrafter(lambda context: (7, 7, 7, 7)))
    for rest in ([3, 4, 5, 6, 8], [9, 9, 9, 9, 9]):
        drafter.finished(0, [50, 51, 1, 2, *rest], 2)
    for _ in range(200):
        drafter.propose([draft_context(2, [50, 51, 8], 2, 4)])
        drafter.observe([Outcome(2, (0,), num_verified=1)])
    context = draft_context(1, [50, 51, 1, 2], 2, 5)
    assert drafter.propose([context._replace(network_depth=0)])[0].read().token_ids[0] in (3, 9)
    assert drafter.propose([context._replace(network_depth=1)])[0].read().token_ids == (7,)


def test_a_network_hears_of_a_round_that_it_did_not_draft_as_of_a_plain_step() -> None:
    heard: list[Outcome] = []

    class Listening(ScriptedDrafter):
        def observe(self, outcomes: Sequence[Outcome]) -> None:
            heard.extend(outcomes)

    network: Drafter = Listening(lambda context: ())
    drafter = FrontedDrafter(HistoryDrafter(SpeculativeConfig()), network)
    drafter.finished(0, [50, 51, 1, 2, 3], 2)
    assert drafter.propose([draft_context(1, [50, 51, 1, 2], 2, 4)])[0].num_tokens == 1
    drafter.observe([Outcome(1, (0,)), Outcome(2, (0, 1))])
    assert [(each.request_key, each.path) for each in heard] == [(1, ()), (2, (0, 1))]


class NowAndThen(Controller):
    """Lets the network draft in some rounds, and texts in the others; rows cost nothing."""

    def __init__(self) -> None:
        super().__init__(RoundCosts(PassCurve(((1, 1.0), (64, 1.0)))), 3)
        self._of_rounds = random.Random(5)

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        if self._of_rounds.random() < 0.6:
            return RoundPlan(tuple(min(3, row.max_depth) for row in rows))
        return RoundPlan((0,) * len(rows), texts_may_pay=True)

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        return None


def test_texts_draft_alone_where_a_network_would_not_pay(tmp_path: Path) -> None:
    tiny = make_format(tmp_path, "eagle3")
    plain = run(make_core(tiny.plain), requests())
    core = make_core(tiny.config(1, 1, 2))
    always = RecordingDrafter(core.drafter, lambda context: ())
    core.speculation.drafter = always  # type: ignore[assignment]
    run(core, requests())
    first_of = {each.token_ids: each.draft.token_ids[:1] for each in always.proposals}

    config = tiny.config(3, 1, 4)
    unset = {"num_steps": None, "eagle_topk": None, "num_draft_tokens": None}
    core = make_core(replace(config, speculative=replace(config.speculative, **unset)))  # type: ignore[arg-type]
    front, network = Front(continuation(plain, PROMPTS), share=0.2), RecordingDrafter(core.drafter)
    core.speculation.drafter = FrontedDrafter(front, network)  # type: ignore[arg-type]
    core.speculation.controller = controller = NowAndThen()
    samples = run(core, requests())
    assert tokens(samples) == tokens(plain)
    assert front.num_drafts > 20
    assert len(network.proposals) > 10
    for each in network.proposals:
        assert each.draft.token_ids[:1] == first_of[each.token_ids]
    # What a text brought says nothing of the network.
    assert controller.acceptance.num_observed <= len(network.proposals)
    assert sum(sample.spec.num_correct for sample in samples.values()) > 2 * controller.acceptance.num_observed
