"""Chains say how sure their model was and stop where they are hardly likely: no rule's distribution bends by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.chain import grow_chains
from rollout.embedded.drafters.step import DraftVocab, Drawing
from rollout.embedded.drafting import DraftContext, KvRow
from rollout.embedded.plan import RowSpan
from rollout.embedded.uniforms import Noise
from slime_spec.config.speculative import UNQUANTIZED
from slime_spec.speculation.confidence import ConfidenceCalibration, StopRule
from slime_spec.speculation.round_costs import DraftTimes, PassCurve, RoundCosts
from slime_spec.types import GroupRequest, SamplingParams
from tests.embedded.test_rejection_distribution import RULES
from tests.support.draft_formats import TinyDraft, make_format
from tests.support.embedded_harness import Samples, make_core, random_prompt, run
from tests.support.emission import (
    Distribution,
    Toy,
    chain_distribution,
    joint_distribution,
    largest_error,
    sampled_drafts,
)
from tests.support.markov_toy import TARGET_LOGITS, drawn_from, markov_step

DEPTH = 3
# In the toy some first tokens are surer than this and some are not, and the same of two tokens together.
BOUNDS = (0.0, 0.3, 0.5, 0.62)


def length_by_likeliest(draft: Draft, root: int, below: float) -> int:
    """The tokens before the first at which the likeliest tokens' probabilities multiply to less than ``below``."""
    chance = 1.0
    for count, before in enumerate((root, *draft.token_ids[:-1])):
        chance *= float(drawn_from(before).max())
        if chance < below:
            return count
    return draft.num_tokens


def length_by_drawn(draft: Draft, root: int, below: float) -> int:
    """The same with the probabilities of the tokens that were drawn, which must not decide."""
    chance = 1.0
    for count, (before, token) in enumerate(zip((root, *draft.token_ids[:-1]), draft.token_ids, strict=True)):
        chance *= float(drawn_from(before)[token])
        if chance < below:
            return count
    return draft.num_tokens


def error_of(rule: str, length: Callable[[Draft, int, float], int], below: float) -> float:
    """The largest error of any three tokens' probability, over all drafts, each cut to its ``length``."""
    toy = Toy(TARGET_LOGITS, prompt=(1, 2))

    def after(done: tuple[int, ...]) -> Distribution:
        root, distribution = (*toy.prompt, *done)[-1], {}
        for draft, weight in sampled_drafts(drawn_from, root, 2):
            count = length(draft, root, below)
            assert draft.q_draft is not None
            cut = Draft.chain(draft.token_ids[:count], draft.q_draft[:count])
            step = toy.distributions(done, NO_DRAFT)[0].tolist()  # of a plain one
            judged = chain_distribution(RULES[rule], toy, done, cut) if count else {(i,): p for i, p in enumerate(step)}
            for emitted, probability in judged.items():
                distribution[emitted] = distribution.get(emitted, 0.0) + weight * probability
        return distribution

    return largest_error(joint_distribution(after, 3), toy.autoregressive(3))


@pytest.mark.parametrize("below", BOUNDS)
@pytest.mark.parametrize("rule", RULES)
def test_chains_that_stop_by_the_likeliest_token_leave_the_distribution_unchanged(rule: str, below: float) -> None:
    assert error_of(rule, length_by_likeliest, below) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_negative_control_chains_that_stop_by_the_drawn_token_are_caught(rule: str) -> None:
    assert error_of(rule, length_by_drawn, 0.5) > 2e-3


def grown(drawing: Drawing, below: float | None, temperature: float = 1.0) -> list[Draft]:
    """Chains of 60 rows, from every root; None grows them whole."""
    params = SamplingParams(temperature=temperature)
    stop = None if below is None else StopRule(below, ConfidenceCalibration())
    contexts = [
        DraftContext(
            row, 0, KvRow(row), [row % 3], 1, DEPTH, DEPTH, params, [(row + 0.5) / 60] * 8, noise=Noise(row), stop=stop
        )
        for row in range(60)
    ]
    first = markov_step(torch.tensor([row % 3 for row in range(60)]), torch.empty(0), [])
    slots = [RowSpan(row, 5, 1) for row in range(60)]
    return [each.read() for each in grow_chains(first, markov_step, slots, contexts, DEPTH, DraftVocab(3), drawing)]


@pytest.mark.parametrize("below", BOUNDS)
def test_a_sampled_chain_ends_where_its_likeliest_tokens_say(below: float) -> None:
    whole, stopped = grown(Drawing.SAMPLED, None), grown(Drawing.SAMPLED, below)
    lengths = {draft.num_tokens for draft in stopped}
    for row, (long, short) in enumerate(zip(whole, stopped, strict=True)):
        count = length_by_likeliest(long, row % 3, below)
        assert short.token_ids == long.token_ids[:count]
        assert not short.nonfinite
        assert short.is_sampled == (count > 0)
        if count:
            assert short.q_draft is not None
            assert long.q_draft is not None
            assert torch.equal(short.q_draft, long.q_draft[:count])
    assert len(lengths) > 1 or below == 0.0


