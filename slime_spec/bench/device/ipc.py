"""Measure bytes that go to another process through memory that both map, as in a push between processes on one device.

    sender:  | payload |  ── handle of the whole, or of one bucket after the other ──►  receiver:  | own memory |
                          ◄──────────────── "copied" after every handle ─────────────

On a GPU the handles are CUDA's IPC handles, on a CPU file descriptors of shared memory. The time is from the first
handle to the last answer, opening the handles included; it is held against a copy of the same bytes in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing  # teaches the pipes of multiprocessing to send a tensor as a handle

from slime_spec.bench.local_engine import device_of
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.bench.timing import interleaved, median_ratio, median_s, settled

IPC_REACH = 1.2
COPIED, SUM = "copied", "sum"
END_S = 5.0


@dataclass(frozen=True)
class IpcSizes:
    """Holds the payload, its number of buckets, the timed rounds, and how long the receiver may take."""

    num_bytes: int
    num_buckets: int
    num_rounds: int
    start_s: float = 120.0
    answer_s: float = 30.0


class ReceiverError(RuntimeError):
    """The receiving process ended, or gave no answer in time."""


def receive(connection: Connection, num_bytes: int, device: str) -> None:
    """Run in the other process: copy every piece into memory of its own, and tell the sum when asked."""
    own = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)
    connection.send(COPIED)
    while True:
        try:
            message = connection.recv()
        except EOFError:  # the sender has closed its end
            return
        if message == SUM:
            connection.send(int(own.sum(dtype=torch.int64)))
            continue
        start, piece = message
        own[start : start + len(piece)].copy_(piece)
        settled()  # before the handle is closed
        del message, piece  # closes the handle, which the time includes
        connection.send(COPIED)


Receive = Callable[[Connection, int, str], None]


class Receiver:
    """Starts the receiving process and asks it; ``close`` ends the process, by force if it must."""

    def __init__(self, sizes: IpcSizes, device: torch.device, run: Receive) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._sizes = sizes
        self._connection, theirs = context.Pipe()
        arguments = (theirs, sizes.num_bytes, device.type)
        self._process = context.Process(target=run, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the receiver ends the pipe

    def wait(self) -> None:
        """Wait until the process can receive; raises ReceiverError."""
        self._answer(self._sizes.start_s)

    def ask(self, message: object) -> Any:
        """Return the answer to a piece (start, tensor) or to SUM; raises ReceiverError where there is none in time."""
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._ended() from error
        return self._answer(self._sizes.answer_s)

    def close(self) -> None:
        """End the process: closing the pipe ends it, and it is killed where it does not follow."""
        self._connection.close()
        self._process.join(END_S)
        self._process.kill()
        self._process.join()

    def _answer(self, limit_s: float) -> Any:
        try:
            if self._connection.poll(limit_s):
                return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        raise ReceiverError(f"the receiving process gave no answer in {limit_s:g} s")

    def _ended(self) -> ReceiverError:
        self._process.join(END_S)
        return ReceiverError(f"the receiving process ended with exit code {self._process.exitcode}")


def measure(options: BenchOptions) -> list[Row]:
    device = device_of(options.num_gpus)
    num_bytes, num_buckets = (2**32, 16) if options.num_gpus else (2**24, 4)
    return measure_ipc(device, IpcSizes(num_bytes, num_buckets, options.num_rounds))


def measure_ipc(device: torch.device, sizes: IpcSizes, run: Receive = receive) -> list[Row]:
    """Measure the bytes sent whole and in buckets; a receiver that fails is a row that does not hold."""
    generator = torch.Generator(device).manual_seed(0)
    payload = torch.randint(2**30, (sizes.num_bytes // 4,), generator=generator, dtype=torch.int32, device=device)
    ways = {"whole": [payload], "buckets": list(payload.chunk(sizes.num_buckets))}
    try:
        with closing(Receiver(sizes, device, run)) as receiver:
            receiver.wait()
            arrived = [_arrives(receiver, payload, pieces) for pieces in ways.values()]
            rows = _rows(receiver, payload, ways, sizes)
    except ReceiverError as error:
        return [at_least("device.ipc.arrived", f"ways by which all bytes arrived: {error}", 0.0, "share", 1.0)]
    what = "of both ways of sending, those by which all bytes arrived"
    return [at_least("device.ipc.arrived", what, sum(arrived) / len(arrived), "share", 1.0), *rows]


def _send(receiver: Receiver, pieces: list[torch.Tensor], turn: int = 0) -> None:
    start = 0
    for piece in pieces:
        receiver.ask((start, piece))
        start += len(piece)


def _arrives(receiver: Receiver, payload: torch.Tensor, pieces: list[torch.Tensor]) -> bool:
    """Change the payload, send it, and compare both sides' sums."""
    payload.add_(1)
    settled()
    _send(receiver, pieces)
    return bool(receiver.ask(SUM) == int(payload.sum(dtype=torch.int64)))


def _rows(receiver: Receiver, payload: torch.Tensor, ways: dict[str, list[torch.Tensor]], sizes: IpcSizes) -> list[Row]:
    own = torch.empty_like(payload)
    sides: dict[str, Callable[[int], object]] = {"copy": lambda turn: own.copy_(payload)}
    for name, pieces in ways.items():
        sides[name] = partial(_send, receiver, pieces)
    times = interleaved("bytes to another process", sizes.num_rounds, sides)
    megabytes = f"{payload.nbytes / 1e6:.0f} MB"
    words = {
        "copy": f"{megabytes} copied in one process",
        "whole": f"{megabytes} to another process by one handle",
        "buckets": f"{megabytes} to another process by {len(ways['buckets'])} handles, one after the other",
    }
    rows = [
        Row(
            f"device.ipc.{name}",
            f"{words[name]}: bytes of payload",
            payload.nbytes / median_s(times[name]) / 1e9,
            "GB/s",
        )
        for name in sides
    ]
    for name in ways:
        id, what = f"device.ipc.{name}.ratio", f"time of {words[name]}, over the copy in one process"
        ratio = median_ratio(times[name], times["copy"])
        on_gpu = payload.device.type == "cuda"
        rows.append(at_most(id, what, ratio, "x", IPC_REACH) if on_gpu else Row(id, what, ratio, "x"))
    return rows
