"""Time whole pushes to a real server by every transport, and check which of its tensors they change.

A push of one side must change only that side's tensors, by the server's own checksums. Tensors that a draft shares
with its target (the embedding; in most formats the head) count as the target's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import track

from slime_spec.algorithms import NONE, STANDALONE
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.bench.sglang.replies import prompts_of
from slime_spec.bench.sglang.servers import Server, Sums, started
from slime_spec.bench.sglang.settings import drafting, engine_settings, place, with_transport
from slime_spec.bench.sglang.weights import Weights, disturbed, draft_weights, target_weights
from slime_spec.weights.messages import Side
from slime_spec.weights.run import PushReport

SIDES: tuple[Side, Side] = ("target", "draft")
DISTURBANCE = 0.2
# Tables that a server computes, and a draft's vocabulary, which the server reads only at its start.
NOT_PUSHED = ("rotary", "cos_sin", "hot_token", "d2t")


@dataclass(frozen=True)
class Pushed:
    """Holds one side's pushes, the first with other weights, and every side's checksums before and after the first."""

    side: Side
    reports: Sequence[PushReport]
    before: Mapping[Side, Sums]
    after: Mapping[Side, Sums]

    def changed(self, side: Side) -> frozenset[str]:
        return frozenset(name for name, checksum in self.after[side].items() if checksum != self.before[side][name])


def measure(options: BenchOptions) -> list[Row]:
    return sided_rows(options, ("tensor", "distributed")) + disk_rows(options)


def sided_rows(options: BenchOptions, transports: Sequence[str]) -> list[Row]:
    """Push both sides to one server that speculates, by the transports that can name a side."""
    prompts, algorithm = prompts_of(options), drafting(options)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        config = engine_settings(options, algorithm, prompts, len(prompts), Path(log))
        weights: dict[Side, Weights] = {"target": target_weights(config), "draft": draft_weights(config)}
        with started(config) as server:
            shared = shared_with_target(algorithm, server.checksums("target"), server.checksums("draft"))
            for transport in transports:
                with started(with_transport(config, transport, server.address)) as same_server:
                    rows += transport_rows(options, transport, push_sides(options, same_server, weights), shared)
    return rows


def disk_rows(options: BenchOptions) -> list[Row]:
    """Push the target from disk to a server without a draft; an update from disk has no sides."""
    prompts = prompts_of(options)
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        config = engine_settings(options, NONE.name, prompts, len(prompts), Path(log))
        with started(with_transport(config, "disk")) as server:
            pushes = push_sides(options, server, {"target": target_weights(config)})
    return transport_rows(options, "disk", pushes, shared=frozenset())


def shared_with_target(algorithm: str, target: Sums, draft: Sums) -> frozenset[str]:
    """Return the draft's tensors that are the target's: equal ones. STANDALONE here has equal ones and shares none."""
    if algorithm == STANDALONE.name:
        return frozenset()
    return frozenset(name for name, checksum in draft.items() if checksum in target.values())


def push_sides(options: BenchOptions, server: Server, weights: Mapping[Side, Weights]) -> list[Pushed]:
    """Push one side after the other; at the end the server has ``weights`` again."""
    found = []
    for side, mine in weights.items():
        others = disturbed(mine, DISTURBANCE, options.seeds[0])
        before = {each: server.checksums(each) for each in weights}
        first = server.push(others, side)
        after = {each: server.checksums(each) for each in weights}
        turns = track(range(options.num_rounds), f"pushing the {side}", console=Console(stderr=True), transient=True)
        found.append(Pushed(side, [first, *(server.push(mine, side) for _ in turns)], before, after))
    return found


def transport_rows(
    options: BenchOptions, transport: str, pushes: Sequence[Pushed], shared: frozenset[str]
) -> list[Row]:
    rows: list[Row] = []
    for pushed in pushes:
        prefix = f"push.{transport}.{pushed.side}"
        rows += _time_rows(prefix, f"{pushed.side} by {transport}, on {place(options)}", pushed.reports)
        rows += _change_rows(prefix, pushed, shared)
    return rows


def _time_rows(prefix: str, what: str, reports: Sequence[PushReport]) -> list[Row]:
    first, later = reports[0], reports[1:]
    median_s = statistics.median(report.seconds for report in later)
    size = f"{first.nbytes / 1e6:.1f} MB, {first.num_tensors} tensors"
    return [
        Row(f"{prefix}.first_s", f"push of the {what}: the first one", first.seconds, "s"),
        Row(f"{prefix}.seconds", f"push of the {what} ({size}): median of the {len(later)} after it", median_s, "s"),
        Row(f"{prefix}.gb_per_s", "its bytes over its time", first.nbytes / median_s / 1e9, "GB/s"),
    ]


def _change_rows(prefix: str, pushed: Pushed, shared: frozenset[str]) -> list[Row]:
    side = pushed.side
    own = {name for name in pushed.before[side] if not any(part in name for part in NOT_PUSHED)}
    own -= shared if side == "draft" else set()
    changed = len(own & pushed.changed(side)) / len(own) if own else math.nan
    strays = [name for other in pushed.before if other != side for name in pushed.changed(other) - shared]
    what = f"other weights as the {side}: of the server's {len(own)} tensors of that side, those that changed"
    rows = [at_least(f"{prefix}.changed", what, changed, "share", 1.0)]
    if len(pushed.before) > 1:
        what = f"other weights as the {side}: tensors of the other side that changed: {', '.join(strays) or 'none'}"
        rows.append(at_most(f"{prefix}.strays", what, len(strays), "tensors", 0))
    return rows
