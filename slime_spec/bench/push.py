"""Compare whole weight pushes over the real path with plain copies of the same bytes in the same run.

    rank actor: export ─ checksum ─ publish ──► object store ──► engine actor: receive ─ checksum ─ pack ─ swap

The new version is staged beside the version that serves, in memory the engine did not have before. So a push is held
against a copy of the same tensors into fresh memory, page faults included. Its ratio to a copy into memory that was
written before, which no push can use, is reported too.
"""

from __future__ import annotations

import mmap
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track

from rollout.pool import EnginePool
from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.bench.timing import timed
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.config.tree import Config
from slime_spec.interfaces import Trainer
from slime_spec.launch.cluster import cluster
from slime_spec.launch.compose import compose
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.weights.checksums import as_bytes, tensor_checksum
from slime_spec.weights.messages import (
    BeginPush,
    CommitPush,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReply,
)
from slime_spec.weights.run import PushReport, bucketed, run_push
from trainer_bridge.megatron.group import MegatronGroup

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PushTimes:
    """Holds times of one push: the whole, and the driver's waits. The trainer fills a bucket while engines load one."""

    report: PushReport
    trainer_wait_s: float
    begin_s: float
    buckets_s: float
    commit_s: float


@dataclass(frozen=True)
class PushRound:
    """Holds the times of one push, of copies of the same bytes right after it, and of parts of the push alone."""

    push: PushTimes
    fresh_copy_s: float
    warm_copy_s: float
    checksum_s: float
    publish_s: float


def measure(options: BenchOptions) -> list[Row]:
    config = compose(["--config", "smollm2-135m", "--hf-checkpoint", str(options.model)])
    return push_rows(push_rounds(config, options.num_rounds), config)


def push_rounds(config: Config, num_rounds: int) -> list[PushRound]:
    """Time ``num_rounds`` + 1 pushes of a real trainer to real engines; the first push is cold."""
    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    with cluster(config, spec) as reserved, EnginePool(config, reserved.engines) as engines:
        trainer = MegatronGroup(config, reserved.ranks)
        try:
            trainer.load()
            engines.start()
            weights = _in_training_dtype(config, spec)
            copies = CopyRoom(weights)
            versions = track(range(1, num_rounds + 2), "pushing", console=Console(stderr=True), transient=True)
            return [_round(config, trainer, engines, version, weights, copies) for version in versions]
        finally:
            trainer.stop()


def _in_training_dtype(config: Config, spec: ModelSpec) -> Weights:
    dtype = getattr(torch, config.trainer.dtype)
    return {name: tensor.to(dtype) for name, tensor in load_tensors(config.model.hf_checkpoint, spec).items()}


def _round(
    config: Config, trainer: Trainer, engines: EnginePool, version: int, weights: Weights, copies: CopyRoom
) -> PushRound:
    push = timed_push(trainer, engines, version)
    assert push.report.nbytes == copies.nbytes, "the copies move what the push moved"
    return PushRound(
        push=push,
        fresh_copy_s=copies.fresh_copy_s(),
        warm_copy_s=copies.warm_copy_s(),
        checksum_s=timed(lambda: [tensor_checksum(tensor) for tensor in weights.values()]).seconds,
        publish_s=_publish_s(config, weights),
    )


def timed_push(trainer: Trainer, engines: EnginePool, version: int) -> PushTimes:
    """Time one push, and the driver's waits in it."""
    trainer_s = 0.0
    broadcast_s: dict[type, float] = dict.fromkeys((BeginPush, PushBucket, PreparePush, CommitPush), 0.0)

    def messages() -> Iterator[PushMessage]:
        nonlocal trainer_s
        source = trainer.push(version)
        while True:
            start = perf_counter()
            message = next(source, None)
            trainer_s += perf_counter() - start
            if message is None:
                return
            yield message

    def broadcast(message: PushMessage) -> list[PushReply]:
        start = perf_counter()
        replies = engines.broadcast(message)
        broadcast_s[type(message)] += perf_counter() - start
        return replies

    report = run_push(messages(), broadcast)
    commit_s = broadcast_s[PreparePush] + broadcast_s[CommitPush]
    return PushTimes(report, trainer_s, broadcast_s[BeginPush], broadcast_s[PushBucket], commit_s)


