"""The real SGLang on the CPU, every algorithm: exact output, true counters, draft-safe pushes, no sample lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from rollout.sglang_engine.recordings import recordings
from rollout.sglang_engine.reply_corpus import LIST, REMOVE
from rollout.sglang_engine.speculation_trial import find_switch
from slime_spec.errors import PushError
from slime_spec.sglang.releases import NEWEST_READ
from slime_spec.speculation.counters import pooled
from slime_spec.types import EarlierReply, GroupRequest, SamplingParams, SpecCounters
from slime_spec.weights.messages import PauseMode
from tests.support.sglang_real import ALGORITHMS, PROMPTS, Models, Real, embedded_samples, greedy, on
from tests.support.sglang_recording import recording, refusals
from tests.support.tiny_models import load_reference

pytestmark = [pytest.mark.long, pytest.mark.sglang_server]

NUM_TOKENS = 40
NUM_ASCII = 94  # the first tokens of the tiny policy's vocabulary are the printable characters
LOGPROB_ERROR = 2e-4  # two implementations in float32


@on(*ALGORITHMS)
def test_greedy_speculation_is_greedy_decoding_in_transformers(real: Real, models: Models) -> None:
    """Every algorithm equals one reference, plain decoding included, so all equal each other."""
    samples = real.generate(NUM_TOKENS)
    for sample, (token_ids, logprobs) in zip(
        samples, greedy(models.reference(real.algorithm), NUM_TOKENS), strict=True
    ):
        assert sample.token_ids == token_ids
        assert sample.logprobs == pytest.approx(logprobs, abs=LOGPROB_ERROR)


@on(*ALGORITHMS)
def test_counters_add_up(real: Real) -> None:
    for sample in real.generate(NUM_TOKENS):
        spec = sample.spec
        if real.algorithm == "NONE":
            assert spec.num_rounds == 0
            continue
        assert sum(spec.histogram) == spec.num_rounds > 0
        assert spec.num_correct_unbinned == 0
        assert spec.num_proposed == spec.num_rounds * ((real.config.speculative.num_draft_tokens or 4) - 1)
        # The prefill brings a token, each round one and what it accepts; the last round may be cut off.
        made = 1 + spec.num_rounds + spec.num_correct
        assert len(sample.token_ids) == NUM_TOKENS <= made <= NUM_TOKENS + (spec.num_steps or 3)


@on("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
def test_the_embedded_engine_accepts_what_sglang_accepts(real: Real) -> None:
    """Same tokens and same acceptance, round by round.

    Two differences are known. SGLang's last round may accept drafts beyond the request's budget, which are cut off.
    SGLang's STANDALONE draft never sees the first token of the text; ours does, and here it is the target itself.
    """
    theirs, ours = real.generate(NUM_TOKENS), embedded_samples(real.config, NUM_TOKENS)
    assert [sample.token_ids for sample in theirs] == [sample.token_ids for sample in ours]
    if real.algorithm == "STANDALONE":
        their_pool, our_pool = (pooled(sample.spec for sample in samples) for samples in (theirs, ours))
        assert our_pool.num_correct > their_pool.num_correct > 0
        return
    for their_sample, our_sample in zip(theirs, ours, strict=True):
        assert our_sample.spec.histogram in within_budget(their_sample.spec)


def within_budget(spec: SpecCounters) -> list[tuple[int, ...]]:
    """The histograms that ``spec`` may be without the drafts that its last round accepted beyond NUM_TOKENS."""
    beyond = 1 + spec.num_rounds + spec.num_correct - NUM_TOKENS
    if beyond == 0:
        return [spec.histogram]
    found = []
    for last, count in enumerate(spec.histogram):
        if count and last >= beyond:
            moved = list(spec.histogram)
            moved[last] -= 1
            moved[last - beyond] += 1
            while not moved[-1]:
                moved.pop()
            found.append(tuple(moved))
    return found


@on("EAGLE3")
def test_a_request_cannot_opt_out_of_speculation_and_trying_harms_nothing(real: Real) -> None:
    """An unknown field of sampling_params is an internal error there; the next calls are answered."""
    before = [sample.token_ids for sample in real.generate(NUM_TOKENS)]
    loop, client = real.engine.server.loop, real.engine.client
    for version in (NEWEST_READ, "99.0"):
        assert loop.call(find_switch(client, PROMPTS[0], version)) is None
        assert loop.call(client.get("/server_info"))["speculative_algorithm"] == "EAGLE3"
    assert [sample.token_ids for sample in real.generate(NUM_TOKENS)] == before


@on("STANDALONE")
def test_a_stale_draft_is_hardly_accepted_and_a_pushed_one_is_again(real: Real) -> None:
    fresh = pooled(sample.spec for sample in real.generate(NUM_TOKENS))
    other = real.other_target()
    real.push(other, 7)
    samples = real.generate(NUM_TOKENS)
    stale = pooled(sample.spec for sample in samples)
    assert {sample.weight_version for sample in samples} == {7}
    assert stale.num_correct / stale.num_rounds < 0.5 * fresh.num_correct / fresh.num_rounds
    real.push(other, 7, "draft")
    again = real.generate(NUM_TOKENS)
    back = pooled(sample.spec for sample in again)
    assert back.num_correct / back.num_rounds > 2 * stale.num_correct / stale.num_rounds
    assert [sample.token_ids for sample in again] == [sample.token_ids for sample in samples]
    assert {sample.draft_version for sample in again} == {7}


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
@on("STANDALONE", "EAGLE3", "NGRAM", "NONE")
def test_a_push_during_generation_shows_in_the_version_spans(real: Real, mode: PauseMode) -> None:
    request = GroupRequest("long", PROMPTS[0], (1, 2), SamplingParams(450, temperature=0.0, ignore_eos=True))
    before = real.engine.weights.version("target")
    messages = real.other_target()
    generation = real.engine.generate(request)
    wait_for_tokens(real, 20)
    real.push(messages, before + 1, pause_mode=mode)
    for sample in generation:
        assert len(sample.token_ids) == len(sample.logprobs)
        if mode == "abort":
            assert (sample.finish_reason, sample.version_spans, sample.weight_version) == ("abort", (), before)
            assert 0 < len(sample.token_ids) < 450
            continue
        assert len(sample.token_ids) == 450
        assert [version for _, version in sample.version_spans] == [before, before + 1]
        assert sample.weight_version == before
        start = sample.version_spans[1][0]
        assert sample.token_ids[:start] == greedy_prefix(real, start)
    assert {sample.weight_version for sample in real.generate(4)} == {before + 1}


def wait_for_tokens(real: Real, num_tokens: int) -> None:
    """Until every running sample has so many."""
    running = real.engine.samples.in_progress
    wait_until(lambda: min((run.num_tokens for run in running), default=num_tokens) >= num_tokens)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120.0
    while not holds():
        assert time.monotonic() < deadline, "the server does nothing"
        time.sleep(0.02)


def greedy_prefix(real: Real, num_tokens: int) -> tuple[int, ...]:
    """What the checkpoint's weights say to PROMPTS[0]."""
    model = load_reference(Path(real.config.model.hf_checkpoint))
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tuple(made[0, len(PROMPTS[0]) :].tolist())


