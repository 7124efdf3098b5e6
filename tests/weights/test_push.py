"""A push is all or nothing, and every kind of damage is refused by name."""

from collections.abc import Iterator
from dataclasses import replace
from time import sleep

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.errors import PushError
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksum
from slime_spec.weights.messages import (
    BeginPush,
    CancelPush,
    CommitPush,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReply,
    TensorMeta,
    VerifyPush,
)
from slime_spec.weights.receive import PushReceiver
from slime_spec.weights.run import bucketed, manifest_of, push_messages, run_push

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(1)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


def messages_of(version: int = 1, weights: dict[str, torch.Tensor] = WEIGHTS) -> Iterator[PushMessage]:
    return push_messages(weights, version, "target", 24, InProcessTransport())


class Receiver:
    """An engine's side of a push, without an engine; ``spoil`` changes a bucket's tensors on the way."""

    def __init__(self, spoil=lambda bucket: bucket.handle, expected=SHAPES, refuse="", drift=0.0) -> None:
        self.spoil, self.expected, self.refuse, self.drift = spoil, expected, refuse, drift
        self.version, self.weights, self.seen = 0, {}, []

    def __call__(self, message: PushMessage) -> PushReply:
        self.seen.append(type(message).__name__)
        match message:
            case BeginPush():
                self.receiver, self.staged = PushReceiver(message.manifest, self.expected), {}
            case PushBucket():
                tensors = self.spoil(message)
                self.receiver.take(message, tensors)
                self.staged |= {m.name: tensor.clone() for m, tensor in zip(message.tensors, tensors, strict=True)}
            case PreparePush():
                if self.refuse == "prepare":
                    raise PushError("no room to build")
                self.receiver.finish(message.checksum)
            case CommitPush():
                if self.refuse == "commit":
                    raise RuntimeError("died")
                self.version, self.weights = message.version, self.staged
            case VerifyPush():
                self.weights["c"] += self.drift
                sums = ((name, tensor_checksum(tensor)) for name, tensor in self.weights.items())
                return PushReply(0, self.version, combined_checksum(sums))
            case CancelPush():
                if self.refuse == "cancel":
                    raise RuntimeError("dead")
                self.staged = {}
        return PushReply(0, self.version, self.receiver.checksum if hasattr(self, "receiver") else "")


def test_a_push_brings_every_tensor_and_the_version_to_every_engine():
    engines = [Receiver(), Receiver()]
    report = run_push(messages_of(version=7), lambda message: [engine(message) for engine in engines])
    for engine in engines:
        assert engine.version == 7
        assert all(torch.equal(engine.weights[name], tensor) for name, tensor in WEIGHTS.items())
    assert (report.num_tensors, report.nbytes) == (3, 6 * 4 + 4 * 2 + 4)


@pytest.mark.parametrize("pause_mode", ["none", "in_place"])
def test_the_seconds_of_a_push_hold_what_the_trainer_took_to_begin_but_engines_do_not_pause_for_it(pause_mode):
    engine, began_s = Receiver(), 0.2

    def slow_to_begin() -> Iterator[PushMessage]:
        sleep(began_s)
        assert not engine.seen, "engines pause for the push, not for the trainer's preparation of it"
        yield from messages_of()

    report = run_push(slow_to_begin(), lambda message: [engine(message)], pause_mode=pause_mode)
    assert report.seconds >= began_s
    assert (report.paused_s > 0) == (pause_mode != "none")


def flip_one_bit(bucket: PushBucket) -> list[torch.Tensor]:
    tensors = [tensor.clone() for tensor in bucket.handle]
    if bucket.index == 1:
        tensors[0].view(torch.uint8).reshape(-1)[0] ^= 1
    return tensors


def test_one_flipped_bit_on_one_engine_leaves_every_engine_on_its_version():
    engines = [Receiver(), Receiver(flip_one_bit)]
    with pytest.raises(PushError, match="b arrived damaged"):
        run_push(messages_of(), lambda message: [engine(message) for engine in engines])
    assert [engine.version for engine in engines] == [0, 0]
    assert [engine.weights for engine in engines] == [{}, {}]
    assert all(engine.seen[-1] == "CancelPush" for engine in engines)


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in WEIGHTS.items() if name not in names}


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (without("b"), "lacks b"),
        ({**WEIGHTS, "extra": torch.ones(1)}, "does not know: extra"),
        ({**WEIGHTS, "a": torch.ones(3, 2)}, r"a has shape \(3, 2\)"),
    ],
)
def test_a_manifest_that_does_not_fit_the_model_is_refused_before_any_bucket(weights, reason):
    engine = Receiver()
    with pytest.raises(PushError, match=reason):
        run_push(messages_of(weights=weights), lambda message: [engine(message)])
    assert "PushBucket" not in engine.seen


