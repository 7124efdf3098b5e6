"""Gumbel coupling: what the walk by races emits has the target's distribution, and no draft changes a token of a seed.

One-sample chi-square tests against fp64 probabilities, 20,000 samples (200,000 in the long form). Significance 1e-4 for
each form of the file, divided by its comparisons: a correct verifier would fail for one choice of seeds in 10,000, and
the seeds are fixed. The negative controls fail the same comparison.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from rollout.embedded.uniforms import Noise, Uniforms
from rollout.embedded.verification.reference import race_reference
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import Samples, engine_config, make_core, random_prompt, run
from tests.support.emission import Distribution, Toy
from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.toy_rounds import Drafting, Judge, RacedChains, ToyRun, chains, generate, no_draft, trees

NUM_TOKENS, VOCAB = 4, 6
SIZES = [
    pytest.param(20_000, marks=pytest.mark.proven_by_more),
    pytest.param(200_000, marks=[pytest.mark.long, pytest.mark.sampling_law, pytest.mark.proves]),
]
TABLE = 1.2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(21))
RANKED = TABLE.argsort(dim=-1, descending=True).tolist()
Q_DRAFT = (TABLE + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(22))).softmax(-1)
REDUCED_Q = Q_DRAFT * torch.tensor([1, 1, 0, 1, 0, 1])
COUPLED = Judge(SpeculativeConfig(use_gumbel_coupling=True))
RACED = RacedChains(Q_DRAFT, 3)
PLAIN = SamplingParams()
FILTERED = SamplingParams(temperature=0.8, top_k=5, top_p=0.85)
PENALISED = SamplingParams(frequency_penalty=1.0, repetition_penalty=1.4)
# (drafting, settings of the request)
ARMS: dict[str, tuple[Drafting | RacedChains, SamplingParams]] = {
    "no draft": (no_draft, PLAIN),
    "raced": (RACED, PLAIN),
    "raced, reduced vocabulary": (RacedChains(REDUCED_Q, 3), PLAIN),
    "raced, filters": (RACED, FILTERED),
    "chosen trees": (trees(RANKED, parents=(-1, -1, 0, 0, 1, 2), ranks=(0, 1, 0, 2, 0, 1)), PLAIN),
}
COMPARISONS = 4 * len(ARMS) + 2 * 2 * VOCAB
SIGNIFICANCE = 1e-4 / COMPARISONS


@pytest.fixture(autouse=True)
def _on_the_cpu(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--device") in ("cuda", "stand-in"):
        pytest.skip("races are run on the CPU")


def p_value(tokens: Sequence[tuple[int, ...]], expected: Distribution) -> float:
    """Of a one-sample chi-square; outcomes expected fewer than five times are pooled."""
    counts, total = Counter(tokens), len(tokens)
    assert counts.keys() <= {outcome for outcome, p in expected.items() if p > 0}
    common = [outcome for outcome, p in expected.items() if p * total >= 5]
    rare = [p for outcome, p in expected.items() if p * total < 5]
    found, wanted = [counts[outcome] for outcome in common], [expected[outcome] * total for outcome in common]
    if rare:
        found.append(total - sum(found))
        wanted.append(sum(rare) * total)
    return float(chisquare(found, [each * total / sum(wanted) for each in wanted]).pvalue)


def marginal(joint: Distribution, places: slice) -> Distribution:
    found: Distribution = {}
    for tokens, p in joint.items():
        found[tokens[places]] = found.get(tokens[places], 0.0) + p
    return found


def misfits(run: ToyRun, params: SamplingParams) -> list[str]:
    """The views in which the responses differ from plain decoding's exact probabilities."""
    joint = Toy(TABLE.double(), params).autoregressive(NUM_TOKENS)
    views = {
        "first token": slice(1),
        "second token, the first of a round": slice(1, 2),
        "tokens 2 and 3": slice(1, 3),
        "all": slice(4),
    }
    return [
        view
        for view, places in views.items()
        if p_value([each[places] for each in run.responses], marginal(joint, places)) < SIGNIFICANCE
    ]


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("name", ARMS)
def test_tokens_have_the_targets_exact_probabilities(name: str, num_samples: int) -> None:
    drafting, params = ARMS[name]
    run = generate(COUPLED, TABLE, range(num_samples), NUM_TOKENS, params, drafting)
    assert (run.num_accepted > num_samples / 4) == (drafting is not no_draft)
    assert misfits(run, params) == []


