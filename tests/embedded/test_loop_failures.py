"""A refusal is its caller's alone; every other error ends the engine and reaches everyone who waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.loop_thread import Refused
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import engine_config

LONG = GroupRequest("g", (1, 2), (0, 1), SamplingParams(max_new_tokens=500))


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(engine_config(tiny_llama), 0, RayObjectStoreTransport())
    engine.start()
    yield engine
    engine.stop()


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("no memory left on the device")


def test_running_out_of_memory_in_a_command_is_no_refusal(engine: EmbeddedEngine) -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    generation = engine.generate(LONG)
    with pytest.raises(torch.OutOfMemoryError):
        engine._thread.call(out_of_memory)
    with pytest.raises(RuntimeError, match="stopped before") as caught:
        list(generation)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(RuntimeError, match="not running"):
        engine.generate(LONG)


def test_an_error_while_aborting_reaches_the_callers_that_wait_for_samples(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._core, "abort", out_of_memory)
    aborted, other = engine.generate(LONG), engine.generate(LONG)
    aborted.abort()
    for generation in (aborted, other):
        with pytest.raises(RuntimeError, match="stopped before") as caught:
            list(generation)
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_after_a_refusal_the_engine_goes_on(engine: EmbeddedEngine) -> None:
    generation = engine.generate(LONG)
    with pytest.raises(Refused, match="requests are running"):
        engine.set_resident(False)
    assert [len(sample.token_ids) for sample in generation] == [500, 500]
    engine.set_resident(False)
    with pytest.raises(Refused, match="offloaded"):
        engine.generate(LONG)
    engine.set_resident(True)
    assert len(list(engine.generate(LONG))) == 2