@on("EAGLE3")
def test_a_payload_that_would_kill_the_server_never_reaches_it(real: Real) -> None:
    wrong = {**real.target_weights, "lm_head.weight": torch.zeros(320, 48)}
    with pytest.raises(PushError, match=r"lm_head.weight has shape \(320, 48\)"):
        real.push(wrong, 3)
    with pytest.raises(PushError, match="the push lacks"):
        real.push(real.target_weights, 3, "draft")
    assert len(real.generate(4)) == len(PROMPTS)


@on("NGRAM")
def test_a_session_left_open_is_recovered(real: Real) -> None:
    real.engine.server.loop.call(real.engine.client.post("/begin_weight_update", {"selector": "all"}))
    real.push(real.other_target(), 5, verify=True)
    assert {sample.weight_version for sample in real.generate(4)} == {5}


@on("NGRAM")
def test_replies_that_the_server_is_fed_with_are_drafted_and_change_no_token(real: Real) -> None:
    """A push empties the server's own trie. These weights say tokens that are ASCII alone, which text brings back."""
    weights = real.target_weights
    head = weights["lm_head.weight"].clone()
    for row in range(NUM_ASCII, len(head)):
        head[row] = 0.5 * head[row % NUM_ASCII]  # below the largest logit, which is positive
    weights |= {"lm_head.weight": head}
    real.push(weights, 5)
    plain, corpus, client = real.generate(NUM_TOKENS), real.engine.samples.corpus, real.engine.client
    assert corpus is not None
    assert {token for sample in plain for token in sample.token_ids} <= set(range(NUM_ASCII))
    long = SamplingParams(450, temperature=0.0, ignore_eos=True)
    before, num_fed = pooled(sample.spec for sample in plain), corpus.num_fed
    groups = [
        real.engine.generate(GroupRequest(f"c{i}", prompt, (i,), long, earlier=(EarlierReply(sample.token_ids, 5),)))
        for i, (prompt, sample) in enumerate(zip(PROMPTS, plain, strict=True))
    ]
    wait_until(lambda: corpus.num_fed > num_fed)
    for group in groups:
        group.abort()
        list(group)
    real.push(weights, 6)
    fed = real.generate(NUM_TOKENS)
    loop = real.engine.server.loop
    (name,) = loop.call(client.get(LIST))["corpus_token_counts"]
    loop.call(client.post(REMOVE, {"corpus_id": name}))
    assert [sample.token_ids for sample in fed] == [sample.token_ids for sample in plain]
    after = pooled(sample.spec for sample in fed)
    assert before.num_correct < 0.2 * before.num_rounds
    assert after.num_correct > 2.5 * after.num_rounds, "of three drafts"


