"""A user's reward runs in processes of its own: whatever it does there, it costs its sample, not the run.

driver ── thread ── pipe ──► process: loads the reward by name, answers one call at a time
          │  no answer within the time limit, or the process ends: it is killed with all that it started,
          └─ the sample is excluded, and the next call starts another process
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from slime_spec.errors import ConfigError, raised
from slime_spec.tasks.judge import Reply, RewardName, Verdict

logger = logging.getLogger(__name__)

START_LIMIT_S = 300.0  # importing a reward may import a framework
SAY_EVERY_S = 10.0


class RewardProcesses:
    """Calls one reward in at most ``num_processes`` processes, each call within ``limit_s`` seconds."""

    def __init__(
        self, reward: RewardName, num_processes: int, limit_s: float, say_every_s: float = SAY_EVERY_S
    ) -> None:
        self._reward, self._limit_s, self._say_every_s = reward, limit_s, say_every_s
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="reward")
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._idle.put(None)  # started when it is needed
        self._started: set[_Process] = set()
        self._is_closed = False
        self._lock = threading.Lock()  # of the two above: a process is started before a close, which ends it, or never
        atexit.register(self.close)

    def verdicts(self, replies: Sequence[Reply], num_waits: int = 1) -> Future[list[Verdict]]:
        """Ask for the verdicts of ``replies`` in one call, which may take ``num_waits`` times the limit."""
        return self._threads.submit(self._ask, list(replies), num_waits)

    def close(self) -> None:
        """End all processes at once; calls that wait fail."""
        atexit.unregister(self.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_closed = True
            for process in self._started:
                process.end()  # its thread, if one waits, sees the end and closes the pipe

    def _ask(self, replies: list[Reply], num_waits: int) -> list[Verdict]:
        process = self._idle.get()
        try:
            if process is None:
                process = self._start()
                if problem := process.answer(START_LIMIT_S, self._say_every_s, f"loading {self._reward.name}"):
                    raise _GoneError(str(problem))
            if problem := process.ask(replies):
                return [Verdict(None, problem)] * len(replies)
            prompt, index = replies[0].prompt, replies[0].response.sample_index
            doing = f"scoring task={prompt.task} prompt_id={prompt.prompt_id} sample={index}"
            limit_s = num_waits * self._limit_s
            verdicts: list[Verdict] = process.answer(limit_s, self._say_every_s, doing)
        except _GoneError as gone:
            if process is not None:
                with self._lock:
                    self._started.discard(process)
                process.close()
                process = None
            verdicts = [Verdict(None, str(gone), is_answer=False)] * len(replies)
        finally:
            self._idle.put(process)
        return verdicts

    def _start(self) -> _Process:
        with self._lock:
            if self._is_closed:
                raise _GoneError("the run has ended")
            process = _Process(self._reward)
            self._started.add(process)
            return process


class _GoneError(Exception):
    """The process gave no answer, and is of no more use; says why."""


class _Process:
    """Owns one process that answers calls of the reward."""

    def __init__(self, reward: RewardName) -> None:
        # A new interpreter: a fork of the driver would have Ray's and torch's locks without their threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, reward), name=f"reward {reward.name}")
        self._process.start()
        theirs.close()

    def ask(self, replies: list[Reply]) -> str:
        """Send a call; return why it cannot be sent, "" where it was."""
        try:
            self._pipe.send(replies)
        except OSError:
            raise self._ended() from None
        except Exception as error:  # noqa: BLE001 - of pickling objects of a user's own task, before any of it is sent
            return f"the sample cannot be sent to the reward's process: {raised(error)}"
        return ""

    def answer(self, limit_s: float, say_every_s: float, doing: str) -> Any:
        """Wait for the answer, and say every now and then for what; raises _GoneError without any."""
        begun = time.monotonic()
        try:
            while not self._pipe.poll(max(0.0, min(say_every_s, limit_s - (time.monotonic() - begun)))):
                waited_s = time.monotonic() - begun
                if waited_s >= limit_s:
                    raise _GoneError(f"the reward gave no answer within {limit_s:g} s (--reward-timeout)")
                logger.warning("still %s for_s=%.0f limit_s=%g", doing, waited_s, limit_s)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def end(self) -> None:
        """End the process and all that it started."""
        assert self._process.pid is not None, "it was started"
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def close(self) -> None:
        self.end()
        self._process.join()
        self._pipe.close()

    def _ended(self) -> _GoneError:
        self._process.join(1.0)
        return _GoneError(f"the reward's process ended with exit code {self._process.exitcode}")


def _serve(pipe: Connection, reward: RewardName) -> None:
    """Answer calls until the driver is gone: first what keeps the reward from being loaded, "" for nothing."""
    os.setsid()  # Ctrl-C in the terminal is the driver's; and killing the group ends what the reward started
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    try:
        judge = reward.load()
    except ConfigError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    own_pid = os.getpid()
    while True:
        try:
            replies = pipe.recv()
        except EOFError:
            return
        verdicts = judge.verdicts(replies)
        if os.getpid() != own_pid:  # a fork of the reward that came back: its answer would be taken for the next call's
            os._exit(0)
        pipe.send(verdicts)


def _end_with_the_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None, "runs in a process that the driver started"
    driver.join()
    os.killpg(0, signal.SIGKILL)
