"""The garbage collector pauses while libraries are imported, and only then."""

from __future__ import annotations

import gc

import pytest

from slime_spec.garbage import no_collection


def test_nothing_is_collected_inside_and_the_collector_goes_on_after_an_error_too() -> None:
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), no_collection():
        raise ImportError("no such library")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collection(), no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