def test_an_engine_that_cannot_prepare_keeps_every_engine_on_its_version():
    engines = [Receiver(), Receiver(refuse="prepare")]
    with pytest.raises(PushError, match="no room to build"):
        run_push(messages_of(), lambda message: [engine(message) for engine in engines])
    assert [engine.version for engine in engines] == [0, 0]
    assert all(engine.seen[-1] == "CancelPush" for engine in engines)


def test_an_engine_that_dies_at_the_commit_is_told_apart_from_a_refused_push():
    engines = [Receiver(), Receiver(refuse="commit")]
    with pytest.raises(PushError, match="which others may serve already"):
        run_push(messages_of(), lambda message: [engine(message) for engine in engines])
    assert engines[0].version == 1


def test_the_first_error_is_reported_even_where_an_engine_cannot_cancel():
    engines = [Receiver(flip_one_bit), Receiver(refuse="cancel")]
    with pytest.raises(PushError, match="b arrived damaged"):
        run_push(messages_of(), lambda message: [engine(message) for engine in engines])


def test_weights_that_changed_behind_the_commit_are_found_when_they_are_read_back():
    sound = Receiver()
    assert run_push(messages_of(), lambda message: [sound(message)], verify=True).verified
    drifting = Receiver(drift=1e-3)
    with pytest.raises(PushError, match="engines compute with"):
        run_push(messages_of(), lambda message: [drifting(message)], verify=True)


def test_a_lost_bucket_is_named_before_the_commit():
    engine = Receiver()
    messages = [m for m in messages_of() if not (isinstance(m, PushBucket) and m.index == 1)]
    with pytest.raises(PushError, match="ended without b"):
        run_push(messages, lambda message: [engine(message)])
    assert engine.version == 0


def test_a_bucket_of_another_push_is_refused():
    engine = Receiver()
    messages = [replace(m, version=9) if isinstance(m, PushBucket) else m for m in messages_of()]
    with pytest.raises(PushError, match="bucket of version 9 inside the push of 1"):
        run_push(messages, lambda message: [engine(message)])


def test_a_trainer_that_fails_midway_cancels_the_push():
    def broken() -> Iterator[PushMessage]:
        yield from list(messages_of())[:2]
        raise OSError("trainer lost")

    engine = Receiver()
    with pytest.raises(PushError, match="trainer lost"):
        run_push(broken(), lambda message: [engine(message)])
    assert engine.version == 0
    assert engine.seen[-1] == "CancelPush"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_buckets_keep_the_order_and_never_exceed_their_size_unless_one_tensor_does(sizes, limit):
    tensors = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    buckets = list(bucketed(tensors, limit))
    assert [pair for bucket in buckets for pair in bucket] == tensors
    for bucket in buckets:
        assert len(bucket) == 1 or sum(tensor.numel() for _, tensor in bucket) <= limit


LATENT = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def latent_layers(names=LATENT):
    return [(f"model.layers.{i}.self_attn.{name}.weight", torch.ones(3 + i)) for i in range(4) for name in names]


@pytest.mark.parametrize("limit", [1, 13, 40, 100, 10_000])
def test_tensors_that_a_server_makes_one_matrix_of_travel_in_one_bucket(limit):
    buckets = list(bucketed(latent_layers(), limit))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in latent_layers()]
    for layer in range(4):
        halves = {f"model.layers.{layer}.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")}
        assert [len(halves & {name for name, _ in bucket}) for bucket in buckets if halves & dict(bucket).keys()] == [2]
    assert max(map(len, bucketed(latent_layers(), 1))) == 4, "what lies between the halves travels with them, no more"


def test_a_model_without_a_latent_of_queries_has_no_halves():
    assert all(len(bucket) == 1 for bucket in bucketed(latent_layers(LATENT[2:]), 1))


def test_a_half_that_comes_alone_is_refused_by_its_name():
    tensors = dict(latent_layers())
    manifest = manifest_of("target", 1, tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for half, other in (("q_a_proj", "kv_a_proj_with_mqa"), ("kv_a_proj_with_mqa", "q_a_proj")):
        name = f"model.layers.2.self_attn.{half}.weight"
        meta = TensorMeta(name, tuple(tensors[name].shape), "float32")
        bucket = PushBucket(1, 0, (meta,), (tensor_checksum(tensors[name]),), ())
        with pytest.raises(PushError, match=rf"layers\.2\.self_attn\.{half}\.weight came .* without .*\.{other}"):
            PushReceiver(manifest, expected).take(bucket, [tensors[name]])


def test_the_checksum_sees_one_bit_and_not_the_order_of_arrival():
    tensor = torch.randn(1000)
    changed = tensor.clone()
    changed.view(torch.int32)[567] ^= 1
    assert tensor_checksum(tensor) != tensor_checksum(changed)
    pairs = [("x", 1), ("y", 2)]
    assert combined_checksum(pairs) == combined_checksum(pairs[::-1])
    assert combined_checksum(pairs) != combined_checksum([("x", 2), ("y", 1)])
