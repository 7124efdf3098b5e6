"""LOOKUP with advice and NGRAM in the engine: they draft, and the output is plain decoding's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.drafters.ngram import NgramDrafter
from rollout.embedded.drafters.suffixes import SuffixArray
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import Samples, engine_config, greedy, make_core, random_prompt, run

NUM_TOKENS = 64
PROMPTS = [random_prompt(5 + i % 4, seed=100 + i) * (1 + i % 3) for i in range(24)]
DISTRIBUTIONS = {
    "greedy": greedy(NUM_TOKENS),
    "sampled": SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.6, top_k=4),
}


def requests(params: SamplingParams, advice: dict[int, tuple[int, ...]] | None = None) -> list[GroupRequest]:
    """Two samples of each prompt; ``advice[i]`` is that of prompt i."""
    given = advice or {}
    return [
        GroupRequest(str(i), prompt, (i, 1000 + i), replace(params, advice_token_ids=given.get(i, ())))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[str, Samples]:
    core = make_core(engine_config(tiny_llama, max_running_requests=16))
    return {distribution: run(core, requests(params)) for distribution, params in DISTRIBUTIONS.items()}


def tokens(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def num_correct(samples: Samples) -> int:
    return sum(sample.spec.num_correct for sample in samples.values())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_draft_tokens": 12},
        {"num_draft_tokens": 12, "ngram_match_type": "PROB"},
        {"ngram_min_bfs_breadth": 3, "ngram_max_bfs_breadth": 3, "num_draft_tokens": 16},
        {"num_draft_tokens": 12, "ngram_capacity": 100, "ngram_max_trie_depth": 5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
def test_ngram_trees_change_no_token_of_greedy_or_of_seeded_samples(
    tiny_llama: Path, plain: dict[str, Samples], settings: dict[str, object], distribution: str
) -> None:
    config = replace(
        engine_config(tiny_llama, max_running_requests=16),
        speculative=SpeculativeConfig(algorithm="NGRAM", **settings),  # type: ignore[arg-type]
    )
    samples = run(make_core(config), requests(DISTRIBUTIONS[distribution]))
    assert tokens(samples) == tokens(plain[distribution])
    assert num_correct(samples) > 0
    limit = settings["num_draft_tokens"]
    for sample in samples.values():
        assert sample.spec.num_proposed == sample.spec.num_rounds * (limit - 1)  # type: ignore[operator]
        assert sample.spec.num_drafted <= sample.spec.num_proposed


def test_a_corpus_of_the_very_replies_is_drafted_from(tiny_llama: Path, plain: dict[str, Samples]) -> None:
    config = replace(
        engine_config(tiny_llama, max_running_requests=16),
        speculative=SpeculativeConfig(algorithm="NGRAM", ngram_external_sam_budget=8),
    )
    documents = [(*PROMPTS[int(group)], *sample.token_ids) for (group, _), sample in plain["greedy"].items()]
    without = run(make_core(config, drafter=NgramDrafter(config.speculative)), requests(DISTRIBUTIONS["greedy"]))
    drafter = NgramDrafter(config.speculative, SuffixArray(documents, 40))
    samples = run(make_core(config, drafter=drafter), requests(DISTRIBUTIONS["greedy"]))
    assert tokens(samples) == tokens(without) == tokens(plain["greedy"])
    assert num_correct(samples) > num_correct(without)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("edit", [False, True])
def test_advice_edited_in_one_place_saves_most_rounds_and_changes_no_token(
    tiny_llama: Path, plain: dict[str, Samples], edit: bool, distribution: str
) -> None:
    """The advice is the first sample's reply with five tokens of its middle replaced by two others."""
    replies = {i: plain[distribution][str(i), 0].token_ids for i in range(len(PROMPTS))}
    advice = {i: (*reply[:30], 1, 2, *reply[35:]) for i, reply in replies.items()}
    core = make_core(engine_config(tiny_llama, "LOOKUP", 9, max_running_requests=16))
    samples = run(core, requests(replace(DISTRIBUTIONS[distribution], edit=edit), advice))
    assert tokens(samples) == tokens(plain[distribution])
    first = [sample for (_, index), sample in samples.items() if index == 0]
    rounds = sum(sample.spec.num_rounds for sample in first)
    assert rounds < 0.4 * sum(len(sample.token_ids) for sample in first)


def test_a_request_that_asks_for_no_speculation_has_none_beside_one_that_has(tiny_llama: Path) -> None:
    prompt = random_prompt(6, seed=1) * 3
    core = make_core(engine_config(tiny_llama, "LOOKUP"))
    off = GroupRequest("off", prompt, (0,), greedy(40, speculative=False))
    samples = run(core, [off, GroupRequest("on", prompt, (0,), greedy(40))])
    assert samples["off", 0].token_ids == samples["on", 0].token_ids
    assert (samples["off", 0].spec.num_rounds, samples["on", 0].spec.num_rounds > 0) == (0, True)
