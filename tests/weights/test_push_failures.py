"""Whatever is raised in a push, and whenever: every engine is cancelled, goes on, and takes the next push."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from slime_spec.errors import PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.transports.ipc import IpcTransport
from slime_spec.weights.messages import (
    BeginPush,
    CancelPush,
    CommitPush,
    ContinueGeneration,
    PauseGeneration,
    PreparePush,
    PushBucket,
    PushMessage,
    Side,
    VerifyPush,
)
from slime_spec.weights.run import manifest_of, push_messages, run_push
from tests.support.push_engines import NEW, OLD, Engine, quiet, to_all

TRANSPORTS: dict[str, type[WeightTransport]] = {"in_process": InProcessTransport, "ipc": IpcTransport}
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def engines_of(transport: str, count: int) -> list[Engine]:
    return [Engine(transport=TRANSPORTS[transport]()) for _ in range(count)]


def new_messages(side: Side, version: int = 7, transport: str = "in_process") -> Iterator[PushMessage]:
    return push_messages(NEW, version, side, 24, TRANSPORTS[transport]())


class EngineProcessDied(RuntimeError):
    """As a pool raises it, which is no PushError."""


ERRORS = [
    PushError("refused"),
    EngineProcessDied("an engine's process died"),
    torch.OutOfMemoryError("no memory left"),
    KeyboardInterrupt(),
    SystemExit(143),
    asyncio.CancelledError(),
]
BEFORE_COMMIT = (PauseGeneration, BeginPush, PushBucket, PreparePush)
AFTER = (CommitPush, VerifyPush, ContinueGeneration)


@every_transport
@pytest.mark.parametrize("side", ["target", "draft"])
@pytest.mark.parametrize("when", ["before the engine has it", "after the engine has it"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("phase", [*BEFORE_COMMIT, *AFTER], ids=lambda phase: phase.__name__)
def test_every_engine_is_cancelled_and_goes_on_whatever_is_raised(
    phase: type, error: BaseException, when: str, side: Side, transport: str
) -> None:
    """Case audit/70: each phase of a push, each kind of thing that may be raised in it, at one engine of three."""
    engines = engines_of(transport, 3)
    raised = 0

    def strike(message: PushMessage, index: int) -> BaseException | None:
        nonlocal raised
        if not isinstance(message, phase) or index != 1 or raised:
            return None
        raised += 1
        return error

    hooks = (strike, quiet) if when == "before the engine has it" else (quiet, strike)
    with pytest.raises(BaseException) as caught:
        run_push(new_messages(side, transport=transport), to_all(engines, *hooks), verify=True, pause_mode="retract")
    # The error itself; or, up to the commit and where it is an Exception, a PushError that it caused.
    assert error is caught.value or (isinstance(caught.value, PushError) and caught.value.__cause__ is error)
    assert (caught.value is error) == (phase in (VerifyPush, ContinueGeneration) or not isinstance(error, Exception))
    for engine in engines:
        assert not engine.paused
        assert engine.heard[-1] is ContinueGeneration
        assert (CancelPush in engine.heard) == (phase not in (PauseGeneration, ContinueGeneration))
        if phase in BEFORE_COMMIT:
            assert engine.versions == {"target": 0, "draft": 0}
            assert engine.tensors == {"target": OLD, "draft": OLD}
    report = run_push(new_messages(side, 8, transport), to_all(engines, quiet, quiet), verify=True)
    assert report.verified
    assert [engine.versions[side] for engine in engines] == [8, 8, 8]


@every_transport
@pytest.mark.parametrize("pause_mode", ["none", "in_place"])
@pytest.mark.parametrize("num_messages", [0, 1, 2])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_the_trainer_raises_engines_are_cancelled_and_go_on(
    error: BaseException, num_messages: int, pause_mode: str, transport: str
) -> None:
    """A rank's error, a transport's, or an interrupt while the driver waits for the next bucket."""
    engines = engines_of(transport, 2)

    def breaking() -> Iterator[PushMessage]:
        messages = new_messages("target", transport=transport)
        for _ in range(num_messages):
            yield next(messages)
        raise error

    with pytest.raises(BaseException) as caught:
        run_push(breaking(), to_all(engines, quiet, quiet), pause_mode=pause_mode)
    assert error in (caught.value, caught.value.__cause__)
    assert (caught.value is error) != isinstance(error, Exception)
    for engine in engines:
        assert not engine.paused
        assert (CancelPush in engine.heard) == (num_messages > 0), "nothing is undone that no engine heard of"
        assert engine.versions["target"] == 0
    run_push(new_messages("target", transport=transport), to_all(engines, quiet, quiet), pause_mode=pause_mode)
    assert [engine.versions["target"] for engine in engines] == [7, 7]


@pytest.mark.parametrize("second", [RuntimeError("dead"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_engine_that_cannot_cancel_keeps_no_other_from_cancelling_and_none_from_going_on(
    second: BaseException,
) -> None:
    """A dead engine; or the second Ctrl-C of an impatient user, which is then what is raised."""
    engines = [Engine(), Engine(), Engine()]

    def strike(message: PushMessage, index: int) -> BaseException | None:
        if isinstance(message, PreparePush) and index == 2:
            return KeyboardInterrupt()
        return second if isinstance(message, CancelPush) and index == 0 else None

    with pytest.raises(KeyboardInterrupt):
        run_push(new_messages("draft"), to_all(engines, strike, quiet), pause_mode="abort")
    assert [engine.heard[-2:] for engine in engines[1:]] == [[CancelPush, ContinueGeneration]] * 2
    assert [engine.paused for engine in engines] == [False] * 3
    assert [engine.versions["draft"] for engine in engines] == [0] * 3


def test_weights_that_differ_when_read_back_end_the_push_and_leave_no_engine_paused() -> None:
    engines = [Engine(), Engine()]

    def spoil(message: PushMessage, index: int) -> None:
        if isinstance(message, VerifyPush) and index == 1:
            engines[1].tensors["target"] = OLD

    with pytest.raises(PushError, match="engines compute with"):
        run_push(new_messages("target"), to_all(engines, spoil, quiet), verify=True, pause_mode="in_place")
    assert [engine.heard[-2:] for engine in engines] == [[CancelPush, ContinueGeneration]] * 2
    assert [engine.paused for engine in engines] == [False, False]


# What a trainer's weights hold, as they arrive; what computes with them; and whether they are right there.
VALUES = [
    (torch.float32, torch.float16, 65504.0, True),
    (torch.float32, torch.float16, 65519.0, True),  # rounds down to the largest number
    (torch.float32, torch.float16, 65520.0, False),
    (torch.float32, torch.float16, -1e5, False),
    (torch.float16, torch.float16, float("inf"), False),  # the trainer's own cast overflowed: checksums agree
    (torch.float16, torch.float32, float("-inf"), False),
    (torch.float32, torch.float32, float("nan"), False),
    (torch.bfloat16, torch.float16, 1e30, False),
    (torch.bfloat16, torch.float32, 1e30, True),
    (torch.float64, torch.float32, 1e39, False),
    (torch.float64, torch.bfloat16, 3.4e38, False),
    (torch.float64, torch.float32, 1e-300, True),
]


@pytest.mark.parametrize("side", ["target", "draft"])
@pytest.mark.parametrize(("sent", "computes", "value", "is_right"), VALUES)
def test_a_push_with_a_number_that_the_engine_cannot_compute_with_leaves_it_as_it_was(
    sent: torch.dtype, computes: torch.dtype, value: float, is_right: bool, side: Side
) -> None:
    """Case audit/02, of the trainer: where infinity is compared with infinity, checksums say nothing."""
    weights = {name: tensor.to(sent, copy=True) for name, tensor in NEW.items()}
    weights["b"][2] = value
    assert bool(weights["b"].to(computes).isfinite().all()) is is_right
    engine = Engine(computes)
    messages = push_messages(weights, 7, side, 24, InProcessTransport())
    if is_right:
        run_push(messages, to_all([engine], quiet, quiet))
        assert engine.versions[side] == 7
        return
    with pytest.raises(PushError, match=rf"b \({str(sent)[6:]}\) holds"):
        run_push(messages, to_all([engine], quiet, quiet))
    assert engine.versions[side] == 0
    assert engine.tensors[side] is OLD
    run_push(new_messages(side), to_all([engine], quiet, quiet))
    assert engine.versions[side] == 7


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn"])
def test_a_push_of_other_than_floating_point_numbers_is_refused_before_a_byte_is_sent(dtype: str) -> None:
    weights = {**NEW, "b": NEW["b"].to(getattr(torch, dtype))}
    engine = Engine()
    with pytest.raises(PushError, match=f"b is {dtype}: weights must be one of"):
        run_push(push_messages(weights, 7, "target", 24, InProcessTransport()), to_all([engine], quiet, quiet))
    assert engine.heard == [BeginPush, CancelPush]
    assert engine.tensors["target"] is OLD


def test_a_push_that_announces_a_tensor_twice_is_refused() -> None:
    manifest = manifest_of("target", 7, NEW)
    with pytest.raises(PushError, match="announces a tensor twice"):
        Engine().update_weights(BeginPush(replace(manifest, tensors=(*manifest.tensors, manifest.tensors[0]))))
