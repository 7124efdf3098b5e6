"""For every test: the proofs of minutes run last, and a real server that hangs cannot hold up the others."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# No test on a running server takes a tenth of it; those that start servers in processes have deadlines of their own.
LONGEST_S = 600


@pytest.hookimpl(trylast=True)  # after pytest's own grouping by fixtures
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests, then long ones, then the real SGLang's: one algorithm's server starts once and idles beside none."""

    def order(item: pytest.Item) -> tuple[bool, bool, str]:
        callspec = getattr(item, "callspec", None)
        algorithm = "" if callspec is None else str(callspec.params.get("running", ""))
        is_long, on_server = (item.get_closest_marker(name) is not None for name in ("long", "sglang_server"))
        return on_server, is_long, algorithm

    items.sort(key=order)


@pytest.fixture(autouse=True)
def _deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends a test of the real SGLang that waits for ever, wherever it waits."""
    if request.node.get_closest_marker("sglang_server") is None:
        yield
        return
    from tests.support.sglang_real import sglang_python

    sglang_python()  # once; its minutes are not the first test's

    def too_late(*_: object) -> None:
        pytest.fail(f"still waiting after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