@pytest.mark.parametrize("drawing", [Drawing.RACED, Drawing.LIKELIEST])
def test_a_chosen_token_is_told_with_its_probability_and_is_never_dropped_for_it(drawing: Drawing) -> None:
    whole, told = grown(drawing, None, 0.7), grown(drawing, 0.6, 0.7)
    assert [each.token_ids for each in told] == [each.token_ids for each in whole]
    assert all(each.confidence is None for each in whole)
    for row, each in enumerate(told):
        before = (row % 3, *each.token_ids[:-1])
        own = [float(drawn_from(root)[token]) for root, token in zip(before, each.token_ids, strict=True)]
        assert each.confidence == pytest.approx(own, abs=1e-6)


def test_drafting_ends_once_no_chain_is_likely() -> None:
    assert {each.num_tokens for each in grown(Drawing.LIKELIEST, 0.999)} == {1}
    assert {each.num_tokens for each in grown(Drawing.SAMPLED, 0.999)} == {0}


def requests(temperature: float) -> list[GroupRequest]:
    params = SamplingParams(max_new_tokens=30, temperature=temperature)
    prompts = [random_prompt(2 + 3 * index, seed=index) for index in range(4)]
    return [GroupRequest(str(index), prompt, (0, 1), params) for index, prompt in enumerate(prompts)]


def tokens(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("draft"), "eagle3")


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize(
    ("rule", "temperature"),
    [({}, 0.0), ({}, 0.9), ({"use_gumbel_coupling": True}, 0.9)],
    ids=["greedy", "target-only", "coupling"],
)
def test_drafts_that_are_cut_change_no_token(
    eagle3: TinyDraft, rule: dict[str, Any], temperature: float, history: bool
) -> None:
    """Rows cost nothing up to twelve and much after, so that eight sequences' drafts are cut in most rounds."""
    settings = {**rule, "draft_model_quantization": UNQUANTIZED, "history": history}
    config = eagle3.config(3, 1, 4, **settings)
    plain = replace(config, speculative=replace(config.speculative, algorithm="NONE", draft_model_path=None))
    numbers = {"num_steps": None, "eagle_topk": None, "num_draft_tokens": None}
    core = make_core(replace(config, speculative=replace(config.speculative, **numbers)))
    costs = RoundCosts(PassCurve(((1, 0.02), (12, 0.021), (112, 0.4))), draft_guess=DraftTimes(0, 1e-4, 1e-6, 1e-6))
    core.speculation.use_costs(costs, is_automatic=True, max_running=8)
    controller, num_cut, num_kept = core.speculation.controller, 0, 0
    assert controller is not None
    keep = controller.keep

    def counting(*args: Any) -> list[int]:
        nonlocal num_cut, num_kept
        kept = keep(*args)
        num_cut += sum(count < each.num_nodes for count, each in zip(kept, args[1], strict=True))
        num_kept += sum(kept)
        return kept

    controller.keep = counting  # type: ignore[method-assign]
    assert tokens(run(core, requests(temperature))) == tokens(run(make_core(plain), requests(temperature)))
    assert num_cut > 10
    assert num_kept > 10


@pytest.mark.parametrize("rule", ["use_rejection_sampling", "use_block_verification"])
def test_sampled_drafts_are_stopped_and_never_cut(eagle3: TinyDraft, rule: str, tmp_path: Path) -> None:
    config = eagle3.config(3, 1, 4, draft_model_quantization=UNQUANTIZED, history=False, **{rule: True})
    numbers = {"num_steps": None, "eagle_topk": None, "num_draft_tokens": None}
    core = make_core(replace(config, speculative=replace(config.speculative, **numbers)))
    costs = RoundCosts(PassCurve(((1, 0.02), (12, 0.021), (112, 0.4))), draft_guess=DraftTimes(0, 1e-4, 1e-6, 1e-6))
    core.speculation.use_costs(costs, is_automatic=True, max_running=8)
    controller = core.speculation.controller
    assert controller is not None
    keep, lengths = controller.keep, set[int]()

    def watching(*args: Any) -> list[int]:
        kept = keep(*args)
        for count, each in zip(kept, args[1], strict=True):
            assert each.num_fixed in (None, count)
            assert each.num_fixed is not None or not each.chances
            lengths.add(count)
        return kept

    controller.keep = watching  # type: ignore[method-assign]
    samples = run(core, requests(0.9))
    assert len(samples) == 8
    assert len(lengths) > 1
    assert controller.recent.knows_network
