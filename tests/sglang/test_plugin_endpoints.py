"""The plug-in's own answers: checksums by side, and what the canary makes of a response and the target's reading."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Match
from starlette.testclient import TestClient

from rollout.sglang_engine.plugin import canary
from rollout.sglang_engine.plugin.canary import Asked, Means, NoCanary, judged
from rollout.sglang_engine.plugin.endpoints import Paths, of_side, routes
from rollout.sglang_engine.plugin.state import State
from slime_spec.speculation.accepted_mean import AcceptedMean

SUMS = {"lm_head.weight": "aa", "draft.fc.weight": "bb", "model.norm.weight": "cc", "draft_step_1.fc.weight": "dd"}
RANK = {"checksums": SUMS, "per_gpu_checksum": "all of them", "parallelism_info": {"tp_rank": 0}}


def test_checksums_are_told_apart_by_side_and_summed_up_anew() -> None:
    target, draft = of_side(RANK, "target"), of_side(RANK, "draft")
    assert target["checksums"] == {"lm_head.weight": "aa", "model.norm.weight": "cc"}
    assert draft["checksums"] == {"draft.fc.weight": "bb", "draft_step_1.fc.weight": "dd"}
    assert draft["per_gpu_checksum"] == hashlib.sha256(b"draft.fc.weightbbdraft_step_1.fc.weightdd").hexdigest()
    assert target["parallelism_info"] == {"tp_rank": 0}
    assert of_side(RANK, "all") == RANK


def test_the_canary_has_a_prompt_of_its_own_that_every_vocabulary_has() -> None:
    asked = Asked.read({}, vocab_size=10)
    assert len(asked.input_ids) == 16
    assert set(asked.input_ids) <= set(range(10))
    assert Asked.read({"input_ids": [4, 5], "max_new_tokens": 8}, 10).input_ids == [4, 5]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input_ids": []}, "token ids from 0 to 9"),
        ({"input_ids": [3, 10]}, "token ids from 0 to 9"),
        ({"input_ids": [True]}, "token ids from 0 to 9"),
        ({"max_new_tokens": 1}, "at least 2"),
        ({"tolerance": float("nan")}, "from 0 up"),
        ({"temperature": 1.0}, "unknown: temperature"),
    ],
)
def test_what_no_canary_can_be_is_refused_in_words(body: dict[str, Any], says: str) -> None:
    with pytest.raises(NoCanary, match=says):
        Asked.read(body, vocab_size=10)


def drafted(tokens: list[int], correct: int, rounds: int = 2) -> dict[str, Any]:
    counters = {
        "spec_verify_ct": rounds,
        "spec_num_correct_drafts": correct,
        "spec_num_proposed_drafts": 3 * rounds,
        "completion_tokens": len(tokens),
        "weight_version": "7",
        "output_token_logprobs": [(-0.5, token, None) for token in tokens],
    }
    return {"output_ids": tokens, "meta_info": counters}


def read(tokens: list[int], best: list[tuple[float, int]], own: list[float]) -> dict[str, Any]:
    """The target's reading: first the last token of the prompt, whose own logprob nobody computes."""
    rows = [(None, 99, None), *((logprob, token, None) for logprob, token in zip(own, tokens, strict=True))]
    return {
        "output_ids": [0],
        "meta_info": {
            "input_token_logprobs": rows,
            "input_top_logprobs": [None, *([(logprob, token, None)] for logprob, token in best)],
        },
    }


def test_a_response_of_the_targets_best_tokens_is_greedy() -> None:
    reading = read([5, 6, 7], [(-0.5, 5), (-0.5, 6), (-0.5, 7)], [-0.5, -0.5, -0.5])
    verdict = judged(drafted([5, 6, 7], correct=3), reading, 0.25, AcceptedMean(0.5))
    assert (verdict.is_greedy, verdict.num_differing, verdict.largest_regret) == (True, 0, 0.0)
    assert (verdict.num_rounds, verdict.num_correct, verdict.accepted_per_round) == (2, 3, 1.5)
    assert verdict.weight_version == "7"


def test_nearly_equal_tokens_may_change_places_and_others_may_not() -> None:
    near = read([5, 6], [(-0.5, 5), (-0.4, 8)], [-0.5, -0.5])
    far = read([5, 6], [(-0.5, 5), (-0.4, 8)], [-0.5, -3.0])
    verdicts = [judged(drafted([5, 6], 3), reading, 0.25, AcceptedMean(0.5)) for reading in (near, far)]
    assert [verdict.is_greedy for verdict in verdicts] == [True, False]
    assert [verdict.num_differing for verdict in verdicts] == [1, 1]
    assert [verdict.largest_regret for verdict in verdicts] == pytest.approx([0.1, 2.6])
    assert verdicts[1].largest_logprob_difference == 2.5


