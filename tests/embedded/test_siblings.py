"""A sample drafts from what its group's samples said on another engine while it runs, and stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rollout.coordinator import Call, Coordinator
from rollout.embedded.drafters.history import HistoryDrafter
from rollout.embedded.drafters.history_reference import ReferenceHistory
from rollout.embedded.engine import EmbeddedEngine
from slime_spec.interfaces import Generation
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration
from tests.support.embedded_harness import engine_config, make_core, random_prompt, run

NUM_DRAFTS = 7
PROMPT = random_prompt(9, seed=3)


@dataclass(eq=False)
class Stream:
    """Records a call of generate."""

    engine: int
    generation: Generation
    iterator: object = field(init=False)

    def __post_init__(self) -> None:
        self.iterator = iter(self.generation)


class InTurn:
    """Implements EngineCalls: engine 1 is paused until every sample of engine 0 has come, and what it has to hear."""

    def __init__(self, engines: Sequence[EmbeddedEngine]) -> None:
        self._engines = engines
        self._streams: list[Stream] = []
        self._numbers: dict[int, Stream] = {}
        self.shared: list[tuple[int, int]] = []  # (engine, number of replies)
        engines[1].update_weights(PauseGeneration(0, "in_place"))

    def generate(self, engine: int, request: GroupRequest, number: int) -> Call:
        stream = self._numbers[number] = Stream(engine, self._engines[engine].generate(request))
        self._streams.append(stream)
        return stream

    def abort(self, engine: int, numbers: Sequence[int]) -> None:
        raise AssertionError("nobody aborts")

    def share(self, engine: int, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        for number, heard in replies.items():
            self.shared.append((engine, len(heard)))
            self._numbers[number].generation.learn(heard)

    def watch(self, engine: int, known: bool) -> Call:
        return engine

    def ready(self, calls: list[Call], timeout_s: float) -> Sequence[Call]:
        first = next((stream for stream in self._streams if stream.engine == 0), None)
        if first is not None:
            return [first]
        if self._streams:
            self._engines[1].update_weights(ContinueGeneration(0))
        return self._streams[:1]

    def next_sample(self, stream: Call) -> GeneratedSample | None:
        assert isinstance(stream, Stream)
        sample: GeneratedSample | None = next(stream.iterator, None)  # type: ignore[call-overload]
        if sample is None:
            self._streams.remove(stream)
        return sample

    def serves(self, watch: Call) -> bool:
        return True


def histogram(reference: ReferenceHistory, reply: Sequence[int]) -> list[int]:
    """How many rounds accept how many drafts where the target says ``reply``, whose first token comes without one."""
    counts, num_generated = [0] * (NUM_DRAFTS + 1), 1
    while num_generated < len(reply):
        limit = min(NUM_DRAFTS, len(reply) - num_generated - 1)
        chain = reference.propose(reply[:num_generated], limit)[0] if limit else []
        accepted = 0
        while accepted < len(chain) and chain[accepted] == reply[num_generated + accepted]:
            accepted += 1
        counts[accepted] += 1
        num_generated += accepted + 1
    while not counts[-1]:
        counts.pop()
    return counts


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_a_sample_drafts_from_what_finished_on_another_engine_as_the_reference_does(
    tiny_llama: Path, temperature: float
) -> None:
    params = SamplingParams(max_new_tokens=41, temperature=temperature)
    asked = GroupRequest("g", PROMPT, (21, 22, 23), params)
    plain = run(make_core(engine_config(tiny_llama)), [asked])
    config = engine_config(tiny_llama, "HISTORY", num_draft_tokens=NUM_DRAFTS + 1, max_running_requests=1)
    num_accepted = {}
    for shares in (False, True):
        engines = [EmbeddedEngine(config, index, RayObjectStoreTransport()) for index in range(2)]
        for engine in engines:
            engine.start()
        calls = InTurn(engines)
        coordinator = Coordinator(calls, 2, samples_per_engine=4, least_part=1, shares_replies=shares)
        samples = {each.sample_index: each for each in coordinator.generate([asked])}
        kept = [engine._core.drafter for engine in engines]
        for engine in engines:
            engine.stop()
        assert {("g", index): each.token_ids for index, each in samples.items()} == {
            key: each.token_ids for key, each in plain.items()
        }
        elsewhere = sorted(index for index, each in samples.items() if each.engine == 0)
        (late,) = (each for each in samples.values() if each.engine == 1)
        assert calls.shared == ([(1, 1), (1, 1)] if shares else [])
        reference = ReferenceHistory(PROMPT)
        for index in elsewhere if shares else []:
            reference.finished(plain["g", index].token_ids)
        assert list(late.spec.histogram) == histogram(reference, plain["g", late.sample_index].token_ids)
        num_accepted[shares] = late.spec.num_correct
        assert all(isinstance(each, HistoryDrafter) and not each._prompts and not each._replies for each in kept)
    assert num_accepted[True] > num_accepted[False]


def test_replies_for_a_group_that_has_ended_leave_nothing_behind(tiny_llama: Path) -> None:
    engine = EmbeddedEngine(engine_config(tiny_llama, "HISTORY"), 0, RayObjectStoreTransport())
    engine.start()
    generation = engine.generate(GroupRequest("g", PROMPT, (1, 2), SamplingParams(max_new_tokens=4)))
    list(generation)
    generation.learn([EarlierReply((1, 2, 3), 0, 5)])
    engine.ping()
    drafter = engine._core.drafter
    engine.stop()
    assert isinstance(drafter, HistoryDrafter)
    assert not drafter._prompts


def test_an_engine_that_drafts_from_no_texts_takes_replies_and_goes_on(tiny_llama: Path) -> None:
    engine = EmbeddedEngine(engine_config(tiny_llama, "LOOKUP"), 0, RayObjectStoreTransport())
    engine.start()
    request = GroupRequest("g", PROMPT, (1, 2), SamplingParams(max_new_tokens=30))
    generation = engine.generate(request)
    generation.learn([EarlierReply((1, 2, 3), 0, 5)])
    samples = {("g", each.sample_index): each.token_ids for each in generation}
    engine.stop()
    plain = run(make_core(engine_config(tiny_llama)), [replace(request)])
    assert samples == {key: each.token_ids for key, each in plain.items()}
