"""Batched verification emits what row-by-row verification emits, with the same uniforms, and reads the device once."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf, isnan, nan

import numpy as np
import pytest
import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.transfer import downloaded, uploaded
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification import device_verifier, make_device_verifier, make_verifier
from rollout.embedded.verification.device_verifier import DeviceVerifier
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import RuleVerifier
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import SamplingParams
from tests.support.stand_in_device import stand_in_device

EOS = frozenset({3})
RULES = {
    "target-only": SpeculativeConfig(),
    "rejection": SpeculativeConfig(use_rejection_sampling=True),
    "block": SpeculativeConfig(use_block_verification=True),
}
PARAMS = {
    "plain": [SamplingParams()],
    "greedy": [SamplingParams(temperature=0.0)],
    "temperatures": [SamplingParams(temperature=t) for t in (0.0, 0.3, 1.0, 2.0)],
    "filters": [
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.9, temperature=0.7),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=40, top_p=0.5, min_p=0.02),
        SamplingParams(top_k=5000, top_p=0.999),
        SamplingParams(top_k=3, temperature=0.0),
    ],
    "filters of the likeliest few": [SamplingParams(top_k=k, min_p=m) for k, m in ((7, 0.0), (3, 0.3), (-1, 0.3))],
    "penalties": [
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(logit_bias=((2, 30.0), (5, -inf)), min_new_tokens=40),
        SamplingParams(),
    ],
}
VOCABS = (8, 300, 1500)  # less than a block of the draw, blocks and a rest, more than the first candidates of a nucleus


def random_draft(rng: random.Random, generator: torch.Generator, logits: torch.Tensor, rule: str) -> Draft:
    """A chain drawn from a distribution near the target's, or a tree of its likely tokens; ``logits`` [9, vocab]."""
    count = rng.randint(0, 6)
    if not count:
        return NO_DRAFT
    near = (logits[:count] + torch.randn(logits[:count].shape, generator=generator)).softmax(-1)
    if rule != "target-only" and rng.random() < 0.8:
        return Draft.chain(torch.multinomial(near, 1, generator=generator).squeeze(1).tolist(), near)
    parents = [rng.randint(-1, node - 1) for node in range(count)]
    ranked = logits.argsort(dim=-1, descending=True)
    rank_of = [parents[:node].count(parent) for node, parent in enumerate(parents)]
    return Draft(
        tuple(int(ranked[p + 1, r]) for p, r in zip(parents, rank_of, strict=True)),
        tuple(parents),
    )


def random_pass(seed: int, params: list[SamplingParams], vocab: int, rule: str) -> tuple[torch.Tensor, list[VerifyRow]]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, logits = [], []
    for _ in range(rng.randint(1, 7)):
        of_row = 2.5 * torch.randn(9, vocab, generator=generator)
        draft = random_draft(rng, generator, of_row, rule)
        token_ids = [rng.randrange(vocab) for _ in range(rng.randint(2, 30))]
        uniforms = Uniforms(rng.getrandbits(63), 60)
        rows.append(VerifyRow(draft, rng.choice(params), uniforms, token_ids, rng.randint(1, len(token_ids))))
        logits.append(of_row[: rows[-1].num_nodes])
    return torch.cat(logits), rows


