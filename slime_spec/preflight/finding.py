"""A check is a small function of the facts, with the reason for it and its links; it returns a finding or None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from slime_spec.preflight.facts import Facts

SGLANG_REPOSITORY = "https://github.com/sgl-project/sglang"


class Severity(StrEnum):
    """An error stops a launch; a warning is printed; an info says what will happen."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Sighting:
    """Reports a trap that these facts run into: the facts read, the remedy, and its flags (none: nothing to add)."""

    severity: Severity
    read: str
    remedy: str
    fix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Joins a sighting with the reason and the links of its trap. Example::

    Finding("draft-dtype", Severity.ERROR, "the draft is float16, the target bfloat16, ...", "one server ...",
            "Pass --sglang-dtype float16.", ("--sglang-dtype", "float16"), ("https://github.com/...",))
    """

    id: str
    severity: Severity
    read: str
    why: str
    remedy: str
    fix: tuple[str, ...]
    links: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "severity": self.severity.value,
            "read": self.read,
            "why": self.why,
            "remedy": self.remedy,
            "fix": list(self.fix),
            "links": list(self.links),
        }


Condition = Callable[[Facts], bool]


@dataclass(frozen=True)
class Trap:
    """Describes one known trap: ``look`` is asked only where ``applies`` holds."""

    id: str
    why: str
    links: tuple[str, ...]
    applies: Condition
    look: Callable[[Facts], Sighting | None]

    def __call__(self, facts: Facts) -> Finding | None:
        sighting = self.look(facts) if self.applies(facts) else None
        if sighting is None:
            return None
        return Finding(self.id, sighting.severity, sighting.read, self.why, sighting.remedy, sighting.fix, self.links)


def always(_: Facts) -> bool:
    return True


def on_sglang(facts: Facts) -> bool:
    return facts.knows_servers


def speculating(facts: Facts) -> bool:
    return facts.speculates


def speculating_on_sglang(facts: Facts) -> bool:
    return facts.knows_servers and facts.speculates


def asking_sglang_to_speculate(facts: Facts) -> bool:
    """Return whether requests ask for speculation on SGLang; the servers' own flags need not be known."""
    return facts.on_sglang and facts.speculates


def trap(
    id: str, why: str, *links: str, applies: Condition = speculating_on_sglang
) -> Callable[[Callable[[Facts], Sighting | None]], Trap]:
    """Make a check of the decorated function; links are URLs or numbers of SGLang's issues and pull requests."""

    def made(look: Callable[[Facts], Sighting | None]) -> Trap:
        return Trap(id, why, tuple(_url(link) for link in links), applies, look)

    return made


def _url(link: str) -> str:
    return f"{SGLANG_REPOSITORY}/issues/{link}" if link.isdigit() else link