@on("EAGLE3", "STANDALONE")
def test_the_draft_survives_an_offload(real: Real) -> None:
    before = real.checksums("draft")
    real.engine.set_resident(False)
    real.engine.set_resident(True)
    assert real.checksums("draft") == before
    assert len(real.generate(4)) == len(PROMPTS)


@on("STANDALONE")
def test_a_killed_server_comes_back_with_both_sides_and_no_sample_is_lost(real: Real) -> None:
    other = real.other_target()
    real.push(other, 4)
    real.push(other, 4, "draft")
    undisturbed = real.generate(200)
    sampling = SamplingParams(200, temperature=0.0, ignore_eos=True)
    groups = [real.engine.generate(GroupRequest(f"k{i}", prompt, (i,), sampling)) for i, prompt in enumerate(PROMPTS)]
    wait_for_tokens(real, 20)
    assert real.engine.server.supervisor is not None
    process = real.engine.server.supervisor.server._process
    assert process is not None
    scheduler = next(
        child for child in psutil.Process(process.pid).children(recursive=True) if "schedul" in child.cmdline()[0]
    )
    scheduler.kill()
    samples = [sample for group in groups for sample in group]
    assert real.engine.server.supervisor.num_restarts == 1
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in undisturbed]
    for sample, other_sample in zip(samples, undisturbed, strict=True):
        assert sample.logprobs == pytest.approx(other_sample.logprobs, abs=LOGPROB_ERROR)
        assert (sample.weight_version, sample.draft_version, sample.finish_reason) == (4, 4, "length")
    again, before = (pooled(sample.spec for sample in each) for each in (real.generate(200), undisturbed))
    assert again.histogram == before.histogram


@on("NONE")
def test_temperature_reaches_a_server_that_does_not_speculate(real: Real) -> None:
    """On a CPU SGLang verifies greedily whatever the temperature, so only plain decoding samples there."""
    hot = [sample.token_ids for sample in real.generate(NUM_TOKENS, temperature=1.0)]
    assert hot != [sample.token_ids for sample in real.generate(NUM_TOKENS)]


@on("NONE")
def test_an_aborted_sample_keeps_its_tokens(real: Real) -> None:
    sampling = SamplingParams(400, temperature=0.0, ignore_eos=True)
    generation = real.engine.generate(GroupRequest("abort", PROMPTS[0], (1,), sampling))
    wait_for_tokens(real, 10)
    generation.abort()
    (sample,) = generation
    assert sample.finish_reason == "abort"
    assert 0 < len(sample.token_ids) == len(sample.logprobs) < 400
    assert sample.token_ids[:NUM_TOKENS] == real.generate(NUM_TOKENS)[0].token_ids[: len(sample.token_ids)]


@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5}])
@on("NONE", "EAGLE3")
def test_an_aborted_sample_goes_on_from_its_tokens(real: Real, penalty: dict[str, float]) -> None:
    """Under a penalty it begins anew, because SGLang's penalties count no token of a prompt."""
    sampling = SamplingParams(200, temperature=0.0, ignore_eos=True, **penalty)  # type: ignore[arg-type]
    request = GroupRequest("whole", PROMPTS[0], (1,), sampling)
    (undisturbed,) = real.engine.generate(request)
    generation = real.engine.generate(replace(request, group_id="partial"))
    wait_for_tokens(real, 20)
    generation.abort()
    (partial,) = generation
    assert partial.finish_reason == "abort"
    assert 0 < len(partial.token_ids) < 200
    (whole,) = real.engine.generate(replace(request, group_id="partial", partials=(partial,)))
    assert (whole.token_ids, whole.finish_reason) == (undisturbed.token_ids, "length")
    assert whole.logprobs == pytest.approx(undisturbed.logprobs, abs=LOGPROB_ERROR)


@on("EAGLE3")
def test_the_fake_server_replays_what_the_real_one_answers(real: Real) -> None:
    made, kept = recording(real), recordings()
    assert made["meta_info"].keys() == kept["meta_info"]["0.5.21"].keys()
    assert made["tensor_fields"] == kept["tensor_fields"]["0.5.21"]
    assert refusals(real) == kept["errors"]
