"""Server processes: started, found wanting, ended with everything they started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rollout.sglang_engine import guard
from rollout.sglang_engine.server import ServerProcess, ServerStartError, likely_cause

SLEEP = "import time; print('loading', flush=True); time.sleep(60)"
# A server as SGLang's: it starts a process of its own, and neither ends by itself.
PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    "print('child', child.pid, flush=True); time.sleep(60)"
)


def process(code: str, log: Path) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", code], {}, log)


def is_gone(pid: int, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def child_of(log: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        words = log.read_text().split() if log.exists() else []
        if len(words) == 2:
            return int(words[1])
        time.sleep(0.05)
    raise AssertionError("it did not start its child")


def test_stopping_a_server_ends_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = process(PARENT, log)
    server.start()
    child = child_of(log)
    assert server.is_alive
    server.stop()
    assert not server.is_alive
    assert is_gone(child)


def test_a_server_ends_when_its_engine_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    code = (
        "from pathlib import Path; import sys, time\n"
        "from rollout.sglang_engine.server import ServerProcess\n"
        f"ServerProcess([sys.executable, '-c', {PARENT!r}], {{}}, Path({str(log)!r})).start()\n"
        "time.sleep(60)"
    )
    engine = subprocess.Popen([sys.executable, "-c", code])
    child = child_of(log)
    engine.kill()
    engine.wait()
    assert is_gone(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_its_guard(tmp_path: Path, number: signal.Signals) -> None:
    """Killed outright the guard can do nothing more: then the kernel ends the server, and SGLang's parts see that."""
    code = "import os, time; print('child', os.getpid(), flush=True); time.sleep(60)"
    server = process(code, tmp_path / "server.log")
    server.start()
    child = child_of(tmp_path / "server.log")
    assert server._process is not None
    server._process.send_signal(number)
    assert is_gone(child)
    server.stop()


def test_a_server_that_ends_by_itself_is_told_with_its_log_and_the_likely_cause(tmp_path: Path) -> None:
    server = process("raise SystemExit('No module named sglang')", tmp_path / "server.log")
    server.start()
    with pytest.raises(ServerStartError) as told:
        server.wait_until(lambda: False, 20.0)
    message = str(told.value)
    assert "ended with exit code 1" in message
    assert "--sglang-python" in message
    assert "No module named sglang" in message


def test_a_server_that_never_becomes_healthy_is_given_up_in_time(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = process(SLEEP, log)
    server.start()
    while "loading" not in log.read_text():
        time.sleep(0.05)
    with pytest.raises(ServerStartError, match=r"(?s)not healthy after 1 s .*loading"):
        server.wait_until(lambda: False, 1.0)
    server.stop()


def test_the_tail_is_of_this_start_and_not_of_an_earlier_one(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("of an earlier server\n")
    server = process("print('of this one')", log)
    server.start()
    with pytest.raises(ServerStartError):
        server.wait_until(lambda: False, 20.0)
    assert server.tail() == "of this one"
    server.stop()


def test_the_tail_of_an_endless_log_is_read_without_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = process("pass", log)
    server.start()
    server.stop()
    with log.open("r+b") as written:
        written.seek(2**40)  # a hole: it takes no room on the disk
        written.write(b"\nthe end\n")
    assert server.tail().splitlines()[-1] == "the end"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("[Errno 98] Address already in use: ('127.0.0.1', 30000)", "--sglang-port"),
        ("launch_server.py: error: unrecognized arguments: --foo", "does not know a flag"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "--sglang-mem-fraction-static"),
        ("ValueError: Unrecognized model in /drafts/eagle3. Should have a `model_type` key", "model_type"),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x96 and 144x48)", "does not fit the target"),
        ("everything is fine", ""),
    ],
)
def test_common_failures_are_explained(log: str, cause: str) -> None:
    assert cause in likely_cause(log)
    assert bool(likely_cause(log)) == bool(cause)


def test_the_guard_gives_its_commands_exit_code() -> None:
    command = [sys.executable, guard.__file__, sys.executable, "-c", "raise SystemExit(7)"]
    done = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert done.wait(20) == 7
