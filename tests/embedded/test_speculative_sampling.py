"""Sampling with speculation on the real code path has plain sampling's distribution.

Two-sample chi-square tests, 20,000 samples per arm (200,000 in the long form), arms with disjoint seeds (equal seeds
give equal outputs, as another test here shows). Significance 1e-4 for each form of the file, divided by its
comparisons: a correct engine would fail for one choice of seeds in 10,000, and the seeds are fixed. The negative
controls fail the same comparison. What 200,000 samples have proven of this very code, 20,000 need not prove again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafting import DraftContext
from rollout.embedded.verification.draw import inverse_cdf
from rollout.embedded.verification.verifier import Verifier
from rollout.embedded.verification.verify_pass import RuleVerifier
from rollout.embedded.verification.walk import walk_sampled
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import GroupRequest, SamplingParams
from tests.support import toy_rounds
from tests.support.embedded_harness import (
    ReplayDrafter,
    ScriptedDrafter,
    engine_config,
    make_core,
    random_prompt,
    run,
)
from tests.support.statistics import comparisons
from tests.support.toy_rounds import Judge

NUM_SAMPLES, NUM_TOKENS, VOCAB = 20_000, 4, 7
SIZES = [
    pytest.param(NUM_SAMPLES, marks=pytest.mark.proven_by_more),
    pytest.param(200_000, marks=[pytest.mark.long, pytest.mark.sampling_law, pytest.mark.proves]),
]
SIGNIFICANCE = 1e-4 / 21
PROMPT = (1, 5, 2, 3, 1, 5)
PARAMS = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
FILTERED = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.8, top_k=5, top_p=0.9, ignore_eos=True)
PENALISED = SamplingParams(
    max_new_tokens=NUM_TOKENS, frequency_penalty=1.2, repetition_penalty=1.3, min_new_tokens=3, logit_bias=((4, 1.0),)
)

LIKELY_NEXT = (6, 3, 4, 1, 1, 0, 2)
REDUCED_Q = torch.tensor([[0.2, 0.3, 0.0, 0.1, 0.0, 0.1, 0.3]]).expand(VOCAB, -1)


class DraftScript(ScriptedDrafter):
    """Proposes whole drafts: trees, or chains with the distribution they were sampled from."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [self._script(context) for context in contexts]


def fixed_chain(context: DraftContext) -> Draft:
    """A draft that depends on the last token only: mostly likely tokens, sometimes not."""
    first = LIKELY_NEXT[context.token_ids[-1]]
    second = LIKELY_NEXT[first]
    return Draft.chain([first, second, LIKELY_NEXT[second]][: context.max_depth])


def fixed_tree(context: DraftContext) -> Draft:
    """Two children of the root, two of the first, one of the second: five nodes, as deep as allowed."""
    first = LIKELY_NEXT[context.token_ids[-1]]
    other = (first + 2) % VOCAB
    tokens = (first, other, LIKELY_NEXT[first], (LIKELY_NEXT[first] + 3) % VOCAB, LIKELY_NEXT[other])
    return Draft(tokens, (-1, -1, 0, 0, 1)) if context.max_depth > 1 else Draft(tokens[:2], (-1, -1))


def sampled_chain(context: DraftContext) -> Draft:
    """Drawn with the round's uniforms from a distribution that lacks two tokens of the target's."""
    chain: list[int] = []
    start = len(context.token_ids) - context.num_prompt_tokens
    for index in range(min(3, context.max_depth)):
        uniform = torch.tensor([context.uniforms[start + index]], dtype=torch.float64)
        chain.append(int(inverse_cdf(REDUCED_Q[:1], uniform)))
    return Draft.chain(chain, REDUCED_Q[: len(chain)].to(toy_rounds.DEVICE)) if chain else NO_DRAFT


def outputs(folder: Path, first_seed: int, params: SamplingParams, num_samples: int, **replaced: Any) -> list:
    config = engine_config(folder, num_draft_tokens=6, max_running_requests=200)
    core = make_core(config, **replaced)
    requests = [
        GroupRequest(str(start), PROMPT, tuple(range(first_seed + start, first_seed + start + 1000)), params)
        for start in range(0, num_samples, 1000)
    ]
    return [sample.token_ids for sample in run(core, requests).values()]


@cache
def plain(folder: Path, params: SamplingParams, num_samples: int = NUM_SAMPLES) -> list:
    return outputs(folder, 0, params, num_samples)


