"""Prompts enter in chunks beside the decoding of others, several in one pass, and their first tokens in one draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.embedded.core import GenerationCore
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import RowSpan
from rollout.embedded.target import PassOutput
from rollout.embedded.verification import make_verifier
from rollout.embedded.verification.verifier import Verified, VerifyRow
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import Samples, engine_config, make_core, prefill, random_prompt, run

PARAMS = SamplingParams(max_new_tokens=12)


def record_passes(core: GenerationCore, monkeypatch: pytest.MonkeyPatch) -> list[list[RowSpan]]:
    """The spans of every pass from now on."""
    passes: list[list[RowSpan]] = []
    run_pass = core.target.run

    def recorded(store: KvStore, spans: Sequence[RowSpan], *rest: Any) -> PassOutput:
        passes.append(list(spans))
        return run_pass(store, spans, *rest)

    monkeypatch.setattr(core.target, "run", recorded)
    return passes


def tokens(samples: Samples) -> dict:
    return {key: sample.token_ids for key, sample in samples.items()}


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_prompt_prefilled_in_chunks_gives_the_first_token_of_one_prefilled_whole(
    tiny_llama: Path, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GroupRequest("g", random_prompt(100, seed=1), tuple(range(num_samples)), PARAMS)
    whole = run(make_core(engine_config(tiny_llama)), [request])
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 33)
    core = make_core(engine_config(tiny_llama))
    passes = record_passes(core, monkeypatch)
    chunked = run(core, [request])
    assert [span.count for spans in passes[:4] for span in spans] == [33, 33, 33, 1]
    for key, sample in chunked.items():
        assert sample.token_ids == whole[key].token_ids
        assert sample.logprobs == pytest.approx(whole[key].logprobs, abs=1e-5)


@pytest.mark.parametrize("seeds", [(9,), (9, 10)])
def test_a_long_prompt_costs_each_step_of_the_others_one_chunk(
    tiny_llama: Path, seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_BESIDE_DECODING", 40)
    short = GroupRequest("short", random_prompt(5, seed=1), (1,), SamplingParams(max_new_tokens=30))
    long = GroupRequest("long", random_prompt(400, seed=2), seeds, PARAMS)
    expected = run(make_core(engine_config(tiny_llama)), [short, long])
    core = make_core(engine_config(tiny_llama))
    passes = record_passes(core, monkeypatch)
    samples: Samples = {}
    for request in (short, long):
        core.add(request, lambda sample: samples.__setitem__((sample.group_id, sample.sample_index), sample))
    first = core.waiting[0]
    while core.has_work:
        before, num_passes = first.num_generated, len(passes)
        core.step()
        if before < 30:
            assert first.num_generated > before, "the long prompt stalled a running sequence"
            prefilled = [span for spans in passes[num_passes:] for span in spans if span.count > 1]
            assert sum(span.count for span in prefilled) <= (1024 if before == 0 else 40)
    assert tokens(samples) == tokens(expected)


def test_short_prompts_that_come_together_are_prefilled_in_one_pass_and_drawn_in_one_call(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_prompt(4 + 5 * i, seed=i) for i in range(8)]
    requests = [GroupRequest(str(i), prompt, (i,), PARAMS) for i, prompt in enumerate(prompts)]
    verifier = make_verifier(SpeculativeConfig(), frozenset())
    drawn: list[int] = []

    class CountingVerifier:
        lossy = False

        def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
            drawn.append(len(rows))
            return verifier(logits, rows)

    core = make_core(engine_config(tiny_llama), verifier=CountingVerifier())
    passes = record_passes(core, monkeypatch)
    together = run(core, requests)
    assert [span.count for span in passes[0]] == [len(prompt) for prompt in prompts]
    assert all(span.count == 1 for spans in passes[1:] for span in spans)
    assert drawn == [8] * 12
    for request in requests:
        alone = run(make_core(engine_config(tiny_llama)), [request])
        assert together[request.group_id, 0].token_ids == alone[request.group_id, 0].token_ids


def test_shared_and_own_prompts_that_come_together_take_one_pass_each(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [GroupRequest(str(i), random_prompt(6 + i, seed=i), tuple(range(1 + i % 2)), PARAMS) for i in range(6)]
    core = make_core(engine_config(tiny_llama))
    passes = record_passes(core, monkeypatch)
    run(core, requests)
    assert [len(spans) for spans in passes[:3]] == [3, 3, 9]  # shared prompts, own prompts, the first round


def test_very_uneven_prompts_are_not_padded_to_the_longest(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.embedded.prefill.MAX_PADDED_TOKENS", 300)
    requests = [
        GroupRequest(str(i), random_prompt(length, seed=i), (i,), PARAMS)
        for i, length in enumerate([200, 3, 4, 5, 6, 150, 150])
    ]
    core = make_core(engine_config(tiny_llama))
    passes = record_passes(core, monkeypatch)
    samples = run(core, requests)
    assert [[span.count for span in spans] for spans in passes[:3]] == [[200], [3, 4, 5, 6], [150, 150]]
    assert samples["5", 0].token_ids == run(make_core(engine_config(tiny_llama)), [requests[5]])["5", 0].token_ids


def test_a_prompt_by_hand_and_a_prompt_in_a_request_give_the_same_distribution(tiny_llama: Path) -> None:
    core, prompt = make_core(engine_config(tiny_llama)), random_prompt(30, seed=4)
    core.cache.reserve((1, 30), (0, 0))
    logprobs = prefill(core, core.cache.own, 0, prompt)[0].log_softmax(-1)
    sample = run(make_core(engine_config(tiny_llama)), [GroupRequest("g", prompt, (3,), PARAMS)])["g", 0]
    assert sample.logprobs[0] == pytest.approx(float(logprobs[sample.token_ids[0]]), abs=1e-5)
