"""DaemonThreads take calls until their shutdown, and lose neither a call nor a thread to what goes wrong."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from slime_spec.agents.daemon_threads import DaemonThreads

LIMIT_S = 20.0  # for what happens at once, or never


class Blocked:
    """A call that runs until it is let go; the threads' only one meanwhile."""

    def __init__(self, threads: DaemonThreads) -> None:
        self._begun, self._free = threading.Event(), threading.Event()
        self.future: Future[Any] = threads.submit(self._call)
        assert self._begun.wait(LIMIT_S)

    def _call(self) -> str:
        self._begun.set()
        assert self._free.wait(LIMIT_S)
        return "done"

    def let_go(self) -> None:
        self._free.set()


@pytest.mark.parametrize("cancels", [False, True])
def test_a_call_after_the_shutdown_is_refused_rather_than_never_made(cancels: bool) -> None:
    threads = DaemonThreads(1, "mine")
    blocked = Blocked(threads)
    waiting = threads.submit(str, 5)
    threads.shutdown(wait=False, cancel_futures=cancels)
    with pytest.raises(RuntimeError, match="mine: no call is taken after the shutdown"):
        threads.submit(str, 6)
    blocked.let_go()
    assert blocked.future.result(LIMIT_S) == "done"
    if cancels:
        with pytest.raises(CancelledError):
            waiting.result(LIMIT_S)
    else:
        assert waiting.result(LIMIT_S) == "5", "what was taken before is done"


def test_a_callback_that_exits_costs_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    def exits(_: Future[Any]) -> None:
        raise SystemExit(3)

    threads = DaemonThreads(1, "mine")
    blocked = Blocked(threads)
    blocked.future.add_done_callback(exits)
    waiting = threads.submit(str, 5)  # by the same thread: the most there are
    blocked.let_go()
    assert waiting.result(LIMIT_S) == "5"
    assert "what was to follow a call failed threads=mine" in caplog.text


def test_threads_are_started_as_they_are_needed_and_used_again() -> None:
    threads = DaemonThreads(2, "mine")
    first, second = Blocked(threads), Blocked(threads)
    third = threads.submit(threading.get_ident)
    first.let_go()
    assert third.result(LIMIT_S) > 0
    second.let_go()
    names = {each.name for each in threading.enumerate() if each.name.startswith("mine")}
    assert names >= {"mine 1", "mine 2"}
    assert "mine 3" not in names
    threads.shutdown()
