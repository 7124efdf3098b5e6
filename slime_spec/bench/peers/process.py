"""A peer engine runs as a process, started once and asked over a pipe; the system reports its CPU time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from slime_spec.bench.memory import tree_pss_bytes
from slime_spec.bench.race import Answer, Ask

WORKER = Path(__file__).with_name("worker.py")
LOG_TAIL_LINES = 20


class PeerProcess:
    """Runs one driver in its own Python; ``wait_ready`` is separate from the start, so that peers load side by side.

    Example::

        with PeerProcess(python, driver, {"model": "..."}, log) as peer:
            peer.wait_ready()
            peer.answer(Ask(prompts, batch_size=8, num_new_tokens=128))
    """

    def __init__(self, python: Path, driver: Path, settings: dict[str, Any], log: Path, threads: int = 1) -> None:
        self._log = log
        command = [str(python), "-u", str(WORKER), str(driver), json.dumps(settings)]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=peer_environment(python, threads),
            )
        self._root = psutil.Process(self._process.pid)
        self.about: dict[str, Any] = {}

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def wait_ready(self) -> None:
        """Block until the engine has loaded; raises RuntimeError with the end of its log when it dies instead."""
        self.about = self._answer()["ready"]

    def answer(self, ask: Ask) -> Answer:
        """See Side; a reply of the wrong length raises, as the driver is broken."""
        assert self._process.stdin is not None
        replies: list[tuple[int, ...]] = []
        num_passes: int | None = 0
        for prompts in ask.batches:
            request = {
                "prompts": [list(prompt) for prompt in prompts],
                "num_new_tokens": ask.num_new_tokens,
                "stop_token_ids": list(ask.stop_token_ids),
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            replies += [tuple(reply) for reply in answer["token_ids"]]
            passes = answer["num_passes"]
            num_passes = None if num_passes is None or passes is None else num_passes + passes
        wrong = [reply for reply in replies if not self._is_whole(reply, ask)]
        assert not wrong, f"{self._log.stem} ended a reply after {len(wrong[0])} of {ask.num_new_tokens} tokens"
        return Answer(replies, num_passes)

    @staticmethod
    def _is_whole(reply: tuple[int, ...], ask: Ask) -> bool:
        return len(reply) == ask.num_new_tokens or (len(reply) < ask.num_new_tokens and reply[-1] in ask.stop_token_ids)

    def cpu_s(self) -> float:
        """Return the CPU seconds that the process and its children have used since they started."""
        times = [each.cpu_times() for each in (self._root, *self._root.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    @property
    def memory_bytes(self) -> int:
        """Return the proportional set size of the process and its children."""
        return tree_pss_bytes(self._process.pid)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text().splitlines()[-LOG_TAIL_LINES:])
            raise RuntimeError(f"{self._log.stem} ended with code {code}; the end of {self._log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peer_environment(python: Path, threads: int) -> dict[str, str]:
    """Return a minimal, offline environment, without this process's PYTHONPATH and thread counts.

    Idle threads sleep, and Numba (vLLM's n-grams) starts none: their spinning made vLLM's n-gram mode 2 to 50 times
    slower on two cores.
    """
    return {
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(Path.home()),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "NUMBA_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
