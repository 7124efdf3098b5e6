"""Sampling with speculation on the real code path has plain sampling's law.

Two-sample chi-square tests, 20,000 samples per arm, arms with disjoint seeds (equal seeds give equal outputs, as
another test here shows). Significance 1e-4 for the file, divided by its 7 comparisons: a correct engine would fail for
one choice of seeds in 10,000, and the seeds are fixed. The negative controls fail the same comparison.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2_contingency

from slime_spec.interfaces import DraftContext
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import (
    ReplayDrafter,
    ScriptedDrafter,
    engine_config,
    make_core,
    random_prompt,
    run,
)

NUM_SAMPLES, NUM_TOKENS, VOCAB = 20_000, 4, 7
SIGNIFICANCE = 1e-4 / 7
PROMPT = (1, 5, 2, 3, 1, 5)
PARAMS = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
FILTERED = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.8, top_k=5, top_p=0.9, ignore_eos=True)


LIKELY_NEXT = (6, 3, 4, 1, 1, 0, 2)


def fixed_script(context: DraftContext) -> Sequence[int]:
    """A draft that depends on the last token only: mostly likely tokens, sometimes not."""
    first = LIKELY_NEXT[context.token_ids[-1]]
    second = LIKELY_NEXT[first]
    return [first, second, LIKELY_NEXT[second]]


def outputs(folder: Path, first_seed: int, params: SamplingParams, algorithm: str = "NONE", **replaced: Any) -> list:
    core = make_core(engine_config(folder, algorithm, num_draft_tokens=4, max_running_requests=1000), **replaced)
    requests = [
        GroupRequest(str(start), PROMPT, tuple(range(first_seed + start, first_seed + start + 1000)), params)
        for start in range(0, NUM_SAMPLES, 1000)
    ]
    return [sample.token_ids for sample in run(core, requests).values()]


@cache
def plain(folder: Path, params: SamplingParams) -> list:
    return outputs(folder, 0, params)


def p_value(left: Sequence, right: Sequence) -> float:
    """Two-sample chi-square; outcomes too rare for five expected counts per arm are pooled."""
    counts = [Counter(left), Counter(right)]
    both = counts[0] + counts[1]
    common = [key for key, count in both.items() if count >= 10]
    table = [[arm[key] for key in common] for arm in counts]
    rare = [sum(arm.values()) - sum(row) for arm, row in zip(counts, table, strict=True)]
    if sum(rare) >= 10:
        table = [[*row, count] for row, count in zip(table, rare, strict=True)]
    return float(chi2_contingency(table).pvalue)


def comparisons(left: list, right: list) -> dict[str, float]:
    return {
        "second token (the first of a round)": p_value([t[1] for t in left], [t[1] for t in right]),
        "joint of tokens 2 to 4": p_value([t[1:4] for t in left], [t[1:4] for t in right]),
        "first token (after the prefill)": p_value([t[0] for t in left], [t[0] for t in right]),
    }


@pytest.mark.parametrize("params", [PARAMS, FILTERED], ids=["unfiltered", "temperature, top-k, top-p"])
def test_scripted_drafts_leave_the_law_unchanged(micro_llama: Path, params: SamplingParams) -> None:
    drafter = ScriptedDrafter(fixed_script)
    speculative = outputs(micro_llama, NUM_SAMPLES, params, drafter=drafter)
    assert sum(accepted for _, accepted in drafter.observed) > NUM_SAMPLES / 4
    for name, p in comparisons(plain(micro_llama, params), speculative).items():
        assert p > SIGNIFICANCE, name


def test_prompt_lookup_leaves_the_law_unchanged(micro_llama: Path) -> None:
    speculative = outputs(micro_llama, 2 * NUM_SAMPLES, PARAMS, "LOOKUP")
    assert comparisons(plain(micro_llama, PARAMS), speculative)["joint of tokens 2 to 4"] > SIGNIFICANCE


def lenient_rule(drawn: Sequence[int], chain: Sequence[int]) -> list[int]:
    """Accepts every second draft that the coin refused: an acceptance threshold in disguise."""
    emitted: list[int] = []
    for token_id, drafted in zip(drawn, chain, strict=False):
        if token_id != drafted and (token_id + drafted) % 2:
            return [*emitted, token_id]
        emitted.append(drafted)
    return [*emitted, drawn[len(chain)]]


def stale_rule(drawn: Sequence[int], chain: Sequence[int]) -> list[int]:
    """Goes one token past the first refused draft: that token was drawn in the context of the refused one."""
    for num_accepted, drafted in enumerate(chain):
        if drawn[num_accepted] != drafted:
            return list(drawn[: num_accepted + 2])
    return list(drawn)


@pytest.mark.parametrize("rule", [lenient_rule, stale_rule])
def test_negative_control_a_wrong_verification_rule_is_caught(micro_llama: Path, rule: Any) -> None:
    biased = outputs(micro_llama, NUM_SAMPLES, PARAMS, drafter=ScriptedDrafter(fixed_script), chain_rule=rule)
    assert comparisons(plain(micro_llama, PARAMS), biased)["joint of tokens 2 to 4"] < SIGNIFICANCE


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
