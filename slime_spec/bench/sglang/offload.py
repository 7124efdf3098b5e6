"""Time the release and resume of memory that a colocated trainer asks for, and check the draft afterwards.

The next push brings the target again, as in a run; the draft must be intact without a push.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.bench.sglang.exactness import exactly, share_of_equals
from slime_spec.bench.sglang.replies import LENGTH, Samples, accept_length, prompts_of
from slime_spec.bench.sglang.servers import Server, Sums, started
from slime_spec.bench.sglang.settings import drafting, engine_settings, num_gpus, place
from slime_spec.bench.sglang.weights import target_weights
from slime_spec.bench.timing import timed
from slime_spec.config.tree import ClusterConfig


@dataclass(frozen=True)
class Offload:
    """Holds the times of one release and resume. ``freed_bytes`` are the GPU's: on a CPU SGLang releases nothing."""

    release_s: float
    resume_s: float
    freed_bytes: int


@dataclass(frozen=True)
class State:
    """Holds the checksums of the draft's tensors on a server, and the server's replies."""

    draft_sums: Sums
    replies: Samples


def measure(options: BenchOptions) -> list[Row]:
    """Release and resume ``num_rounds`` times."""
    prompts, algorithm = prompts_of(options), drafting(options)
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        config = engine_settings(options, algorithm, prompts, len(prompts), Path(log))
        # A run without a trainer never releases memory.
        colocated = ClusterConfig(colocate=True, offload=True)
        config = replace(config, cluster=colocated, run=replace(config.run, mode="train"))
        target = target_weights(config)
        with started(config) as server:
            before = _state(options, server)
            offloads = []
            for _ in range(options.num_rounds):
                server.forget()
                offloads.append(_offload(server, on_gpu=num_gpus(options) > 0))
                server.push(target, "target")
            return offload_rows(options, offloads, before, _state(options, server))


def _state(options: BenchOptions, server: Server) -> State:
    return State(server.checksums("draft"), server.greedy(prompts_of(options), options.num_new_tokens))


def _offload(server: Server, on_gpu: bool) -> Offload:
    had = torch.cuda.mem_get_info()[0] if on_gpu else 0
    release = timed(lambda: server.engine.set_resident(False))
    freed = torch.cuda.mem_get_info()[0] - had if on_gpu else 0
    resume = timed(lambda: server.engine.set_resident(True))
    return Offload(release.seconds, resume.seconds, freed)


def offload_rows(options: BenchOptions, offloads: Sequence[Offload], before: State, after: State) -> list[Row]:
    on_gpu, count = num_gpus(options) > 0, len(offloads)
    where = f"on {place(options)}, median of {count}" + (
        "" if on_gpu else ": the calls alone, nothing is released there"
    )
    release_s = statistics.median(each.release_s for each in offloads)
    resume_s = statistics.median(each.resume_s for each in offloads)
    same = [after.draft_sums[name] == checksum for name, checksum in before.draft_sums.items()]
    equal = share_of_equals(after.replies, before.replies)
    told = f"of {len(after.replies)} greedy replies, those that {count} offloads left as they were ({options.dtype})"
    rows = [
        Row("offload.release_s", f"release, {where}", release_s, "s"),
        Row("offload.resume_s", f"resume with the look at the draft, {where}", resume_s, "s"),
        at_least(
            "offload.draft_unchanged",
            f"of the draft's {len(same)} tensors, those whose checksum {count} offloads left as it was",
            sum(same) / len(same),
            "share",
            1.0,
        ),
        exactly(options, "offload.equal", told, equal),
        Row("offload.before.accept_length", "reply tokens over verify rounds", accept_length(before.replies), LENGTH),
        Row("offload.after.accept_length", f"the same after {count} offloads", accept_length(after.replies), LENGTH),
    ]
    if on_gpu:
        freed = statistics.median(each.freed_bytes for each in offloads)
        rows.append(Row("offload.freed", f"GPU memory that a release gave back, {where}", freed / 1e9, "GB"))
    return rows
