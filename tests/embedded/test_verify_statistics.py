"""What verifiers emit on synthetic logits has plain decoding's distribution, measured with the uniforms an engine uses.

Two-sample chi-square tests on arms with disjoint seeds. Significance 1e-4 for each of the two sizes of the file,
divided by its number of comparisons: a correct verifier would fail for one choice of seeds in 10,000, and the seeds
are fixed. 20,000 samples per arm see a total variation of 0.0625 with power 0.999; the long form has 200,000, and what
these have proven of this very code, 20,000 need not prove again. The negative controls fail the same comparison.
"""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.uniforms import RoundUniforms, Uniforms
from rollout.embedded.verification.verifier import Verifier, VerifyRow
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import SamplingParams
from tests.support.statistics import comparisons, p_value
from tests.support.toy_rounds import Drafting, Judge, ToyRun, chains, generate, no_draft, sampled_chains, trees

NUM_TOKENS, VOCAB = 4, 8
SIZES = [
    pytest.param(20_000, marks=pytest.mark.proven_by_more),
    pytest.param(200_000, marks=[pytest.mark.long, pytest.mark.sampling_law, pytest.mark.proves]),
]
TABLE = 1.2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(11))
RANKED = TABLE.argsort(dim=-1, descending=True).tolist()
Q_DRAFT = (TABLE + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(12))).softmax(-1)
REDUCED_Q = Q_DRAFT * torch.tensor([1, 1, 0, 1, 0, 1, 1, 0])
REDUCED_Q = REDUCED_Q / REDUCED_Q.sum(-1, keepdim=True)
CHAINS = chains([row[0] for row in RANKED], 3)
TREES = trees(RANKED, parents=(-1, -1, 0, 0, 1, 2), ranks=(0, 1, 0, 2, 0, 1))
SAMPLED = sampled_chains(Q_DRAFT, 3)
WALK = Judge(SpeculativeConfig())
REJECTION = Judge(SpeculativeConfig(use_rejection_sampling=True))
BLOCK = Judge(SpeculativeConfig(use_block_verification=True))
PLAIN = SamplingParams()
FILTERED = SamplingParams(temperature=0.8, top_k=6, top_p=0.85)
PENALISED = SamplingParams(frequency_penalty=1.0, repetition_penalty=1.4)
# (verifier, drafting, settings of the request)
ARMS: dict[str, tuple[Verifier, Drafting, SamplingParams]] = {
    "walk, chains": (WALK, CHAINS, PLAIN),
    "walk, trees, filters": (WALK, TREES, FILTERED),
    "rejection, reduced vocabulary": (REJECTION, sampled_chains(REDUCED_Q, 3), PLAIN),
    "block": (BLOCK, SAMPLED, PLAIN),
    "walk, trees": (WALK, TREES, PLAIN),
    "walk, trees, penalties": (WALK, TREES, PENALISED),
    "rejection": (REJECTION, SAMPLED, PLAIN),
    "rejection, filters": (REJECTION, SAMPLED, FILTERED),
    "rejection, chosen drafts": (REJECTION, CHAINS, PLAIN),
    "block, chosen drafts": (BLOCK, CHAINS, PLAIN),
    "block, penalties": (BLOCK, SAMPLED, PENALISED),
}
SIGNIFICANCE = 1e-4 / (3 * len(ARMS))


@cache
def plain(num_samples: int, params: SamplingParams) -> ToyRun:
    return generate(WALK, TABLE, range(num_samples), NUM_TOKENS, params)


def arm(
    num_samples: int, verifier: Verifier, drafting: Drafting, params: SamplingParams, table: torch.Tensor = TABLE
) -> ToyRun:
    return generate(verifier, table, range(num_samples, 2 * num_samples), NUM_TOKENS, params, drafting)


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("name", ARMS)
def test_speculation_leaves_the_distribution_unchanged(name: str, num_samples: int) -> None:
    verifier, drafting, params = ARMS[name]
    speculative = arm(num_samples, verifier, drafting, params)
    assert speculative.num_accepted > num_samples / 4
    for view, p in comparisons(plain(num_samples, params).responses, speculative.responses).items():
        assert p > SIGNIFICANCE, view


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled: sum min(p, q)", "chosen: p(x)"])
def test_first_drafts_stand_with_their_analytic_probability(sampled: bool, num_samples: int) -> None:
    # Within 4 binomial sigma: a false alarm in 16,000 choices of seeds.
    run = arm(num_samples, REJECTION, SAMPLED if sampled else CHAINS, PLAIN)
    p_target = TABLE.double().softmax(-1)
    alphas = {
        (root, drafted): float(
            torch.minimum(p_target[root], Q_DRAFT[root]).sum() if sampled else p_target[root, drafted]
        )
        for root, drafted, _ in run.first_drafts
    }
    expected = sum(alphas[root, drafted] for root, drafted, _ in run.first_drafts)
    variance = sum(alphas[root, drafted] * (1 - alphas[root, drafted]) for root, drafted, _ in run.first_drafts)
    accepted = sum(stood for _, _, stood in run.first_drafts)
    assert len(run.first_drafts) > num_samples
    assert abs(accepted - expected) < 4 * variance**0.5


