"""ServerProcess starts, awaits, watches and ends the process of an SGLang server."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rollout.sglang_engine import guard, keyed

logger = logging.getLogger(__name__)

# A crash must be seen at once: SGLang otherwise waits minutes for dumps that nobody asked for.
SERVER_ENVIRONMENT = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
TAIL_LINES = 25
TAIL_BYTES = 64 * 1024  # of a log that weeks may have written
STOP_TIMEOUT_S = guard.GRACE_S + 10.0
POLL_S = 0.25

PORT_TAKEN = r"address already in use|Errno 98"

# What a server's log says when it cannot start, and what that usually means; the first match is reported.
LIKELY_CAUSES: tuple[tuple[str, str], ...] = (
    (PORT_TAKEN, "the port is taken: pass another --sglang-port, or 0 for a free one"),
    (r"No module named '?sglang", "this Python has no sglang: pass --sglang-python /path/to/python of one that has"),
    (r"unrecognized arguments|error: argument", "this SGLang does not know a flag: check it against its version"),
    (r"CUDA out of memory|OutOfMemoryError|Not enough memory", "GPU memory: lower --sglang-mem-fraction-static"),
    (
        r"Transformers does not recognize this architecture|trust_remote_code",
        "the model's configuration is code in its folder: pass --sglang-trust-remote-code if you trust it",
    ),
    (
        r"Unrecognized model in|does not appear to have a file named config\.json|is not a valid model identifier",
        "a checkpoint folder is not one: check --hf-checkpoint and --sglang-speculative-draft-model-path "
        "(a draft's config.json needs a model_type)",
    ),
    (
        r"User-specified context_length|context length",
        "the context lengths of target and draft: --sglang-context-length",
    ),
    (r"No module named 'sgl_kernel'|sgl_kernel.*(ImportError|cannot open)", "sglang-kernel does not fit this machine"),
    (r"torchvision::nms does not exist", "torchvision does not fit this torch: reinstall it, or remove it"),
    (r"mat1 and mat2 shapes cannot be multiplied", "the draft does not fit the target's hidden size or layers"),
    (r"Killed|signal 9", "the system killed it, most likely for memory"),
)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class ServerStartError(RuntimeError):
    """The server did not become healthy; the message has the end of its log and the likely cause."""

    @property
    def port_taken(self) -> bool:
        return re.search(PORT_TAKEN, str(self)) is not None


class ServerProcess:
    """Runs one server in its own process group, which ends with this process at the latest (see guard).

    Example: ``ServerProcess([python, "-m", "sglang.launch_server", ...], {}, log).start()``
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.command, self.log = list(command), log
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Launch the server; its output is appended to the log."""
        assert self._process is None, "started once"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab", opener=_private) as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, guard.__file__, *self.command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        logger.info("server launched pid=%d log=%s", self._process.pid, self.log)

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def wait_until(self, is_healthy: Callable[[], bool], timeout_s: float) -> None:
        """Return once the server is healthy; raises ServerStartError when it ends, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.is_alive:
                raise ServerStartError(self._why(f"ended with exit code {self.exit_code}"))
            if is_healthy():
                return
            time.sleep(POLL_S)
        raise ServerStartError(self._why(f"was not healthy after {timeout_s:g} s (--sglang-start-timeout)"))

    def stop(self) -> None:
        """End the server and everything it started; no error where it has ended already."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None, "the guard reads a pipe"
        process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        logger.info("server ended exit_code=%s", process.returncode)

    def tail(self) -> str:
        """Return the last lines of this start's log."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as written:
            written.seek(max(self._log_start, written.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = written.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def _why(self, what: str) -> str:
        tail = self.tail()
        cause = likely_cause(tail)
        hint = f"Likely cause: {cause}.\n" if cause else ""
        return f"The SGLang server {what}.\n{hint}The end of {self.log}:\n{tail}"


def with_key(
    command: Sequence[str], environment: Mapping[str, str], key: str | None
) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of ``python -m MODULE ...`` with the API key, which no process list shows."""
    if key is None:
        return list(command), dict(environment)
    python, option, *module = command
    assert option == "-m", "a module is run"
    return [python, keyed.__file__, *module], {**environment, keyed.KEY_VARIABLE: key}


def likely_cause(log: str) -> str:
    """Return what a log's errors usually mean, or an empty string."""
    return next((cause for pattern, cause in LIKELY_CAUSES if re.search(pattern, log)), "")
