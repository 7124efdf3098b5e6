"""Measure the product's push between two processes on one device, and hold it against a copy of the same bytes.

    trainer:  | weights |  checksum ─ slot ──►  engine, another process: checksum ─ check of values ─ pack ─ swap

Both ends are the product's: its messages and their order, its transport, its checks, the embedded engine's packing.
The weights are those of a known shape with random values, and a pipe stands for Ray's calls. A copy of the same bytes
in one process is the bound that no push can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection

import torch

from rollout.embedded.model import Decoder
from rollout.embedded.rope import RopeTable
from rollout.embedded.weights import DecoderBuilder, named_tensors
from slime_spec.bench.device.ipc import COPIED, IPC_REACH, IpcSizes, Receiver, ReceiverError
from slime_spec.bench.device.random_model import SCALE, SHAPES, num_weights
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.bench.timing import interleaved, median_ratio, median_s, settled
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import PushConfig
from slime_spec.transports.ipc import IpcTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksums
from slime_spec.weights.messages import Manifest, PauseMode, PushMessage, PushReply, Side
from slime_spec.weights.receive import PushDesk, PushStage
from slime_spec.weights.run import PushReport, push_messages, run_push

DTYPE = torch.bfloat16
NUM_POSITIONS = 16  # of a decoder that computes nothing
COPY_PARTS = 4  # the copy goes to a quarter of its memory, again and again: two processes have four copies already


class BuilderStaging:
    """Packs a push's tensors as the embedded engine does."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.expected = expected_shapes(spec)
        self._builder = DecoderBuilder(spec, RopeTable(spec, NUM_POSITIONS, DTYPE, device), DTYPE, device)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._builder.add(name, tensor)

    def keep(self) -> None:
        self._builder.keep()

    def build(self) -> None:
        self.decoder = self._builder.finish()
        settled()


class BuiltWeights:
    """Implements ServingWeights with a decoder that serves nobody."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec, self._device, self._version = spec, device, 0
        self._decoder: Decoder | None = None

    def version(self, side: Side) -> int:
        return self._version

    def staging(self, manifest: Manifest) -> BuilderStaging:
        return BuilderStaging(self._spec, self._device)

    def commit(self, stage: PushStage[BuilderStaging]) -> None:
        self._decoder, self._version = stage.staging.decoder, stage.manifest.version

    def checksum(self, side: Side) -> str:
        assert self._decoder is not None, "verified after a commit"
        tensors = named_tensors(self._decoder)
        return combined_checksum(zip(tensors, tensor_checksums(list(tensors.values())), strict=True))

    def pause(self, mode: PauseMode) -> None:
        """Do nothing: nothing is generated."""

    def resume(self) -> None:
        pass


def take_pushes(shape: str, connection: Connection, num_bytes: int, device: str) -> None:
    """Run in the engine's process: answer each message; an error ends the process."""
    weights = BuiltWeights(SHAPES[shape], torch.device(device))
    desk = PushDesk(0, IpcTransport(), weights, DTYPE)
    connection.send(COPIED)
    while True:
        try:
            message: PushMessage = connection.recv()
        except EOFError:  # the trainer has closed its end
            return
        connection.send(desk.answer(message))


@dataclass(frozen=True)
class PushSizes:
    """Holds the model's shape, sizes of buckets by the name that they have in a row, and the timed rounds."""

    shape: str
    bucket_bytes: Mapping[str, int]
    num_rounds: int


def measure(options: BenchOptions) -> list[Row]:
    buckets = {"": PushConfig().bucket_bytes}
    if options.num_gpus:
        buckets["large."] = 2**31
    shape = options.shapes[0] if options.shapes else "8b" if options.num_gpus else "tiny"
    return measure_push(device_of(options.num_gpus), PushSizes(shape, buckets, options.num_rounds))


def measure_push(device: torch.device, sizes: PushSizes) -> list[Row]:
    """Measure pushes and a copy in turn; an engine that fails is a row that does not hold."""
    weights, flat = _random_weights(SHAPES[sizes.shape], device)
    start = partial(take_pushes, sizes.shape)
    versions = count(1)
    try:
        with closing(Receiver(IpcSizes(flat.nbytes, 1, sizes.num_rounds), device, start)) as engine:
            engine.wait()
            pusher = Pusher(engine, weights, versions)
            verified = pusher.push(min(sizes.bucket_bytes.values()), verify=True).verified
            rows = _rows(pusher, flat, sizes)
    except ReceiverError as error:
        return [at_least("device.push.arrived", f"whether the weights arrived: {error}", 0.0, "", 1.0)]
    what = "whether the weights that the engine computes with, read back, are those that were sent"
    return [at_least("device.push.arrived", what, float(verified), "", 1.0), *rows]


class Pusher:
    """Pushes weights to the engine in the other process, each time as the next version."""

    def __init__(self, engine: Receiver, weights: Mapping[str, torch.Tensor], versions: count[int]) -> None:
        self._engine, self.weights, self._versions = engine, weights, versions
        self._transport = IpcTransport()

    def push(self, bucket_bytes: int, turn: int = 0, verify: bool = False) -> PushReport:
        messages = push_messages(self.weights, next(self._versions), "target", bucket_bytes, self._transport)
        return run_push(messages, self._broadcast, verify)

    def _broadcast(self, message: PushMessage) -> list[PushReply]:
        return [self._engine.ask(message)]


def _random_weights(spec: ModelSpec, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a model's weights, and the memory that holds all of them."""
    flat = torch.empty(num_weights(spec), dtype=DTYPE, device=device)
    flat.normal_(0.0, SCALE, generator=torch.Generator(device).manual_seed(0))
    shapes = expected_shapes(spec)
    parts = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}, flat


def _copy(flat: torch.Tensor, room: torch.Tensor, turn: int) -> None:
    for part in flat.chunk(COPY_PARTS):
        room[: len(part)].copy_(part)


def _rows(pusher: Pusher, flat: torch.Tensor, sizes: PushSizes) -> list[Row]:
    room = torch.empty_like(flat.chunk(COPY_PARTS)[0])
    tensors = list(pusher.weights.values())
    sides: dict[str, Callable[[int], object]] = {
        "copy": partial(_copy, flat, room),
        "checksum": lambda turn: tensor_checksums(tensors),
    }
    for name, bucket_bytes in sizes.bucket_bytes.items():
        sides[name] = partial(pusher.push, bucket_bytes)
    times = interleaved("pushes between processes", sizes.num_rounds, sides)
    what = f"{flat.nbytes / 1e6:.0f} MB in {len(tensors)} tensors"
    words = {"copy": f"{what} copied in one process", "checksum": f"checksums of {what}"}
    for name, bucket_bytes in sizes.bucket_bytes.items():
        words[name] = f"a push of {what} by ipc, buckets of {bucket_bytes / 2**20:.0f} MiB"
    rows = [
        Row(f"device.push.{name if name in ('copy', 'checksum') else name + 'ipc'}", words[name], seconds * 1000, "ms")
        for name, seconds in ((name, median_s(times[name])) for name in sides)
    ]
    for name in sizes.bucket_bytes:
        id, text = f"device.push.{name}ipc.ratio", f"time of {words[name]}, over the copy in one process"
        ratio = median_ratio(times[name], times["copy"])
        on_gpu = flat.device.type == "cuda"
        rows.append(at_most(id, text, ratio, "x", IPC_REACH) if on_gpu else Row(id, text, ratio, "x"))
    return rows
