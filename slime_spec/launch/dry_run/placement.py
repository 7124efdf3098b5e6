"""Show the placement as lines, with equal bundles on the same line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from slime_spec.placement import BundlePlan


@dataclass(frozen=True)
class Held:
    """Names a bundle's owners: ``Held("4 cores, 1 GPU", engine="0", rank="3")``; "0 node 1" for several nodes."""

    size: str
    engine: str | None
    rank: str | None

    @property
    def kind(self) -> tuple[str, bool, bool]:
        return self.size, self.engine is not None, self.rank is not None


def placement_lines(plan: BundlePlan) -> Iterator[str]:
    for _, numbered in groupby(enumerate(_held(plan)), key=lambda entry: entry[1].kind):
        group = list(numbered)
        holders = [each for _, each in group]
        names = (
            _named("engine", [each.engine for each in holders if each.engine is not None]),
            _named("trainer rank", [each.rank for each in holders if each.rank is not None]),
        )
        each = " each" if len(group) > 1 else ""
        numbers = [str(number) for number, _ in group]
        yield f"{_named('bundle', numbers)}: {holders[0].size}{each}: {', '.join(name for name in names if name)}"


def _held(plan: BundlePlan) -> list[Held]:
    engines: dict[int, str] = {}
    for engine, nodes in enumerate(plan.engine_nodes):
        for node, first in enumerate(nodes):
            label = f"{engine} node {node}" if len(nodes) > 1 else str(engine)
            engines |= dict.fromkeys(range(first, first + plan.together), label)
    ranks = {bundle: str(rank) for rank, bundle in enumerate(plan.rank_bundles)}
    return [
        Held(
            f"{counted(bundle.num_cpus, 'core')}, {counted(bundle.num_gpus, 'GPU')}",
            engines.get(index),
            ranks.get(index),
        )
        for index, bundle in enumerate(plan.bundles)
    ]


def _named(kind: str, labels: list[str]) -> str:
    """Return ``engine 0`` or ``engines 0-7``; an empty text for an empty list."""
    distinct = list(dict.fromkeys(labels))
    if len(distinct) < 2:
        return f"{kind} {distinct[0]}" if distinct else ""
    if all(label.isdigit() for label in distinct):
        return f"{kind}s {distinct[0]}-{distinct[-1]}"
    return ", ".join(f"{kind} {label}" for label in distinct)


def counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