def same(found: list[Verified], expected: list[Verified]) -> bool:
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.path for each in found] == [each.path for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5, nan_ok=True)
    return True


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_pass_judged_at_once_emits_what_its_rows_emit_one_by_one(rule: str, params: str, vocab: int) -> None:
    by_row, at_once = make_verifier(RULES[rule], EOS), make_device_verifier(RULES[rule], EOS)
    assert isinstance(by_row, RuleVerifier)
    accepted = sampled = 0
    for seed in range(40):
        logits, rows = random_pass(seed, PARAMS[params], vocab, rule)
        found = at_once(logits, rows)
        assert same(found, by_row(logits, rows))
        accepted += sum(len(each.path) for each in found)
        sampled += sum(row.draft.q_draft is not None for row in rows)
    assert accepted > 20
    assert (sampled > 20) == (rule != "target-only")


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("rule", RULES)
def test_the_device_is_read_once_a_pass_and_emits_the_same(rule: str, params: str) -> None:
    by_row = make_verifier(RULES[rule], EOS)
    with stand_in_device() as device:
        at_once = make_verifier(RULES[rule], EOS, torch.device("cuda"))
        assert isinstance(at_once, DeviceVerifier)
        for seed in range(100, 106):
            logits, rows = random_pass(seed, PARAMS[params], 300, rule)
            there = [
                row
                if row.draft.q_draft is None
                else replace(row, draft=replace(row.draft, q_draft=row.draft.q_draft.cuda()))
                for row in rows
            ]
            on_device = logits.cuda()
            device.forget()
            found = at_once(on_device, there)
            assert len(device.reads) == 1, device.reads
            assert len(device.uploads) == 1 or params == "penalties"
            assert same(found, by_row(logits, rows))


@pytest.mark.parametrize("rule", RULES)
def test_a_large_pass_is_judged_in_pieces_and_still_read_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_verifier, "NODES_PER_CHUNK", 5)
    passes = [random_pass(seed, PARAMS["temperatures"], 300, rule) for seed in range(200, 208)]
    logits, rows = torch.cat([each for each, _ in passes]), [row for _, each in passes for row in each]
    expected = make_verifier(RULES[rule], EOS)(logits, rows)
    assert same(make_device_verifier(RULES[rule], EOS)(logits, rows), expected)
    with stand_in_device() as device:
        there = [replace(row, draft=replace(row.draft, q_draft=None)) for row in rows]
        on_device = logits.cuda()
        device.forget()
        make_verifier(RULES[rule], EOS, torch.device("cuda"))(on_device, there)
        assert len(device.reads) == 1


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_without_a_distribution_says_so_and_spoils_no_other(rule: str, bad: float) -> None:
    for seed in range(300, 320):
        logits, rows = random_pass(seed, PARAMS["temperatures"], 300, rule)
        logits[: rows[0].num_nodes] = bad
        expected, found = (make(RULES[rule], EOS)(logits, rows) for make in (make_verifier, make_device_verifier))
        assert isnan(found[0].logprobs[-1])
        assert isnan(expected[0].logprobs[-1])
        assert same(found[1:], expected[1:])


def test_thresholds_read_the_device_three_times_however_many_rows() -> None:
    """The probabilities that a walk compares, the tokens, their logprobs: lossy rules are walked on the host."""
    config = SpeculativeConfig(lossy=True, accept_threshold_acc=0.5)
    passes = [random_pass(seed, PARAMS["plain"], 300, "target-only") for seed in range(400, 406)]
    rows = [row for _, each in passes for row in each if row.draft.token_ids][:9]
    logits = 2.5 * torch.randn(sum(row.num_nodes for row in rows), 300, generator=torch.Generator().manual_seed(1))
    with stand_in_device() as device:
        on_device = logits.cuda()
        device.forget()
        found = make_verifier(config, EOS, torch.device("cuda"))(on_device, rows)
        assert len(device.reads) == 3, device.reads
    assert same(found, make_verifier(config, EOS)(logits, rows))


def test_arrays_come_back_as_they_went_in_one_transfer_each_way() -> None:
    arrays = np.array([[1, -(2**60)], [3, 4]]), np.array([0.1, nan, inf]), np.zeros((0, 3)), np.array([], np.int64)
    with stand_in_device() as device:
        tensors = uploaded(torch.device("cuda"), *arrays)
        assert len(device.uploads) == 1
        back = downloaded(*tensors, tensors[0] > 2, tensors[1].float())
        assert len(device.reads) == 1
    for array, tensor, found in zip(arrays, tensors, back, strict=False):
        assert (tensor.shape, tensor.device.type) == (array.shape, "cuda")
        assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")
    assert back[4].tolist() == [[0, 0], [1, 1]]
    assert back[5].tolist()[0] == pytest.approx(0.1, abs=1e-8)