def rule(**settings: bool) -> Judge:
    return Judge(SpeculativeConfig(**settings))


# (what drafts, what verifies, settings of the request), named by the settings first: these share a plain run.
ARMS: dict[str, tuple[Callable[[DraftContext], Draft], Verifier, SamplingParams]] = {
    "plain-chains": (fixed_chain, rule(), PARAMS),
    "plain-rejection": (sampled_chain, rule(use_rejection_sampling=True), PARAMS),
    "filters-trees": (fixed_tree, rule(), FILTERED),
    "filters-block": (sampled_chain, rule(use_block_verification=True), FILTERED),
    "penalties-trees": (fixed_tree, rule(), PENALISED),
    "penalties-rejection": (sampled_chain, rule(use_rejection_sampling=True), PENALISED),
}


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("arm", ARMS)
def test_scripted_drafts_leave_the_distribution_unchanged(micro_llama: Path, arm: str, num_samples: int) -> None:
    script, verifier, params = ARMS[arm]
    drafter = DraftScript(script)
    speculative = outputs(micro_llama, num_samples, params, num_samples, drafter=drafter, verifier=verifier)
    assert sum(accepted for _, accepted in drafter.observed) > num_samples / 4
    for view, p in comparisons(plain(micro_llama, params, num_samples), speculative).items():
        assert p > SIGNIFICANCE, view


def test_prompt_lookup_leaves_the_distribution_unchanged(micro_llama: Path) -> None:
    core = make_core(engine_config(micro_llama, "LOOKUP", num_draft_tokens=4, max_running_requests=200))
    seeds = range(2 * NUM_SAMPLES, 3 * NUM_SAMPLES)
    requests = [GroupRequest(str(s), PROMPT, tuple(seeds[s : s + 1000]), PARAMS) for s in range(0, NUM_SAMPLES, 1000)]
    speculative = [sample.token_ids for sample in run(core, requests).values()]
    for view, p in comparisons(plain(micro_llama, PARAMS), speculative).items():
        assert p > SIGNIFICANCE, view


def lenient(drawn: Sequence[int], draft: Draft) -> tuple[list[int], tuple[int, ...]]:
    """Accepts every second draft that the uniform refused: an acceptance threshold in disguise."""
    emitted: list[int] = []
    for token_id, drafted in zip(drawn, draft.token_ids, strict=False):
        if token_id != drafted and (token_id + drafted) % 2:
            return [*emitted, token_id], tuple(range(len(emitted)))
        emitted.append(drafted)
    return [*emitted, drawn[len(emitted)]], tuple(range(len(emitted)))


def stale(drawn: Sequence[int], draft: Draft) -> tuple[list[int], tuple[int, ...]]:
    """Goes one token past the first refused draft: that token was drawn in the context of the refused one."""
    for num_accepted, drafted in enumerate(draft.token_ids):
        if drawn[num_accepted] != drafted:
            return list(drawn[: num_accepted + 2]), tuple(range(num_accepted + 1))
    return list(drawn), tuple(range(len(draft.token_ids)))


@pytest.mark.parametrize("follow", [lenient, stale])
def test_negative_control_a_wrong_verification_rule_is_caught(micro_llama: Path, follow: Any) -> None:
    wrong = partial(walk_sampled, follow=follow)
    verifier = RuleVerifier(lambda row: wrong)
    drafter = DraftScript(fixed_chain)
    biased = outputs(micro_llama, NUM_SAMPLES, PARAMS, NUM_SAMPLES, drafter=drafter, verifier=verifier)
    assert comparisons(plain(micro_llama, PARAMS), biased)["joint of tokens 2 to 4"] < SIGNIFICANCE


@pytest.mark.parametrize("setting", ["use_rejection_sampling", "use_block_verification"])
def test_the_configuration_names_the_verifier_of_sampled_drafts(micro_llama: Path, setting: str) -> None:
    request = GroupRequest("g", PROMPT, tuple(range(200)), PARAMS)
    config = engine_config(micro_llama, num_draft_tokens=4)
    named = replace(config, speculative=replace(config.speculative, **{setting: True}))
    walked = run(make_core(config, drafter=DraftScript(sampled_chain)), [request])
    judged = run(make_core(named, drafter=DraftScript(sampled_chain)), [request])
    given = run(make_core(config, drafter=DraftScript(sampled_chain), verifier=rule(**{setting: True})), [request])
    tokens = [[sample.token_ids for sample in samples.values()] for samples in (walked, judged, given)]
    assert tokens[1] == tokens[2] != tokens[0]
    assert not any(sample.lossy for sample in judged.values())


