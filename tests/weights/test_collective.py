"""A push by broadcast: every engine takes every bucket or none, and an end that is gone holds up nobody for long."""

from collections.abc import Generator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch

from slime_spec.errors import PushError
from slime_spec.transports.choice import COLLECTIVE
from slime_spec.transports.collective import CollectiveTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksum
from slime_spec.weights.messages import (
    BeginPush,
    CancelPush,
    CommitPush,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReply,
    VerifyPush,
)
from slime_spec.weights.run import push_messages, run_push
from tests.support.push_engines import NEW, OLD, SHAPES, Engine, remote_engines, to_all

BUCKET_BYTES = 24  # one tensor each


def messages(
    version: int, num_engines: int, transport: CollectiveTransport, weights=NEW
) -> Generator[PushMessage, None, None]:
    return push_messages(weights, version, "target", BUCKET_BYTES, transport, num_engines)


def engines_here(count: int) -> list[Engine]:
    return [Engine(transport=CollectiveTransport(), index=index) for index in range(count)]


def test_engines_in_other_processes_take_every_broadcast() -> None:
    transport = CollectiveTransport()
    with remote_engines(COLLECTIVE, 2) as engines:
        for version in (1, 2, 3):
            weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
            assert run_push(messages(version, 2, transport, weights), to_all(engines), verify=True).verified
            sums = combined_checksum((name, tensor_checksum(tensor)) for name, tensor in weights.items())
            answers = [engine.update_weights(VerifyPush(version)) for engine in engines]
            assert answers == [PushReply(index, version, sums) for index in range(2)]


@pytest.mark.parametrize("when", ["before the engine has it", "after the engine has it"])
@pytest.mark.parametrize("error", [PushError("refused"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("phase", [BeginPush, PushBucket, PreparePush, CommitPush], ids=lambda phase: phase.__name__)
def test_every_engine_is_cancelled_and_takes_the_next_push_whatever_is_raised(
    phase: type, error: BaseException, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine of three that does not come to a broadcast holds the others up until they give up."""
    engines, transport, raised = engines_here(3), CollectiveTransport(), 0

    def strike(message: PushMessage, index: int) -> BaseException | None:
        nonlocal raised
        if not isinstance(message, phase) or index != 1 or raised:
            return None
        raised += 1
        return error

    hooks = {"before" if when.startswith("before") else "after": strike}
    with monkeypatch.context() as patched:
        if phase is PushBucket and "before" in hooks:
            patched.setattr("slime_spec.transports.collective.MEET_TIMEOUT", timedelta(seconds=1))
        with pytest.raises(BaseException) as caught:
            run_push(messages(7, 3, transport), to_all(engines, **hooks))
    assert error in (caught.value, caught.value.__cause__)
    for engine in engines:
        assert engine.heard[-1] is CancelPush
        if phase is not CommitPush:
            assert engine.versions["target"] == 0
            assert engine.tensors["target"] is OLD
    assert run_push(messages(8, 3, transport), to_all(engines), verify=True).verified
    assert [engine.versions["target"] for engine in engines] == [8, 8, 8]


def test_an_engine_whose_process_dies_is_noticed_by_the_others_at_once() -> None:
    transport = CollectiveTransport()
    with remote_engines(COLLECTIVE, 3) as (dying, *sound):

        def broadcast(message: PushMessage) -> list[PushReply]:
            if isinstance(message, PushBucket) and message.index == 1:
                dying.kill()
            return to_all([dying, *sound])(message)

        with pytest.raises(PushError, match="push of version 1 failed"):
            run_push(given_up := messages(1, 3, transport), broadcast)
        given_up.close()
        assert [engine.update_weights(VerifyPush(1)).version for engine in sound] == [0, 0]
        with remote_engines(COLLECTIVE, 1) as (new,):
            assert run_push(messages(2, 3, transport), to_all([new, *sound]), verify=True).verified


def publish(connection: Connection, num_engines: int) -> None:
    """Run in a trainer's process: send the messages of a push up to its first bucket, and live until killed."""
    sent = messages(1, num_engines, CollectiveTransport())
    connection.send((next(sent), next(sent)))
    connection.recv()


def test_a_trainer_that_is_killed_in_a_push_leaves_the_engines_on_their_version() -> None:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    trainer = context.Process(target=publish, args=(theirs, 2), daemon=True)
    trainer.start()
    begin, bucket = ours.recv()
    engines = engines_here(2)
    to_all(engines)(begin)
    to_all(engines)(bucket)
    trainer.kill()
    trainer.join()
    with pytest.raises(PushError, match="bucket 0 did not come"):
        to_all(engines)(bucket)
    to_all(engines)(CancelPush(1))
    assert [engine.versions["target"] for engine in engines] == [0, 0]
    assert run_push(messages(2, 2, CollectiveTransport()), to_all(engines), verify=True).verified