@pytest.mark.parametrize("num_samples", SIZES)
def test_the_token_after_an_accepted_and_after_a_refused_draft_has_the_targets_probabilities(num_samples: int) -> None:
    seeds = range(num_samples)
    responses = generate(COUPLED, TABLE, seeds, NUM_TOKENS, PLAIN, RACED).responses
    q_draft, p_target = Q_DRAFT.tolist(), TABLE.double().softmax(-1)
    after: dict[tuple[bool, int], list[tuple[int, ...]]] = {}
    for seed, (first, second, third, _) in zip(seeds, responses, strict=True):
        drafted = race_reference(q_draft[first], Uniforms(seed, NUM_TOKENS).noise.key(1))
        after.setdefault((drafted == second, second), []).append((third,))
    assert len(after) == 2 * VOCAB
    for (stood, second), thirds in after.items():
        expected = {(token,): float(p) for token, p in enumerate(p_target[second])}
        assert p_value(thirds, expected) > SIGNIFICANCE, (stood, second)


class OneNoise(Noise):
    """The same noise at every position."""

    def key(self, t: int) -> int:
        return super().key(0)


class UniformsOfOneNoise(Uniforms):
    @property
    def noise(self) -> Noise:  # type: ignore[override]
        return OneNoise(super().noise._stream_key)


def test_negative_control_noise_that_positions_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.toy_rounds.Uniforms", UniformsOfOneNoise)
    found = misfits(generate(COUPLED, TABLE, range(20_000), NUM_TOKENS, PLAIN, RACED), PLAIN)
    assert "tokens 2 and 3" in found
    assert "first token" not in found


def test_negative_control_a_draft_that_is_not_judged_is_caught() -> None:
    unjudged = generate(COUPLED, Q_DRAFT.log(), range(20_000), NUM_TOKENS, PLAIN, RACED)
    assert "second token, the first of a round" in misfits(unjudged, PLAIN)


@pytest.mark.parametrize("params", [PLAIN, FILTERED, PENALISED, SamplingParams(temperature=0.0)])
def test_a_seed_gives_the_tokens_of_plain_decoding_whatever_drafts(params: SamplingParams) -> None:
    seeds = range(60)
    expected = generate(COUPLED, TABLE, seeds, 20, params).responses
    worst = chains([row[-1] for row in RANKED], 5)
    for drafting in (*(drafting for drafting, _ in ARMS.values()), worst, RacedChains(Q_DRAFT, 5)):
        assert generate(COUPLED, TABLE, seeds, 20, params, drafting).responses == expected


def test_raced_drafts_stand_more_often_than_the_likeliest_ones() -> None:
    likeliest = chains([int(row.argmax()) for row in Q_DRAFT], 3)
    raced, chosen = (generate(COUPLED, TABLE, range(4_000), 12, PLAIN, each) for each in (RACED, likeliest))
    assert raced.responses == chosen.responses
    assert raced.num_accepted > 1.15 * chosen.num_accepted


PROMPTS = [random_prompt(3 + 5 * i, seed=i) for i in range(6)]
KINDS = [
    SamplingParams(max_new_tokens=24),
    SamplingParams(max_new_tokens=17, temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(max_new_tokens=20, temperature=1.3, min_p=0.02),
    SamplingParams(max_new_tokens=20, frequency_penalty=0.8, repetition_penalty=1.2),
    SamplingParams(max_new_tokens=12, temperature=0.0),
    SamplingParams(max_new_tokens=9, speculative=False),
]
REQUESTS = [GroupRequest(str(i), prompt, (3 * i, 3 * i + 1), KINDS[i]) for i, prompt in enumerate(PROMPTS)]
NETWORKS = ["standalone", "eagle3", "eagle", "nextn in a folder of its own", "mimo", "dflash", "dspark"]
Configured = Callable[[int, int], Config]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Configured, Samples]:
    """A tiny target and draft by (length of the chain, sequences that run at once); samples without speculation."""
    folder = tmp_path_factory.mktemp("network")
    if request.param != "standalone":
        tiny = make_format(folder, request.param)

        def of_chain(num_steps: int, batch: int) -> Config:
            return tiny.config(num_steps, use_gumbel_coupling=True, engine={"max_running_requests": batch})
    else:
        target, draft = make_tiny_checkpoint(folder / "target"), make_tiny_checkpoint(folder / "draft")

        def of_chain(num_steps: int, batch: int) -> Config:
            return coupled(target, draft, num_steps, batch)

    return of_chain, run(make_core(without_speculation(of_chain(1, 4))), REQUESTS)


