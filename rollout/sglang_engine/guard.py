"""The guard runs a server and ends the server's whole process group when the guard's standard input closes.

    python guard.py COMMAND...

An engine's actor may be killed without a chance to clean up, and SGLang starts processes of its own, which would go on
holding the GPU. The standard input of this process is a pipe from the actor: however the actor ends, it closes.
The guard imports only the standard library, so that it starts fast and stays small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

GRACE_S = 10.0
PR_SET_PDEATHSIG = 1  # Linux
KEY_VARIABLE = "SLIME_SPEC_SERVER_KEY"  # keyed.py has it too


def guard(command: Sequence[str], secret: bytes = b"") -> int:
    """Run ``command`` until it ends or the standard input does; returns its exit code (128 + signal if killed).

    ``secret`` is kept out of the command's output.
    """
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if secret else None,
        stderr=subprocess.STDOUT if secret else None,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    copying = threading.Thread(target=_copy_output, args=(server, secret), daemon=True)
    copying.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(128))
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    try:
        code = server.wait()
    finally:
        _signal_group(server.pid, signal.SIGKILL)  # what the server left running, or all of it
        copying.join(1.0)
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    """Have the kernel end the server if the guard is killed; called in the server's process before it runs."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _copy_output(server: subprocess.Popen[bytes], secret: bytes) -> None:
    """Copy the output line by line, with ``***`` for the secret; SGLang logs all its arguments."""
    if server.stdout is not None:
        for line in server.stdout:
            with suppress(OSError):  # a full disk: a server whose output is not read would hang
                os.write(1, line.replace(secret, b"***"))


def _end_with_input(server: subprocess.Popen[bytes]) -> None:
    # Not a buffered read: a blocked reader would hold the buffer's lock when the interpreter ends.
    while os.read(0, 4096):
        pass
    _signal_group(server.pid, signal.SIGTERM)
    _signal_group(server.pid, signal.SIGCONT)  # a server that was stopped could not end itself
    try:
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal_group(server.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:], os.environ.get(KEY_VARIABLE, "").encode()))