def test_drafts_that_are_refused_as_never_before_are_told_by_the_canaries_before() -> None:
    mean = AcceptedMean(0.5)
    reading = read([5, 6], [(-0.5, 5), (-0.5, 6)], [-0.5, -0.5])
    good, lost = (judged(drafted([5, 6], correct), reading, 0.25, mean) for correct in (4, 1))
    assert (good.is_accepted_as_before, good.mean_accepted_per_round) == (True, 2.0)
    assert (lost.is_accepted_as_before, lost.mean_accepted_per_round) == (False, 2.0)
    assert lost.is_greedy, "a lost draft costs time and changes no token"


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_logprobs_that_are_no_numbers_are_no_verdict(broken: float, place: int) -> None:
    """max([0.0, nan]) is 0.0, and a NaN below any bound: neither may pass for greedy."""
    own = [-0.5, -0.5]
    own[place] = broken
    mean = AcceptedMean(0.5)
    with pytest.raises(NoCanary, match="no finite numbers"):
        judged(drafted([5, 6], 4), read([5, 6], [(-0.5, 5), (-0.5, 6)], own), 0.25, mean)
    assert mean.mean is None


def test_canaries_compare_with_those_that_asked_the_same() -> None:
    means = Means(max_means=2)
    fixed, longer, other = (
        Asked.read(body, 10) for body in ({}, {"max_new_tokens": 64}, {"input_ids": [4, 5], "tolerance": 1.0})
    )
    means.of(fixed).mean = 2.0
    assert means.of(Asked.read({"tolerance": 0.5}, 10)).mean == 2.0
    assert means.of(longer).mean is None
    means.of(fixed)
    assert means.of(other).mean is None  # the third: the longer one was asked longest ago
    means.of(longer).mean = 1.0
    assert (means.of(longer).mean, means.of(fixed).mean) == (1.0, None)


def test_a_reading_that_is_not_whole_is_no_verdict() -> None:
    short = read([5], [(-0.5, 5)], [-0.5])
    with pytest.raises(NoCanary, match="lack what is compared"):
        judged(drafted([5, 6, 7], 3), short, 0.25, AcceptedMean(0.5))


# The paths, on a server of starlette's as SGLang's is

MESSAGES = SimpleNamespace(
    UpdateWeightsFromTensorReqInput=SimpleNamespace,
    CheckWeightsReqInput=SimpleNamespace,
    GenerateReqInput=SimpleNamespace,
)
KEY = "of the administrator"
Answer = tuple[int, dict[str, Any]]


class Manager:
    """A tokenizer manager before schedulers that load everything but the folder /bad."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.is_pause = False
        self.model_config = SimpleNamespace(vocab_size=10)

    async def update_weights_from_tensor(self, obj: Any, request: None) -> tuple[bool, str]:
        self.asked.append(obj)
        assert obj.load_format != "slime_spec.draft=/replicas", "dp_size must be 1"
        return obj.load_format != "slime_spec.draft=/bad", "told by the schedulers"

    async def check_weights(self, obj: Any, request: None) -> tuple[bool, str, list[Any], None]:
        return True, "Success.", [RANK], None


def for_administrators(function: Any) -> Any:
    """Marks a function as SGLang does; ``Keys`` looks for the mark where SGLang's middleware does."""
    function._auth_level = "admin"
    return function


class Keys(BaseHTTPMiddleware):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        found = [route.matches(request.scope) for route in request.app.router.routes]
        levels = [getattr(child["endpoint"], "_auth_level", None) for match, child in found if match == Match.FULL]
        if levels == ["admin"] and request.headers.get("authorization") != f"Bearer {KEY}":
            return Response(status_code=401)
        return await call_next(request)


class Served:
    def __init__(self, **state: Any) -> None:
        self.manager = Manager()
        self.paths = Paths(State(**state or {"active": {"draft_push": "of these stand-ins"}}), lambda: MESSAGES)
        app = Starlette()
        app.add_middleware(Keys)
        app.router.routes += routes(self.manager, self.paths, for_administrators)
        self._client = TestClient(app)

    def post(self, path: str, body: Any = None, key: str = KEY) -> Any:
        return self._client.post(f"/slime_spec/{path}", json=body, headers={"authorization": f"Bearer {key}"})

    def refusal(self, path: str, body: Any) -> str:
        response = self.post(path, body)
        told = response.json()
        assert (response.status_code, told.pop("success"), list(told)) == (400, False, ["message"])
        message: str = told["message"]
        return message


@pytest.mark.parametrize("path", ["draft_weights", "checksums", "canary"])
def test_every_path_takes_the_administrators_key(path: str) -> None:
    served = Served()
    assert served.post(path, {}, key="another").status_code == 401
    assert served.post(path, {"unknown": 1}).status_code != 401