def coupled(target: Path, draft: Path, num_steps: int, batch: int = 8) -> Config:
    config = engine_config(target, max_running_requests=batch)
    speculative = SpeculativeConfig(
        algorithm="STANDALONE", draft_model_path=str(draft), num_steps=num_steps, use_gumbel_coupling=True
    )
    return replace(config, speculative=speculative)


def without_speculation(config: Config) -> Config:
    return replace(config, speculative=SpeculativeConfig(algorithm="NONE", use_gumbel_coupling=True))


@pytest.mark.parametrize(("num_steps", "batch"), [(1, 8), (2, 1), (3, 12), (4, 5), (5, 3)])
def test_speculation_changes_no_token_and_no_logprob(
    network: tuple[Configured, Samples], num_steps: int, batch: int
) -> None:
    of_chain, expected = network
    samples = run(make_core(of_chain(num_steps, batch)), REQUESTS)
    assert {key: each.token_ids for key, each in samples.items()} == {k: s.token_ids for k, s in expected.items()}
    for key, sample in samples.items():
        assert sample.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)
        assert not sample.lossy
    assert sum(sample.spec.num_drafted for sample in samples.values()) > 60


def test_drafters_without_a_network_change_no_token_either(tiny_llama: Path) -> None:
    expected = run(make_core(without_speculation(engine_config(tiny_llama))), REQUESTS)
    for algorithm in ("LOOKUP", "NGRAM"):
        config = engine_config(tiny_llama, algorithm)
        config = replace(config, speculative=replace(config.speculative, use_gumbel_coupling=True))
        samples = run(make_core(config), REQUESTS)
        assert {key: each.token_ids for key, each in samples.items()} == {k: s.token_ids for k, s in expected.items()}


@pytest.mark.parametrize("settings", [{"num_steps": None}, {"history": True}], ids=["automatic depth", "history first"])
def test_drafts_of_any_origin_and_depth_change_no_token(tiny_llama: Path, settings: dict[str, Any]) -> None:
    config = coupled(tiny_llama, tiny_llama, 3)
    expected = run(make_core(without_speculation(config)), REQUESTS)
    samples = run(make_core(replace(config, speculative=replace(config.speculative, **settings))), REQUESTS)
    assert {key: each.token_ids for key, each in samples.items()} == {k: s.token_ids for k, s in expected.items()}


def test_a_draft_of_the_targets_own_distribution_is_always_right(tiny_llama: Path) -> None:
    """Noise, position, temperature and filters are then the target's too; only rounding may part them."""
    kinds = [KINDS[0], KINDS[1], KINDS[2], KINDS[4]]
    requests = [GroupRequest(str(i), PROMPTS[i], tuple(range(8 * i, 8 * i + 8)), each) for i, each in enumerate(kinds)]
    samples = run(make_core(coupled(tiny_llama, tiny_llama, 4)), requests)
    drafted = sum(sample.spec.num_drafted for sample in samples.values())
    assert drafted > 300
    assert sum(sample.spec.num_correct for sample in samples.values()) == drafted


def test_the_race_is_not_the_inverse_cdf(tiny_llama: Path) -> None:
    by_race = run(make_core(without_speculation(engine_config(tiny_llama))), REQUESTS)
    by_uniform = run(make_core(engine_config(tiny_llama)), REQUESTS)
    same = [by_race[key].token_ids == by_uniform[key].token_ids for key in by_race if int(key[0]) != 4]
    assert not any(same)
    assert by_race["4", 0].token_ids == by_uniform["4", 0].token_ids  # the greedy one


def test_a_drafted_tree_is_judged_by_the_same_races(tmp_path: Path) -> None:
    tiny = make_format(tmp_path, "eagle3")
    expected = run(make_core(without_speculation(tiny.plain)), REQUESTS)
    samples = run(make_core(tiny.config(3, 3, 8, use_gumbel_coupling=True)), REQUESTS)
    assert {key: each.token_ids for key, each in samples.items()} == {k: s.token_ids for k, s in expected.items()}
    assert sum(sample.spec.num_correct for sample in samples.values()) > 0
