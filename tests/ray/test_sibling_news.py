"""Siblings: each part of a group hears once of every sample that another part finished."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rollout.actor import EngineWorker
from rollout.fake import FakeEngine
from rollout.siblings import MAX_NEWS, Siblings
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, SamplingParams
from tests.support.fake_config import fake_engine_config


def request(group_id: str = "g") -> GroupRequest:
    return GroupRequest(group_id, (1, 2), (11, 12), SamplingParams())


def sample(index: int, group_id: str = "g") -> GeneratedSample:
    return GeneratedSample(group_id, index, (index, 7), (-1.0, -1.0), "stop", 3, 2)


def reply(index: int) -> EarlierReply:
    return EarlierReply((index, 7), 3, index)


def test_a_part_gets_what_has_finished_with_its_request_and_what_finishes_later_as_news() -> None:
    siblings = Siblings[str]()
    assert siblings.sent("a", request()).earlier == ()
    siblings.finished("a", sample(0))
    assert siblings.news() == {}, "nobody else is in flight"
    assert siblings.sent("b", request()).earlier == (reply(0),)
    assert siblings.sent("c", request("other")).earlier == ()
    siblings.finished("b", sample(1))
    siblings.finished("a", sample(2))
    siblings.finished("c", sample(0, "other"))
    assert siblings.news() == {"a": (reply(1),), "b": (reply(2),)}
    assert siblings.news() == {}
    siblings.ended("b", "g")
    siblings.finished("a", sample(3))
    assert siblings.news() == {}
    again = siblings.sent("d", replace(request(), earlier=(reply(2),)))
    assert again.earlier == (reply(2), reply(0), reply(1), reply(3)), "a resumed sample's request knows some"


def test_news_of_a_group_ends_at_its_bound() -> None:
    siblings = Siblings[str]()
    siblings.sent("a", request())
    siblings.sent("b", request())
    for index in range(MAX_NEWS - 1):
        siblings.finished("a", sample(index))
    assert len(siblings.news()["b"]) == MAX_NEWS - 1
    for index in range(MAX_NEWS - 1, MAX_NEWS + 5):
        siblings.finished("a", sample(index))
    assert siblings.news() == {"b": (reply(MAX_NEWS - 1),)}
    siblings.finished("a", sample(MAX_NEWS + 5))
    assert siblings.news() == {}
    assert len(siblings.sent("c", request()).earlier) == MAX_NEWS + 6, "a request brings all"


@given(st.lists(st.tuples(st.sampled_from(["sent", "finished", "ended", "news"]), st.integers(0, 3)), max_size=40))
def test_parts_hear_what_a_list_of_all_that_happened_says(events: list[tuple[str, int]]) -> None:
    siblings, in_flight = Siblings[int](), set[int]()
    said: list[tuple[int, int]] = []  # (part, sample index)
    heard: defaultdict[int, list[int]] = defaultdict(list)
    for happens, part in events:
        if happens == "sent" and part not in in_flight:
            in_flight.add(part)
            heard[part] = [each.sample_index or 0 for each in siblings.sent(part, request()).earlier]
            assert heard[part] == [index for _, index in said]
        elif happens == "finished" and part in in_flight:
            siblings.finished(part, sample(len(said)))
            said.append((part, len(said)))
            heard[part].append(len(said) - 1)  # its own
        elif happens == "ended" and part in in_flight:
            in_flight.remove(part)
            siblings.ended(part, "g")
        elif happens == "news":
            for each, replies in siblings.news().items():
                assert each in in_flight
                heard[each] += [one.sample_index or 0 for one in replies]
            for each in in_flight:
                known = heard[each]
                assert len(known) == len(set(known))
                assert set(known) >= {index for _, index in said[:MAX_NEWS]}


def test_a_worker_gives_replies_to_the_generation_of_their_number_and_drops_those_of_none(tmp_path: Path) -> None:
    config = fake_engine_config(tmp_path)
    worker, engine = EngineWorker(config, 0), FakeEngine(config, 0, RayObjectStoreTransport())
    engine.start()
    worker._engine = engine
    running = worker.generate(request(), 7)
    next(running)
    generation = worker._generations[7]
    worker.share({7: [reply(4)], 8: [reply(5)]})
    worker.share({7: [reply(6)]})
    assert generation.learned == [reply(4), reply(6)]
    list(running)
    worker.share({7: [reply(1)]})
    assert generation.learned == [reply(4), reply(6)]
