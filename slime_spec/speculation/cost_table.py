"""The cost table says, by batch and context, what a round costs over a plain step: the break-even accept length.

A round with drafts pays where it brings a sequence more tokens than that. Everything comes from RoundCosts; nothing is
measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from slime_spec.speculation.round_costs import RoundCosts

TABLE_DEPTHS = (1, 3, 7)
TABLE_BATCHES = (1, 2, 4, 8, 16, 32, 64)
TABLE_CONTEXTS = (128, 1024)
LEAST_GAIN = 1.03  # what drafts that are all accepted must bring, or no draft pays
Drafting = Literal["measured", "guessed", "free"]


@dataclass(frozen=True)
class CostLine:
    """Holds one batch and context: seconds of a plain step, and break-even lengths in the table's order of depths.

    Example: ``CostLine(batch=4, context=128, plain_s=0.027, break_even=(1.2, 2.0, 3.9))``
    """

    batch: int
    context: int
    plain_s: float
    break_even: tuple[float, ...]


@dataclass(frozen=True)
class CostTable:
    """Holds the lines for chains of ``depths``; ``drafting`` says where the draft's own cost in them comes from.

    A network's is guessed until its first rounds; drafts that are found in texts count as free.
    """

    depths: tuple[int, ...]
    lines: tuple[CostLine, ...]
    drafting: Drafting

    def most(self, line: CostLine) -> float:
        """Return the speed-up of drafts that are all accepted, at the best of the depths: no draft brings more."""
        return max((1 + depth) / length for depth, length in zip(self.depths, line.break_even, strict=True))

    def text(self) -> Iterator[str]:
        """Yield the table as lines of a log."""
        words = {"measured": "", "guessed": "; the draft's own cost is a guess", "free": "; drafts count as free"}
        yield f"break-even accept length (a round over a plain step) by draft length{words[self.drafting]}"
        yield "batch context plain_ms " + " ".join(f"{f'd={depth}':>6}" for depth in self.depths) + "  perfect drafts"
        for line in self.lines:
            lengths = " ".join(f"{length:6.2f}" for length in line.break_even)
            most = f"{self.most(line):.2f}x" if self.most(line) > LEAST_GAIN else "never pay"
            yield f"{line.batch:5d} {line.context:7d} {1000 * line.plain_s:8.2f} {lengths}  {most}"


def break_even_length(costs: RoundCosts, batch: int, context: int, depth: int) -> float:
    """Return the tokens that a sequence must gain in a round of ``depth`` drafts for the round to be worth its time.

    The draft reads what the round before has brought, here as many tokens as the passes alone would ask for.
    """
    plain_s = costs.pass_s(batch, batch * context)
    verify_s = costs.pass_s(batch * (1 + depth), batch * (1 + depth) * context)
    read = min(verify_s / plain_s, 1.0 + depth)
    return (verify_s + costs.draft_s(batch, depth, round(batch * read))) / plain_s


def cost_table(
    costs: RoundCosts,
    has_network: bool,
    batches: Sequence[int] = TABLE_BATCHES,
    contexts: Sequence[int] = TABLE_CONTEXTS,
    depths: Sequence[int] = TABLE_DEPTHS,
) -> CostTable:
    """Return the table of what ``costs`` predicts now; without a network the draft's own cost is left out."""
    drafting: Drafting = ("measured" if costs.knows_drafting else "guessed") if has_network else "free"
    costs = costs if has_network else costs.with_free_drafts()
    lines = tuple(
        CostLine(
            batch,
            context,
            costs.pass_s(batch, batch * context),
            tuple(break_even_length(costs, batch, context, depth) for depth in depths),
        )
        for context in contexts
        for batch in batches
    )
    return CostTable(tuple(depths), lines, drafting)