def test_a_push_is_sglangs_own_request_with_a_mark() -> None:
    served = Served()
    answer = served.post("draft_weights", {"path": "/new", "draft_version": 7})
    assert (answer.status_code, answer.json()) == (
        200,
        {"success": True, "message": "told by the schedulers", "draft_version": "7"},
    )
    served.post("draft_weights", {"serialized_named_tensors": ["AA", "BB"], "flush_cache": False})
    assert [vars(each) for each in served.manager.asked] == [
        {"serialized_named_tensors": [], "load_format": "slime_spec.draft=/new", "flush_cache": True},
        {"serialized_named_tensors": ["AA", "BB"], "load_format": "slime_spec.draft", "flush_cache": False},
    ]


def test_the_version_shown_is_the_last_pushs() -> None:
    served = Served()
    versions = []
    for body in ({"draft_version": 7}, {}, {"draft_version": "8"}):
        versions.append(served.post("draft_weights", {"path": "/new", **body}).json()["draft_version"])
    assert versions == ["7", None, "8"]
    served.refusal("draft_weights", {"path": "/bad", "draft_version": 9})
    assert served.paths.shown == {"draft_version": "8"}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("draft_weights", {"path": "/bad"}, "told by the schedulers"),
        ("draft_weights", {"path": "/replicas"}, "dp_size must be 1"),
        ("draft_weights", {}, "either path"),
        ("draft_weights", {"path": "/new", "serialized_named_tensors": ["AA"]}, "either path"),
        ("draft_weights", {"path": ""}, "path must be the folder"),
        ("draft_weights", {"serialized_named_tensors": [1]}, "list of base64 texts"),
        ("draft_weights", {"folder": "/new"}, "unknown: folder; known are draft_version, flush_cache, path"),
        ("draft_weights", ["/new"], "must be a JSON object"),
        ("checksums", {"selector": "both"}, "selector must be one of target, draft, all"),
        ("canary", {"temperature": 1.0}, "unknown: temperature"),
    ],
)
def test_what_cannot_be_meant_is_answered_with_400_and_words(path: str, body: Any, says: str) -> None:
    assert says in Served().refusal(path, body)


def test_a_body_that_is_no_json_is_refused_and_none_is_an_empty_object() -> None:
    served = Served()
    assert (
        served._client.post(
            "/slime_spec/checksums", content=b"{", headers={"authorization": f"Bearer {KEY}"}
        ).status_code
        == 400
    )
    told = served.post("checksums")
    assert (told.status_code, told.json()["ranks"]) == (200, [RANK])


def test_a_push_to_a_server_without_that_feature_says_why() -> None:
    off = Served(inactive={"draft_push": "turned off by SLIME_SPEC_PLUGIN_OFF"})
    says = "draft_push is not active: turned off by SLIME_SPEC_PLUGIN_OFF"
    assert off.refusal("draft_weights", {"path": "/new"}) == says
    assert not off.manager.asked


def test_a_canary_of_a_paused_server_is_refused_rather_than_kept_waiting() -> None:
    served = Served()
    served.manager.is_pause = True
    assert "generation is paused" in served.refusal("canary", {})


class Drafting(Manager):
    """A manager whose server drafts token after token of 1, 2, 3, … and accepts ``correct`` drafts."""

    correct = 4

    async def generate_request(self, obj: Any, request: None) -> Any:
        self.asked.append(obj)
        tokens = list(range(1, obj.sampling_params["max_new_tokens"] + 1))
        if obj.sampling_params["max_new_tokens"] == 1:  # the reading of prompt and response
            response = obj.input_ids[obj.logprob_start_len + 1 :]
            answer = read(response, [(-0.5, token) for token in response], [-0.5] * len(response))
        else:
            answer = drafted(tokens, self.correct)
        answer["meta_info"]["finish_reason"] = {"type": "length"}
        yield answer


def test_a_canary_generates_and_has_the_whole_response_read() -> None:
    manager, means = Drafting(), Means()
    body = {"input_ids": [7, 8, 9], "max_new_tokens": 4}
    verdict = asyncio.run(canary.run(manager, Asked.read(body, 10), means, lambda: MESSAGES))
    generated, reading = manager.asked
    assert (generated.input_ids, reading.input_ids) == ([7, 8, 9], [7, 8, 9, 1, 2, 3, 4])
    assert (generated.extra_key == generated.rid) is True
    assert generated.extra_key != reading.extra_key
    assert (verdict.is_greedy, verdict.num_tokens, verdict.mean_accepted_per_round) == (True, 4, 2.0)
    manager.correct = 1
    lost = asyncio.run(canary.run(manager, Asked.read(body, 10), means, lambda: MESSAGES))
    other = asyncio.run(canary.run(manager, Asked.read({**body, "max_new_tokens": 5}, 10), means, lambda: MESSAGES))
    assert (lost.is_accepted_as_before, other.is_accepted_as_before) == (False, True)
