"""The report prints what was measured as tables, then the flags; the JSON has the same and what it was measured on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from slime_spec.algorithms import NONE
from slime_spec.bench.rows import machine
from slime_spec.bench.tune.acceptance import Acceptance
from slime_spec.bench.tune.push import PushCheck
from slime_spec.bench.tune.results import BatchResult, Rounds, Swept
from slime_spec.bench.tune.verdict import Overall, Verdict
from slime_spec.preflight.checks.metrics import BAR
from slime_spec.run_folder import versions
from slime_spec.speculation.cost_table import LEAST_GAIN

SHOWN_POSITIONS = 5
SHOWN_DEPTHS = (1, 2, 3, 5, 7)
UNKNOWN = "not given by this server"


@dataclass(frozen=True)
class Found:
    """Holds everything that one call has measured and concluded; ``per`` says what speeds are over: CPU s or s."""

    per: str
    replies: str
    swept: Swept
    verdicts: tuple[Verdict, ...]
    overall: Overall
    push: PushCheck | None


def show(found: Found, console: Console) -> None:
    """Print the tables and the verdict."""
    swept = found.swept
    console.print(_acceptance_table(swept.acceptance))
    if lengths := [each for each in swept.batches if each.lengths is not None]:
        console.print(_length_table(lengths))
    console.print(_speed_table(found))
    if any(each.rounds for each in swept.batches):
        console.print(_round_table(swept.batches))
    if swept.batches[0].assumed:
        console.print(_assumed_table(swept))
    if swept.costs is not None:
        for line in swept.costs.text():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (*_note_lines(swept), *_push_lines(found.push), *_verdict_lines(found)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _acceptance_table(acceptance: Sequence[Acceptance]) -> Table:
    bar = " / ".join(f"{each:.0%}" for each in BAR)
    table = Table(title=f"accepted by draft position, of rounds with a draft (RTP-LLM's bar: above {bar})")
    for name in ("drafter", "rule"):
        table.add_column(name, overflow="fold")
    for position in range(SHOWN_POSITIONS):
        table.add_column(str(position + 1), justify="right")
    for name in ("tokens a step", "drafts a step"):
        table.add_column(name, justify="right")
    table.add_column("bar")
    for each in acceptance:
        shares = [f"{share:.0%}" for share in each.cumulative[:SHOWN_POSITIONS]]
        shares += [""] * (SHOWN_POSITIONS - len(shares))
        gained = UNKNOWN if each.gained is None else f"{1 + each.gained:.2f}"
        drafted = UNKNOWN if each.drafted is None else f"{each.drafted:.1f}"
        passed = f"{each.num_passed} of {len(BAR)}" if each.rates else UNKNOWN
        table.add_row(each.name, each.rule, *shares, gained, drafted, passed)
    return table


def _round_table(results: Sequence[BatchResult]) -> Table:
    table = Table(
        title="tokens a round of a sequence / the break-even accept length, which is a round's cost over a plain step"
    )
    table.add_column("drafter", overflow="fold")
    for each in results:
        table.add_column(f"{each.batch} at once", justify="right")
    for name in results[0].rounds:
        table.add_row(name, *(_round_cell(each.rounds[name]) for each in results))
    return table


def _round_cell(rounds: Rounds) -> str:
    if rounds.accept_length is None:
        return UNKNOWN
    cost = "not measurable" if rounds.break_even is None else f"{rounds.break_even:.2f}"
    return f"{rounds.accept_length:.2f} / {cost}"


def _length_table(results: Sequence[BatchResult]) -> Table:
    first = results[0].lengths
    assert first is not None, "the caller has chosen the batches with lengths"
    table = Table(
        title="draft length: a round's cost over a plain step (the break-even accept length), and the best length"
    )
    for name in ("at once", "draft"):
        table.add_column(name, justify="right" if name == "at once" else "left", overflow="fold")
    depths = [depth for depth in SHOWN_DEPTHS if depth in first.break_even]
    for depth in depths:
        table.add_column(f"d={depth}", justify="right")
    for name in ("RTP-LLM's formula", "by costs", "measured", "perfect drafts"):
        table.add_column(name, justify="right")
    for each in results:
        lengths = each.lengths
        assert lengths is not None, "the caller has chosen the batches with lengths"
        costs = [f"{lengths.break_even[depth]:.2f}" if depth in lengths.break_even else "" for depth in depths]
        by_costs = f"{lengths.by_costs} ({lengths.predicted:.2f}x)"
        measured = "none worth it" if lengths.measured is None else str(lengths.measured)
        perfect = f"{lengths.perfect:.2f}x" if lengths.perfect > LEAST_GAIN else "never pay"
        table.add_row(str(each.batch), lengths.draft, *costs, str(lengths.by_formula), by_costs, measured, perfect)
    return table


def _speed_table(found: Found) -> Table:
    table = Table(title=f"tokens a {found.per} over no speculation: median (range) of repetitions; {found.replies}")
    table.add_column("drafter, number of drafts", overflow="fold")
    batches = found.swept.batches
    for each in batches:
        table.add_column(f"{each.batch} at once", justify="right")
    names = dict.fromkeys(name for each in batches for name in (*each.speed_ups, *each.predicted))
    table.add_row(f"none: tokens a {found.per}", *(f"{each.off_tokens_per_s:.0f}" for each in batches))
    for name in names:
        table.add_row(name, *(_cell(each, name) for each in batches))
    return table


def _cell(result: BatchResult, name: str) -> str:
    if name in result.speed_ups:
        return result.speed_ups[name].text
    return f"predicted {result.predicted[name]:.2f}x" if name in result.predicted else ""


def _assumed_table(swept: Swept) -> Table:
    table = Table(
        title=f"what a draft of this accept length would bring, at {swept.assumed_at} (assumed, not measured)"
    )
    table.add_column("tokens a round of 7 drafts", justify="right")
    for each in swept.batches:
        table.add_column(f"{each.batch} at once", justify="right")
    for number, (length, _, _) in enumerate(swept.batches[0].assumed):
        cells = [_assumed_cell(*each.assumed[number][1:]) if each.assumed else UNKNOWN for each in swept.batches]
        table.add_row(f"{length:g}", *cells)
    return table


def _assumed_cell(depth: int, gain: float) -> str:
    return f"{gain:.2f}x with {depth}" if depth else "off"


def _note_lines(swept: Swept) -> Iterator[str]:
    for name, why in swept.left_out.items():
        yield f"left out: {name}: {why}"
    for note in swept.notes:
        yield f"note: {note}"


def _push_lines(push: PushCheck | None) -> Iterator[str]:
    if push is None:
        return
    if push.seconds:
        read = "weights read back and equal" if push.is_verified else "weights not comparable after the push"
        kept = ""
        if push.length_before is not None and push.length_after is not None:
            kept = f", accept length {push.length_before:.2f} before and {push.length_after:.2f} after"
        yield (
            f"push: {push.nbytes / 1e6:.0f} MB from the trainer to the engines in {push.seconds:.1f} s, {read}, "
            f"{push.num_same} of {push.num_replies} greedy replies as before{kept}"
        )
    if push.problem:
        yield f"push: WRONG: {push.problem}"


def _verdict_lines(found: Found) -> Iterator[str]:
    yield ""
    for each in found.verdicts:
        where = f"{each.batch} at once"
        if each.side is None:
            yield f"{where}: do not speculate here: {each.why}"
            continue
        assert each.speed_up is not None, "a chosen side was measured"
        yield f"{where}: {each.side}, {each.speed_up.text}"
        yield f"    {shlex.join(each.flags)}"
    if found.overall.side is None:
        if any(each.side is not None for each in found.verdicts):
            yield "at all of these together: no one setting pays; choose by the batch at which a run spends its time"
        else:
            yield f"do not speculate: --speculative-algorithm {NONE.name}"
        return
    speeds = ", ".join(f"{batch}: {speed_up.median:.2f}x" for batch, speed_up in found.overall.speed_ups.items())
    yield f"at all of these together: {found.overall.side} ({speeds})"
    yield f"    {shlex.join(found.overall.flags)}"


def as_json(found: Found, command: Sequence[str]) -> str:
    """Return everything found, with the machine, the versions and the command."""
    return json.dumps(
        {
            "per": found.per,
            "replies": found.replies,
            "acceptance": [
                {**asdict(each), "cumulative": each.cumulative, "num_passed": each.num_passed}
                for each in found.swept.acceptance
            ],
            "batches": [_batch(each) for each in found.swept.batches],
            "costs": None if found.swept.costs is None else asdict(found.swept.costs),
            "left_out": dict(found.swept.left_out),
            "notes": found.swept.notes,
            "verdicts": [
                {"batch": each.batch, "side": each.side, "flags": each.flags, "why": each.why}
                for each in found.verdicts
            ],
            "overall": {"side": found.overall.side, "flags": found.overall.flags},
            "push": None if found.push is None else asdict(found.push),
            "machine": machine(),
            "versions": versions(),
            "command": shlex.join(command),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        indent=2,
        allow_nan=False,
    )


def _batch(result: BatchResult) -> Mapping[str, Any]:
    return {
        "batch": result.batch,
        "off_tokens_per_s": result.off_tokens_per_s,
        "speed_ups": {
            name: {"median": speed_up.median, "each": speed_up.each, "depth": result.sides[name].depth}
            for name, speed_up in result.speed_ups.items()
        },
        "predicted": dict(result.predicted),
        "rounds": {name: asdict(rounds) for name, rounds in result.rounds.items()},
        "lengths": None if result.lengths is None else asdict(result.lengths),
        "assumed": [
            {"accept_length": length, "num_drafts": depth, "speed_up": gain} for length, depth, gain in result.assumed
        ],
    }
