"""Whom a push reaches: groups of servers that differ are not the same group, and a repeated push is kept once."""

from __future__ import annotations

import pytest
import torch

from slime_spec.errors import PushError
from slime_spec.transports.kept import KeptWeights
from slime_spec.transports.server_group import ServerGroupTransport
from slime_spec.weights.messages import BeginPush, Manifest, Opening


def test_a_group_of_servers_is_used_again_by_the_same_servers_alone() -> None:
    transport = ServerGroupTransport(2)
    both, alone = Opening("target", 1, (0, 1)), Opening("target", 1, (0,), is_new=True)
    first = transport.open("127.0.0.1", both)
    assert first.world_size == 5
    assert transport.open("127.0.0.1", Opening("target", 2, (0, 1))).group == first.group
    brought_up = transport.open("127.0.0.1", alone)
    assert (brought_up.world_size, brought_up.group == first.group) == (3, False)
    again = transport.open("127.0.0.1", Opening("target", 3, (0, 1)))
    assert (again.world_size, again.group in (first.group, brought_up.group)) == (5, False)
    other = transport.open("127.0.0.1", Opening("target", 3, (1,)))
    assert other.group not in (first.group, brought_up.group, again.group)
    transport._leave()


def test_a_new_process_in_the_place_of_the_only_one_has_a_group_of_its_own() -> None:
    transport = ServerGroupTransport(1)
    first = transport.open("127.0.0.1", Opening("target", 1, (0,)))
    new = transport.open("127.0.0.1", Opening("target", 1, (0,), is_new=True))
    assert new.group != first.group
    assert transport.open("127.0.0.1", Opening("target", 2, (0,))).group == new.group
    transport._leave()


def fill(kept: KeptWeights, opening: Opening, names: str = "ab", value: float = 1.0) -> str:
    push = kept.begin(opening)
    kept.add([(name, torch.full((2,), value)) for name in names])
    return push


def test_weights_that_are_sent_again_are_kept_once_and_survivors_find_them() -> None:
    kept = KeptWeights()
    first = fill(kept, Opening("target", 1, (0, 1)))
    draft = fill(kept, Opening("draft", 1, (0, 1)), "d")
    for _ in range(3):  # engines that are brought up, and a push that is repeated
        assert fill(kept, Opening("target", 1, (0,), is_new=True)) == first
    second = fill(kept, Opening("target", 2, (0, 1)), value=2.0)
    assert kept.fetch(first, ["a"], None)["a"].tolist() == [1.0, 1.0], "engines have it until the next is committed"
    assert kept.fetch(second, ["a"], None)["a"].tolist() == [2.0, 2.0]
    fill(kept, Opening("target", 3, (0, 1)))
    with pytest.raises(PushError, match="no longer keeps"):
        kept.fetch(first, ["a"], None)
    assert kept.fetch(draft, ["d"], None), "the other side's is its own"


def test_a_push_that_was_given_up_half_way_is_not_kept_for_ever_and_drops_none() -> None:
    kept = KeptWeights()
    whole = fill(kept, Opening("target", 1, (0,)))
    part = fill(kept, Opening("target", 2, (0,)), "a")
    last = fill(kept, Opening("target", 3, (0,)))
    assert kept.fetch(whole, ["b"], None)
    assert kept.fetch(last, ["b"], None)
    with pytest.raises(PushError, match="no longer keeps"):
        kept.fetch(part, ["a"], None)


def test_an_engines_place_is_among_those_that_take_part() -> None:
    manifest = Manifest("target", 1, ())
    assert [BeginPush(manifest).place_of(engine) for engine in (0, 2)] == [0, 2]
    assert [BeginPush(manifest, (), (2, 5)).place_of(engine) for engine in (2, 5)] == [0, 1]
