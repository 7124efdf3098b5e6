"""For every test: the order in which tests run, which run beside each other, and which proofs need not run again."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.proofs import ROOT, Recorder, digest_of, recorded
from tests.support.slowest import Slowest

# Triton asks when it is imported, and torch imports it. Where there is no GPU its interpreter runs the kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes decides no test: on a busy machine the first one of all takes seconds.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# No test on a running server takes a tenth of it; those that start servers in processes have deadlines of their own.
LONGEST_S = 600
SPLIT = (
    "test_greedy_grid.py",
    "test_real_sglang.py",
    "test_real_sglang_pushes.py",
    "test_speculative_sampling.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run proofs also where nothing they prove has changed")
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "stand-in", "graphs"),
        default="cpu",
        help="where tests/embedded computes; on a CPU: stand-in refuses what a GPU refuses, graphs runs its passes",
    )
    parser.addoption("--record-proofs", action="store_true", help="run all proofs, write tests/proven.json")
    parser.addoption("--slowest-files", type=int, default=0, help="tell so many files that took longest, at the end")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts a command in the background with SIGINT ignored, and what it starts inherits that: Ctrl-C would not
    # reach the runs that tests of it start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    is_worker = hasattr(config, "workerinput")
    if is_worker or config.getoption("dist", "no") == "no":  # this process collects the tests
        gc.disable()  # until all are known: a third of the time that takes went into looking through them for garbage
    if (count := config.getoption("--slowest-files")) and not is_worker:
        config.pluginmanager.register(Slowest(count))
    if config.getoption("--record-proofs") and not is_worker:
        if config.option.keyword or any("::" in arg for arg in config.args):
            raise pytest.UsageError("--record-proofs records whole proofs; leave out -k and :: and give whole files")
        config.pluginmanager.register(Recorder())


def _algorithm(item: pytest.Item) -> str:
    """The algorithm of the real server that the test runs on, if it does."""
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else str(callspec.params.get("running", ""))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files go to one process, and the tests of one real server, whichever file they are in.

    ``--dist worksteal`` gives every test to whichever process is free.
    """
    if config.getoption("dist") == "worksteal":
        return None
    from tests.support.scheduling import WholeFiles

    class BySharedFixtures(WholeFiles):
        def _split_scope(self, nodeid: str) -> str:
            return shared_by(nodeid)

    return BySharedFixtures(config, log)


def shared_by(nodeid: str) -> str:
    """What a test shares with others and is too costly to make twice: its file's fixtures, a server, a plain run.

    In files of SPLIT the first parameter names it: ``shared_by("tests/sglang/test_real_sglang.py::test_x[EAGLE3-8]")``
    is ``"EAGLE3"``.
    """
    file, _, rest = nodeid.partition("::")
    first = re.split(r"[-\]]", rest.partition("[")[2])[0]
    return first if Path(file).name in SPLIT and first else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the proofs that stand, and what says the same of fewer samples."""
    runs_all = config.getoption("--all") or config.getoption("--record-proofs")
    standing = set() if runs_all else {proof for proof, digest in recorded().items() if digest == digest_of(proof)}
    for item in items:
        proves = item.get_closest_marker("proves") is not None
        if proves or item.get_closest_marker("proven_by_more") is not None:
            proof = item.path.relative_to(ROOT).as_posix()
            if proves:
                item.user_properties.append(("proves", proof))
            if proof in standing:
                item.add_marker(
                    pytest.mark.skip(reason="what it proves has not changed since it passed (--all runs it)")
                )


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)  # after pytest's own grouping by fixtures
def pytest_order_items(items: list[pytest.Item]) -> None:
    """Long tests, then the real SGLang's, an algorithm's together, then the quick ones: both processes end at once."""

    def order(item: pytest.Item) -> tuple[bool, bool, str]:
        is_long, on_server = (item.get_closest_marker(name) is not None for name in ("long", "sglang_server"))
        algorithm = _algorithm(item)
        if algorithm and Path(item.path).name in SPLIT and shared_by(item.nodeid) != algorithm:
            raise pytest.UsageError(f"{item.nodeid} would start a server of its own: put its @on(...) nearest to it")
        return not (is_long or on_server), on_server, algorithm

    items.sort(key=order)


def pytest_collection_finish() -> None:
    gc.freeze()  # the tests and libraries, which stay
    gc.enable()


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