def softmax_q_of_a_chosen_chain(root: int, limit: int, uniforms: Sequence[float]) -> Draft:
    """RTP-LLM's old mistake: the argmax is drafted, its softmax handed over as the distribution it was drawn from."""
    chosen = chains([int(row.argmax()) for row in Q_DRAFT], 3)(root, limit, uniforms).token_ids
    return Draft.chain(chosen, Q_DRAFT[[root, *chosen[:-1]]])


def lossy(**thresholds: float) -> Verifier:
    return Judge(SpeculativeConfig(lossy=True, **thresholds))


WRONG: dict[str, Callable[[], tuple[Verifier, Drafting]]] = {
    "threshold_acc 0.5": lambda: (lossy(accept_threshold_acc=0.5), TREES),
    "threshold_acc 0.9": lambda: (lossy(accept_threshold_acc=0.9), TREES),
    "threshold_single 0.2": lambda: (lossy(accept_threshold_single=0.2), TREES),
    "softmax q with a chosen draft": lambda: (REJECTION, softmax_q_of_a_chosen_chain),
    "duplicate siblings, cumulative": lambda: (lossy(accept_threshold_acc=1 - 1e-9), duplicated_siblings),
}


def duplicated_siblings(root: int, limit: int, uniforms: Sequence[float]) -> Draft:
    return Draft((RANKED[root][1],) * 3, (-1,) * 3)


@pytest.mark.parametrize("name", WRONG)
def test_negative_control_a_wrong_rule_is_caught(name: str) -> None:
    wrong = arm(20_000, *WRONG[name](), PLAIN)
    found = comparisons(plain(20_000, PLAIN).responses, wrong.responses)
    assert found["joint of tokens 2 to 4"] < SIGNIFICANCE
    assert found["first token (after the prefill)"] > SIGNIFICANCE


def test_negative_control_joint_filters_are_caught() -> None:
    # Both sets measured on the unfiltered distribution, as SGLang's ordinary sampler does: they need not agree.
    p = (TABLE / FILTERED.temperature).softmax(-1)
    ranked = p.sort(dim=-1, descending=True)
    inside = ranked.values.cumsum(-1) - ranked.values < FILTERED.top_p
    inside[:, FILTERED.top_k :] = False
    keep = torch.zeros_like(inside).scatter(1, ranked.indices, inside)
    joint = (TABLE / FILTERED.temperature).masked_fill(~keep, -torch.inf)
    run = arm(20_000, WALK, no_draft, PLAIN, joint)
    assert comparisons(plain(20_000, FILTERED).responses, run.responses)["joint of tokens 2 to 4"] < SIGNIFICANCE


class UniformsOfTheToken(Uniforms):
    """Draft and accept uniforms that a token keeps from round to round."""

    def draft_of_round(self, num_generated: int) -> RoundUniforms:
        return super().draft_of_round(0)

    def accept_of_round(self, num_generated: int) -> RoundUniforms:
        return super().accept_of_round(0)


def test_negative_control_block_verification_needs_new_uniforms_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    blind = sampled_chains(torch.full((2, 2), 0.5), 2)
    expected = generate(WALK, table, range(8_000), 4, PLAIN).responses
    fresh = generate(BLOCK, table, range(8_000, 16_000), 4, PLAIN, blind).responses
    monkeypatch.setattr("tests.support.toy_rounds.Uniforms", UniformsOfTheToken)
    reused = generate(BLOCK, table, range(8_000, 16_000), 4, PLAIN, blind).responses
    assert p_value(expected, fresh) > SIGNIFICANCE
    assert p_value(expected, reused) < SIGNIFICANCE


def adversarial(root: int, limit: int, uniforms: Sequence[float]) -> Draft:
    return Draft.chain([RANKED[root][-1]] * min(3, limit))


@pytest.mark.parametrize("params", [PLAIN, FILTERED, PENALISED, SamplingParams(temperature=0.0)])
def test_a_seed_gives_the_walk_the_tokens_of_plain_decoding_whatever_drafts(params: SamplingParams) -> None:
    seeds = range(60)
    expected = generate(WALK, TABLE, seeds, 20, params).responses
    for drafting in (CHAINS, TREES, adversarial, chains([row[1] for row in RANKED], 5)):
        for verifier in (WALK, REJECTION, BLOCK):
            assert generate(verifier, TABLE, seeds, 20, params, drafting).responses == expected


@pytest.mark.parametrize("verifier", [REJECTION, BLOCK], ids=["rejection", "block"])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(verifier: Verifier) -> None:
    together = generate(verifier, TABLE, range(40), 20, PLAIN, SAMPLED).responses
    alone = [generate(verifier, TABLE, [seed], 20, PLAIN, SAMPLED).responses[0] for seed in range(40)]
    assert together == alone
    assert len(set(together)) == 40


def test_the_walk_does_not_read_q() -> None:
    # A target-only engine may be given sampled drafts: they are judged as chosen ones, which is as exact.
    seeds = range(200)
    sampled = generate(WALK, TABLE, seeds, 12, PLAIN, SAMPLED)
    assert sampled.responses == generate(WALK, TABLE, seeds, 12, PLAIN).responses
    assert sampled.num_accepted > 200


def test_an_empty_draft_is_a_plain_step_for_every_rule() -> None:
    row = VerifyRow(NO_DRAFT, PLAIN, Uniforms(3, 5), (0,), 1)
    rules = (WALK, REJECTION, BLOCK, lossy(accept_threshold_acc=0.5))
    emitted = {rule(TABLE[:1], [row])[0].token_ids[0] for rule in rules}
    assert len(emitted) == 1
