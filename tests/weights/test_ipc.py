"""Engines in other processes map the trainer's memory, copy a bucket while it is theirs, and outlive either end."""

import gc
import os
from collections.abc import Generator
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from slime_spec.errors import PushError
from slime_spec.transports.choice import IPC
from slime_spec.transports.ipc import IpcTransport, Lent
from slime_spec.weights.checksums import combined_checksum, tensor_checksum
from slime_spec.weights.messages import CancelPush, PushBucket, PushMessage, PushReply, VerifyPush
from slime_spec.weights.run import bucket_of, push_messages, run_push
from tests.support.push_engines import NEW, SHAPES, Engine, remote_engines, to_all

BUCKET_BYTES = 24  # one tensor each


def messages(version: int, transport: IpcTransport, weights=NEW) -> Generator[PushMessage, None, None]:
    return push_messages(weights, version, "target", BUCKET_BYTES, transport)


def checksum(weights) -> str:
    return combined_checksum((name, tensor_checksum(tensor)) for name, tensor in weights.items())


def num_slots_held() -> int:
    """How many memory files of pushes this process holds, without those that a traceback of an earlier test held."""
    gc.collect()
    names = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(link))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sum("slime_spec-push" in name for name in names)


def test_two_processes_map_each_bucket_copy_it_and_leave_nothing_behind() -> None:
    """Both read back what they compute with after the memory has held other buckets and has been freed."""
    transport, held = IpcTransport(), num_slots_held()
    with remote_engines(IPC, 2) as engines:
        for version in (1, 2, 3):
            weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
            report = run_push(messages(version, transport, weights), to_all(engines), verify=True)
            assert report.verified
            assert num_slots_held() == held
            answers = [engine.update_weights(VerifyPush(version)) for engine in engines]
            assert answers == [PushReply(index, version, checksum(weights)) for index in range(2)]


def test_a_bucket_takes_the_slot_of_the_bucket_before_the_last() -> None:
    transport, engine = IpcTransport(), IpcTransport()
    sizes = (5, 5, 3, 400)
    buckets = []
    for index, size in enumerate(sizes):
        bucket = bucket_of([("x", torch.full((size,), float(index)))], 1, index, transport)
        (tensor,) = engine.receive(bucket)
        assert tensor.tolist() == [float(index)] * size
        buckets.append(bucket)
    slots = [bucket.handle[0].slot for bucket in buckets]
    assert slots[0] == slots[2]
    assert len(set(slots)) == 3, "the fourth bucket needs more room than the second had"
    transport.close()
    engine.close()


def num_mapped() -> int:
    """How many memory files of pushes are mapped here as an engine maps them, to read."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("slime_spec-push" in line and " r--s " in line for line in lines)


def test_an_engine_lets_go_of_the_trainers_memory_before_it_answers_the_last_bucket() -> None:
    """The trainer frees it then; what is still mapped elsewhere a GPU keeps, through the rollouts that follow."""
    engine, transport = Engine(transport=IpcTransport()), IpcTransport()
    before, seen = num_mapped(), []
    sent = messages(3, transport)
    for message in islice(sent, 1 + len(SHAPES)):
        engine.update_weights(message)
        seen.append(num_mapped() - before)
    assert seen == [0, 1, 0]
    sent.close()


def test_bytes_that_change_in_the_slot_are_found() -> None:
    engine, transport = Engine(transport=IpcTransport()), IpcTransport()
    sent = messages(7, transport)
    engine.update_weights(next(sent))
    bucket = next(sent)
    slot = transport._slots[transport._turn]
    slot.memory[3] ^= 1
    with pytest.raises(PushError, match="a arrived damaged"):
        engine.update_weights(bucket)
    sent.close()
    assert engine.versions["target"] == 0


def test_an_engine_that_dies_in_a_push_leaves_the_others_and_the_trainer_able_to_push() -> None:
    transport, held = IpcTransport(), num_slots_held()
    with remote_engines(IPC, 2) as (sound, dying):

        def broadcast(message: PushMessage) -> list[PushReply]:
            if isinstance(message, PushBucket) and message.index == 1:
                dying.kill()
            return to_all([sound, dying])(message)

        with pytest.raises(PushError, match="push of version 1 failed"):
            run_push(given_up := messages(1, transport), broadcast)
        assert num_slots_held() > held
        given_up.close()
        assert num_slots_held() == held
        assert sound.update_weights(VerifyPush(1)).version == 0
        assert run_push(messages(2, transport), to_all([sound]), verify=True).verified


def publish(connection: Connection) -> None:
    """Run in a trainer's process: send the messages of a push up to its first bucket, and live until killed."""
    sent = messages(1, IpcTransport())
    connection.send((next(sent), next(sent)))
    connection.recv()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_trainer_that_is_killed_in_a_push_leaves_the_engine_on_its_version(mapped: bool) -> None:
    """Memory that an engine has mapped stays readable; memory that it has not is out of reach, in words."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    trainer = context.Process(target=publish, args=(theirs,), daemon=True)
    trainer.start()
    begin, bucket = ours.recv()
    engine = Engine(transport=IpcTransport())
    engine.update_weights(begin)
    if mapped:
        engine.update_weights(bucket)
    trainer.kill()
    trainer.join()
    if not mapped:
        with pytest.raises(PushError, match="bucket 0 is out of reach"):
            engine.update_weights(bucket)
    engine.update_weights(CancelPush(1))
    assert engine.versions["target"] == 0
    run_push(messages(2, IpcTransport()), lambda message: [engine.update_weights(message)], verify=True)
    assert engine.versions["target"] == 2


def test_a_bucket_of_another_machine_is_refused_and_of_several_ranks_that_here_is_taken() -> None:
    transport, engine = IpcTransport(), IpcTransport()
    bucket = bucket_of([("x", torch.ones(3))], 1, 0, transport)
    (lent,) = bucket.handle
    elsewhere = Lent(replace(lent.slot, machine="another"), lent.starts)
    with pytest.raises(PushError, match="no rank of the trainer is where this engine is"):
        engine.receive(replace(bucket, handle=(elsewhere,)))
    (tensor,) = engine.receive(replace(bucket, handle=(elsewhere, lent)))
    assert tensor.tolist() == [1.0] * 3
    transport.close()