class CopyRoom:
    """Copies the weights, tensor by tensor, into one region of memory."""

    def __init__(self, weights: Weights) -> None:
        self._sources = [as_bytes(tensor) for tensor in weights.values()]
        self.nbytes = sum(source.numel() for source in self._sources)
        self._warm = torch.zeros(self.nbytes, dtype=torch.uint8)

    def fresh_copy_s(self) -> float:
        """Time a copy into new private memory of the kernel; freeing it is not counted.

        ``clone`` would do the same the first time, and later reuse freed pages, which are warm.
        """
        room = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return timed(lambda: self._copy_to(torch.frombuffer(room, dtype=torch.uint8))).seconds

    def warm_copy_s(self) -> float:
        """Time a copy into memory that was written before."""
        return timed(lambda: self._copy_to(self._warm)).seconds

    def _copy_to(self, target: torch.Tensor) -> None:
        start = 0
        for source in self._sources:
            target[start : start + source.numel()].copy_(source)
            start += source.numel()


def _publish_s(config: Config, weights: Weights) -> float:
    """Time publishing alone, bucket by bucket; each bucket's memory goes back at once."""
    transport = RayObjectStoreTransport()
    buckets = list(bucketed(weights.items(), config.push.bucket_bytes))

    def publish() -> None:
        for bucket in buckets:
            transport.publish(bucket)
            transport.close()

    return timed(publish).seconds


def push_rows(rounds: list[PushRound], config: Config) -> list[Row]:
    first, later = rounds[0], rounds[1:]
    nbytes = first.push.report.nbytes

    def median(seconds: list[float]) -> float:
        return statistics.median(seconds)

    def row(name: str, what: str, seconds: list[float]) -> Row:
        return Row(f"push.{name}", what, median(seconds), "s")

    whole = [each.push.report.seconds for each in later]
    model = Path(config.model.hf_checkpoint).name
    what = f"a push of {model} ({nbytes / 1e6:.0f} MB, {first.push.report.num_tensors} tensors, {config.trainer.dtype})"
    return [
        Row("push.first_s", f"{what}: the first of the run", first.push.report.seconds, "s"),
        row("seconds", f"{what}: median of the {len(later)} after it, begin to last commit", whole),
        Row("push.bytes_per_s", "its bytes over its time", nbytes / median(whole), "bytes/s"),
        row("fresh_copy_s", "plain copy of the same tensors into fresh memory", [each.fresh_copy_s for each in later]),
        row("warm_copy_s", "plain copy into memory written before", [each.warm_copy_s for each in later]),
        at_most(
            "push.ratio",
            "push over fresh copy, median of rounds: a push stages the new version beside the serving one, so it too "
            "writes memory that was not there before",
            median([each.push.report.seconds / each.fresh_copy_s for each in later]),
            "x",
            3.0,
        ),
        Row(
            "push.ratio_warm",
            "push over warm copy, median of rounds (no push can reuse the memory that serves)",
            median([each.push.report.seconds / each.warm_copy_s for each in later]),
            "x",
        ),
        row(
            "trainer_wait_s",
            "of the push: driver waits for buckets (export, checksum, publish, as far as engines do not hide it)",
            [each.push.trainer_wait_s for each in later],
        ),
        row("begin_s", "of the push: engines check the manifest", [each.push.begin_s for each in later]),
        row("buckets_s", "of the push: engines receive, checksum and pack", [each.push.buckets_s for each in later]),
        row("commit_s", "of the push: engines complete and swap", [each.push.commit_s for each in later]),
        row("checksum_s", "by itself, in the driver: one checksum of the bytes", [each.checksum_s for each in later]),
        row("publish_s", "by itself, in the driver: the transport's publish", [each.publish_s for each in later]),
    ]
