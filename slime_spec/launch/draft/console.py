"""The terminal shows one bar per phase while a draft is trained, and the held-out table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from slime_spec.draft.training.held_out import Tally
from slime_spec.draft.training.served import RULES

# Without a terminal, a line is printed each time a phase advances by this many percent.
LINE_PERCENT = 5


class ConsoleProgress:
    """Implements slime_spec.draft.training.progress.Progress; a context manager that owns the bars."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Bars(*self._columns, console=console, disable=not console.is_terminal)
        self._phase = ""
        self._percent = 0

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, phase: str, done: int, wanted: int, note: str = "") -> None:
        if phase != self._phase:
            self._phase, self._percent = phase, -1
            self._task = self._bars.add_task(phase, note=note)
        self._bars.update(self._task, completed=done, total=wanted, note=note)
        percent = 100 * done // max(1, wanted)
        if not self._console.is_terminal and (percent >= self._percent + LINE_PERCENT or self._percent < 0):
            self._percent = percent
            self._console.print(f"{phase} {done}/{wanted} {note}".rstrip(), markup=False, highlight=False)


def held_out_table(tallies: Mapping[str, Tally], title: str = "held-out replies") -> Table:
    """Make a row per kind of reply: by position, the share of drafts accepted, given that all earlier ones were.

    Tokens per verify are of drafts that name the likeliest token, and of sampled ones by either rule.
    """
    table = Table(title=title)
    table.add_column("kind")
    table.add_column("replies", justify="right")
    table.add_column("tokens per verify", justify="right")
    for rule in RULES:
        table.add_column(f"by {rule}", justify="right")
    table.add_column("accepted at 1, 2, …", justify="right")
    table.add_column("acc", justify="right")
    table.add_column("acceptance_rate", justify="right")
    for kind, tally in sorted(tallies.items()):
        shares = [" ".join(f"{share:.2f}" for share in by_position) for by_position in tally.shares.values()]
        means = [tally.tokens_per_verify, *(served.tokens_per_verify for served in tally.served.values())]
        table.add_row(kind, str(tally.num_sequences), *(f"{mean:.2f}" for mean in means), *shares)
    return table
