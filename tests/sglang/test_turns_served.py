"""Turns of a function of the user's own, asked of a server that answers as SGLang's do."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rollout.sglang_engine.fake import FakeServer, next_token
from slime_spec.agents.function_groups import FunctionGroups
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, CustomConfig
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.request_feed import RequestFeed
from slime_spec.rl.ordered_rollouts import OrderedRollouts
from slime_spec.types import GeneratedSample, GroupRequest, Prompt
from tests.sglang.conftest import Connect
from tests.support.agents_harness import START, by_variety

PROMPT = (5, 6, 7)
RESULT = [60, 61]


class ThreadedEngine:
    """Implements Engines.generate by one engine, a thread for each request."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        assert isinstance(requests, RequestFeed)
        arrived: queue.SimpleQueue[GeneratedSample] = queue.SimpleQueue()

        def run(request: GroupRequest) -> None:
            for sample in self._engine.generate(request):
                arrived.put(sample)

        num_waiting = 0
        while requests.has_more or num_waiting:
            for request in requests.taken():
                threading.Thread(target=run, args=(request,)).start()
                num_waiting += len(request.seeds)
            try:
                yield arrived.get(timeout=0.01)
                num_waiting -= 1
            except queue.Empty:
                pass


async def with_a_result(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await client.turn(sample, {"max_new_tokens": 20, "stop": ["</tool>"]})
    sample.append_response_tokens(tokens=RESULT, trainable=False)
    await client.turn(sample, {"max_new_tokens": 10})
    return sample


def continued(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake server says after these tokens."""
    ids = list(token_ids)
    for _ in range(num_tokens):
        ids.append(next_token(ids[-1], len(ids)))
    return ids[len(token_ids) :]


def test_a_server_gets_every_token_of_the_turns_before_and_its_counters_add_up(
    connect: Connect, config: Config
) -> None:
    on_fake = connect(FakeServer())
    sizes = replace(config.rollout, batch_size=1, n_samples_per_prompt=2, max_context_len=200, max_response_len=32)
    chosen = replace(config, rollout=replace(sizes, max_prompt_len=64), custom=CustomConfig(generate="mine:f"))
    tokenizer = Tokenizer.load(config.model.hf_checkpoint)
    groups = FunctionGroups(chosen, with_a_result, tokenizer)
    engines: Any = ThreadedEngine(on_fake.engine)

    def take(num: int, start: int) -> list[Prompt]:
        return [Prompt(start + i, "task", "?", PROMPT, "x") for i in range(num)]

    source = OrderedRollouts(chosen, engines, take, by_variety, groups)
    try:
        rollout = source.rollout(START, lambda *_: None)
    finally:
        source.close()
    first = continued(PROMPT, 20)
    second = continued([*PROMPT, *first, *RESULT], 10)
    for sample in rollout.samples:
        assert sample.response.token_ids == (*first, *RESULT, *second)
        expected = [*(-0.5 - token / 100 for token in first), 0.0, 0.0, *(-0.5 - token / 100 for token in second)]
        assert list(sample.response.logprobs) == expected
        # 19 and 9 tokens after the prefills', of rounds that accept two of three drafts each.
        assert (sample.response.spec.num_rounds, sample.response.spec.num_correct) == (7 + 3, 2 * 10)
    assert rollout_metrics(rollout.samples)["rollout/spec_accept_length"] == (20 + 10) / 10
    told = on_fake.server.told("/generate")
    asked = sorted((body["input_ids"], body["sampling_params"]["sampling_seed"]) for body in told)
    assert [ids for ids, _ in asked] == [list(PROMPT)] * 2 + [[*PROMPT, *first, *RESULT]] * 2
    assert len({seed for _, seed in asked}) == 4
    stops = [body["sampling_params"].get("stop") for body in told if body["input_ids"] == list(PROMPT)]
    assert stops == [["</tool>"]] * 2
