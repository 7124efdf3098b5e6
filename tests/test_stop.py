"""Signals ask a run to end: where it may be interrupted at once, elsewhere when its work is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from slime_spec.stop import StopSignals


def test_a_signal_interrupts_only_what_may_be_interrupted() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        assert stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt), stop.interruptible():
            pytest.fail("a signal had come before")
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt), stop.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 130


def test_the_handlers_from_before_are_back_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_signal_ends_the_process_and_the_echo_of_the_first_does_not() -> None:
    codes: list[int] = []
    now = 10.0
    stop = StopSignals(codes.append, lambda: now)
    stop.ask(signal.SIGINT)
    now += 0.1  # as `timeout` and some schedulers send it: to the process, then to its group
    stop.ask(signal.SIGINT)
    assert codes == []
    now += 5.0
    stop.ask(signal.SIGTERM)
    assert codes == [143]


def test_a_clean_up_that_takes_too_long_after_a_signal_is_ended() -> None:
    """As Ray's, which waits for a head that the same signal has ended; clean-ups may be nested."""
    codes: list[int] = []
    is_ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        is_ended.set()

    with StopSignals(end, clean_up_s=0.01) as stop:
        with stop.limited_clean_up():
            stop.ask(signal.SIGTERM)
        assert is_ended.wait(60)
    assert codes == [143]
    with StopSignals(end) as stop, stop.limited_clean_up(), stop.limited_clean_up():
        stop.ask(signal.SIGTERM)  # of a start, whose clean-up is a part of the run's
    with StopSignals(end, clean_up_s=0.0) as stop, stop.limited_clean_up():
        pass
    assert codes == [143], "without a signal a clean-up takes its time"


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    """nohup, and a script's `&`: the run outlives the terminal."""
    script = (
        "import os, signal; from slime_spec.stop import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stop.asked)"
    )
    ignoring = ["bash", "-c", 'trap "" HUP; exec "$@"', "-", sys.executable, "-c", script]
    assert subprocess.run(ignoring, capture_output=True, text=True, check=True).stdout == "None\n"
