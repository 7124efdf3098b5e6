"""Find what a setting of verl's or TRL's is called here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from slime_spec.errors import ConfigError
from slime_spec.launch.others import trl, verl
from slime_spec.suggest import closest

ALL_BELOW = ".*"


@dataclass(frozen=True)
class Counterpart:
    """Says what a setting of another trainer is here: ``Counterpart("TRL", "beta", ("--kl-loss-coef",), "")``.

    Without ``flags`` there is none, and ``note`` says why.
    """

    trainer: str
    name: str
    flags: tuple[str, ...]
    note: str

    def refusal(self, written: str) -> ConfigError:
        """Return the error for a command line on which the name stands, as ``written``."""
        is_name = f"is {self.trainer}'s {self.name}"
        if not self.flags:
            return ConfigError(written, f"{is_name}, which has no counterpart: {self.note}", written, "Leave it out.")
        note = f" ({self.note})" if self.note else ""
        return ConfigError(written, f"{is_name}, and has another name here", written, f"{self.passing}{note}.")

    @property
    def passing(self) -> str:
        return f"Pass {' or '.join(self.flags)}"


@cache
def counterparts() -> Mapping[str, Counterpart]:
    """Return each setting of verl's and TRL's, by its name there."""
    tables = {"verl": verl.ROWS, "TRL": trl.ROWS}
    return {each.name: each for trainer, rows in tables.items() for each in _read(trainer, rows)}


def counterpart_of(written: str) -> Counterpart | None:
    """Return what a word is that another trainer's command line has: ``--num-generations``, ``+data.train_files``."""
    name = written.lstrip("-+~").replace("-", "_")
    if name in counterparts():
        return counterparts()[name]
    while "." in name:
        name = name.rpartition(".")[0]
        if name + ALL_BELOW in counterparts():
            return counterparts()[name + ALL_BELOW]
    return None


def nearest(written: str) -> Counterpart | None:
    """Return the setting with a counterpart here that a mistyped flag most likely means."""
    flags = {f"--{name.replace('_', '-')}": each for name, each in counterparts().items() if each.flags}
    near = closest(written, flags)
    return None if near is None else flags[near]


def _read(trainer: str, rows: str) -> Iterator[Counterpart]:
    for line in rows.strip().splitlines():
        name, flags, note = (part.strip() for part in line.split("|"))
        yield Counterpart(trainer, name, () if flags == "-" else tuple(flags.split()), note)
