"""The tokens that top-k, top-p and min-p kept are returned as slime and miles replay them in training."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.embedded.draft import NO_DRAFT
from rollout.embedded.logprobs import MOST_KEPT, Beside, LogprobRecord, Wanted
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification.ranking import RankingVerifier
from rollout.embedded.verification.verifier import Verified, VerifyRow
from slime_spec.config.tree import Config
from slime_spec.errors import GenerationError
from slime_spec.types import SamplingParams
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served

PROMPT = list(b"the cat sat on the mat, the cat sat on the cat")
REPLAY = {"return_top_p_token_ids": True}
# A bias makes a few tokens likely, so that a nucleus has some tokens and not all.
LIKELY = {str(token): 6.0 + token % 7 for token in range(97, 110)}
FILTERS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.6, "temperature": 1.3, "presence_penalty": 0.5},
    {"top_p": 0.95, "top_k": 5},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.97, "min_p": 0.05},
]


@pytest.fixture(scope="module", params=["NONE", "LOOKUP"])
def either(request: pytest.FixtureRequest, policy: Path) -> Iterator[Served]:
    """A server without drafts and one with them."""
    with served(engine_config(policy, request.param)) as running:
        yield running


@pytest.fixture(scope="module")
def model(config: Config) -> Any:
    return AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float64)


def kept_slowly(logits: list[float], params: dict[str, Any]) -> dict[int, float]:
    """Each kept token's probability before the filters, by plain Python: top-k, then top-p of the rest, then min-p."""
    temperature = params.get("temperature", 1.0)
    largest = max(logits)
    weights = {token: math.exp((logit - largest) / temperature) for token, logit in enumerate(logits)}
    total = sum(weights.values())
    ranked = sorted(((weight / total, token) for token, weight in weights.items()), reverse=True)
    ranked = ranked[: params["top_k"]] if "top_k" in params else ranked
    goal = params.get("top_p", 1.0) * sum(p for p, _ in ranked)
    kept, mass = [], 0.0
    for p, token in ranked:
        if mass >= goal:
            break
        kept.append((p, token))
        mass += p
    return {token: p for p, token in kept if p >= params.get("min_p", 0.0) * ranked[0][0]}


def decoded(info: dict[str, Any], name: str) -> list[int]:
    """As slime decodes it."""
    return torch.frombuffer(bytearray(base64.b64decode(info[name])), dtype=torch.int32).tolist()


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_kept_tokens_are_those_that_the_filters_keep_and_logprobs_are_among_them(
    either: Served, model: Any, params: dict[str, Any]
) -> None:
    sampling = {"max_new_tokens": 60, "ignore_eos": True, "sampling_seed": 5, "logit_bias": LIKELY, **params}
    body = {"input_ids": PROMPT, "return_logprob": True, "return_sampling_mask": True}
    answer = either.generate(**body, sampling_params={**sampling, "custom_params": REPLAY})
    plain = either.generate(input_ids=PROMPT, return_logprob=True, sampling_params=sampling)
    info, token_ids = answer["meta_info"], answer["output_ids"]
    assert token_ids == plain["output_ids"]
    flat, offsets = decoded(info, "top_p_token_ids"), decoded(info, "top_p_token_offsets")
    assert offsets[0] == 0
    assert offsets[-1] == len(flat)
    assert len(offsets) == len(token_ids) + 1
    masks = [flat[start:end] for start, end in pairwise(offsets)]
    assert info["output_token_sampling_mask"] == masks
    assert info["output_token_sampling_mask_length"] == len(token_ids)
    assert any(len(mask) > 1 for mask in masks)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + token_ids])).logits[0][len(PROMPT) - 1 : -1]
    logprobs = [logprob for logprob, _, _ in info["output_token_logprobs"]]
    assert info["output_token_sampling_logprobs"] == logprobs
    seen: set[int] = set()
    for place, (token, mask) in enumerate(zip(token_ids, masks, strict=True)):
        row = logits[place].tolist()
        for biased, bias in LIKELY.items():
            row[int(biased)] += bias
        for each in seen:
            row[each] -= params.get("presence_penalty", 0.0)
        expected = kept_slowly(row, params)
        assert set(mask) == set(expected)
        assert [expected[each] for each in mask] == sorted(expected.values(), reverse=True)
        assert logprobs[place] == pytest.approx(math.log(expected[token] / sum(expected.values())), abs=1e-4)
        seen.add(token)
    assert min(map(len, masks)) < 257


def test_greedy_replies_keep_the_token_itself_and_unfiltered_ones_name_nothing(server: Served) -> None:
    def ask(**params: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": 5, "ignore_eos": True, "custom_params": REPLAY, **params}
        return server.generate(input_ids=PROMPT, sampling_params=sampling, return_logprob=True)

    greedy = ask(temperature=0, top_p=0.9)
    assert decoded(greedy["meta_info"], "top_p_token_ids") == greedy["output_ids"]
    assert [logprob for logprob, _, _ in greedy["meta_info"]["output_token_logprobs"]] == [0.0] * 5
    assert "top_p_token_ids" not in ask(temperature=1)["meta_info"]
    assert "top_p_token_ids" not in ask(top_p=0.9, max_new_tokens=0)["meta_info"]


def test_each_sample_has_its_own_and_a_stream_ends_with_them(server: Served) -> None:
    params = {"max_new_tokens": 9, "n": 3, "sampling_seed": 1, "top_p": 0.8, "custom_params": REPLAY}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
    whole = server.generate(**body)
    ends = {each["index"]: each for each in server.stream(**body) if each["meta_info"]["finish_reason"]}
    for index, answer in enumerate(whole):
        info = ends[index]["meta_info"]
        for name in ("top_p_token_ids", "top_p_token_offsets", "output_token_logprobs"):
            assert info[name] == answer["meta_info"][name]
        assert len(decoded(info, "top_p_token_offsets")) == len(answer["output_ids"]) + 1


def test_a_token_that_a_lossy_verifier_emits_is_among_the_kept(policy: Path) -> None:
    """Token 2 is outside the nucleus; its logprob is among the nucleus and itself."""

    class Bent:
        lossy, takes_unread = True, False

        def __call__(self, logits: torch.Tensor, rows: object) -> list[Verified]:
            return [Verified([2], [float(logits[0].log_softmax(-1)[2])], ())]

    logits = torch.tensor([[2.0, 1.9, -1.0, -3.0]])
    row = VerifyRow(NO_DRAFT, SamplingParams(top_p=0.9), Uniforms(0, 9), (1,), 1, Wanted(kept=True))
    (verified,) = RankingVerifier(Bent(), frozenset())(logits, [row])
    p = logits[0].double().softmax(-1)
    assert list(verified.beside[0].kept) == [0, 1, 2]
    assert verified.beside[0].kept_logprob == pytest.approx(math.log(p[2] / (p[0] + p[1] + p[2])), abs=1e-6)


def test_what_is_kept_has_a_bound() -> None:
    record, most = LogprobRecord(Wanted(kept=True)), range(MOST_KEPT)
    record.add(0, [Beside(kept=most)])
    with pytest.raises(GenerationError, match="lower top_p"):
        record.add(1, [Beside(kept=(1,))])