def test_lossy_thresholds_mark_every_sample(micro_llama: Path) -> None:
    config = engine_config(micro_llama, num_draft_tokens=4)
    bent = replace(config, speculative=replace(config.speculative, lossy=True, accept_threshold_acc=0.5))
    request = GroupRequest("g", PROMPT, (1, 2, 3), PARAMS)
    assert all(sample.lossy for sample in run(make_core(bent), [request]).values())
    assert not any(sample.lossy for sample in run(make_core(config), [request]).values())


def test_sampled_drafts_give_the_same_tokens_whatever_else_runs(micro_llama: Path) -> None:
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    request = GroupRequest("g", PROMPT, (3, 4), params)
    others = [GroupRequest(f"other{i}", (*PROMPT[i:], i), (i,) * (i % 3 + 1), params) for i in range(5)]
    for name in ("use_rejection_sampling", "use_block_verification"):
        settings = {"drafter": DraftScript(sampled_chain), "verifier": rule(**{name: True})}
        alone = run(make_core(engine_config(micro_llama, num_draft_tokens=4), **settings), [request])
        config = engine_config(micro_llama, num_draft_tokens=4, max_running_requests=6)
        crowded = run(make_core(config, **settings), [*others, request])
        assert all(crowded[key].token_ids == sample.token_ids for key, sample in alone.items())
        assert alone["g", 0].token_ids != alone["g", 1].token_ids


@pytest.mark.parametrize("params", [PENALISED, FILTERED, SamplingParams(max_new_tokens=4, temperature=0.0)])
def test_a_seed_gives_the_same_tokens_with_trees_as_without(micro_llama: Path, params: SamplingParams) -> None:
    request = GroupRequest("g", PROMPT, tuple(range(100)), replace(params, max_new_tokens=25))
    expected = run(make_core(engine_config(micro_llama)), [request])
    drafter = DraftScript(fixed_tree)
    samples = run(make_core(engine_config(micro_llama, num_draft_tokens=6), drafter=drafter), [request])
    assert {key: s.token_ids for key, s in samples.items()} == {key: s.token_ids for key, s in expected.items()}
    assert sum(accepted for _, accepted in drafter.observed) > 100
    for key, sample in samples.items():
        assert sample.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)


def test_a_seed_gives_the_same_tokens_with_and_without_speculation(tiny_llama: Path) -> None:
    params = SamplingParams(max_new_tokens=50, temperature=0.9, top_p=0.95, min_p=0.01)
    prompts = [random_prompt(5 + i, seed=i) for i in range(8)]
    requests = [GroupRequest(str(i), prompt, (7 * i, 7 * i + 1), params) for i, prompt in enumerate(prompts)]
    expected = run(make_core(engine_config(tiny_llama)), requests)
    for num_draft_tokens, wrong_every in ((2, 2), (5, 3), (8, 0)):
        drafter = ReplayDrafter(expected, prompts, wrong_every)
        config = engine_config(tiny_llama, num_draft_tokens=num_draft_tokens)
        samples = run(make_core(config, drafter=drafter), requests)
        assert {key: s.token_ids for key, s in samples.items()} == {key: s.token_ids for key, s in expected.items()}
        assert sum(accepted for _, accepted in drafter.observed) > 100


def test_a_seed_gives_the_same_tokens_whatever_else_runs(tiny_llama: Path) -> None:
    params = SamplingParams(max_new_tokens=40)
    request = GroupRequest("g", random_prompt(20, seed=1), (3, 4), params)
    others = [GroupRequest(f"other{i}", random_prompt(9 * i + 1, seed=i), (i,) * (i % 3 + 1), params) for i in range(7)]
    alone = run(make_core(engine_config(tiny_llama, "LOOKUP")), [request])
    crowded = run(make_core(engine_config(tiny_llama, "LOOKUP", max_running_requests=6)), [*others, request])
    assert all(crowded[key].token_ids == sample.token_ids for key, sample in alone.items())
    assert alone["g", 0].token_ids != alone["g", 1].token_ids
